"""The search for the highest entries: count, and look again between two thresholds.

One loop for all arrays.  A group of several arrays is searched with one threshold for
all of them, until it is known how many entries each array keeps.  Then every array goes
on by itself: values first, and where more entries are equal than are kept, places.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core import sharding
from . import _counts as counts, _keys as ranking
from ._counts import Count
from ._keys import Candidates

_THRESHOLDS = 4  # what a pass can count while it waits for memory
_FIRST = (0.0, 2.0**-9, 2.0**-4, 1.0)  # most parameters lie between the middle two
_SPREAD = (-3, -1, 1, 3)  # where thresholds stand about a guess, in its likely error
_SAMPLE = 1 << 13  # of a group, sorted in a tenth of the time of one pass over 10⁷
_UNKNOWN = -1

Numbers = Int[Array, " arrays"]
Thresholds = Int[Array, "arrays n"]


class Bracket(NamedTuple):
    """Between which keys the answer of every array lies: low ≤ answer < high."""

    low: Numbers
    high: Numbers
    reach_low: Numbers  # how many entries reach `low`: as many as are kept, or more
    reach_high: Numbers  # how many entries reach `high`: fewer
    kept: Numbers  # unknown as long as the group is searched as a whole
    tie: Numbers  # the key whose entries are ranked by place; the least integer: none


class Task(NamedTuple):
    """What is searched for."""

    these: Candidates
    kept: Count  # of the group of each array
    groups: tuple[int, ...]  # of each array
    floors: np.ndarray  # what each array keeps in any case
    by_place: bool  # whether ties are told apart; otherwise all of them are marked

    @property
    def competes(self) -> bool:
        """Tells whether any arrays are of one group."""
        return len(set(self.groups)) < len(self.groups)


class Ends(NamedTuple):
    """From which key on entries are marked; of that key, those before a place."""

    key: Numbers
    place: Numbers


def search(task: Task) -> Ends:
    """Returns where the highest entries of each array end."""

    def unfinished(carry):
        now = Bracket(*carry[0])
        return jnp.any((now.reach_low != now.kept) & (now.low < now.high - 1))

    def narrow(carry):
        return _narrowed(task, Bracket(*carry[0]), carry[1])

    dtype = task.these.dtype
    sizes = np.asarray(task.these.sizes, dtype)
    end, none = int(np.iinfo(dtype).max), task.kept.equals(counts.of(0))
    kept = jnp.full(len(sizes), _UNKNOWN) if task.competes else task.kept.to_integer()
    start = Bracket(
        low=jnp.where(none, end, -end),
        high=jnp.full(len(sizes), end),
        reach_low=jnp.where(none, 0, sizes),
        reach_high=jnp.zeros(len(sizes)),
        kept=kept,
        tie=jnp.full(len(sizes), -end - 1),
    )
    carry = _packed(start, dtype), _first_thresholds(task)
    if sharding.inside_shard_map():
        # Arrays may differ over devices on which they are ranked one by one.
        kinds = jax.eval_shape(narrow, carry)
        carry = jax.tree.map(sharding.varying_as, carry, kinds)
    # The thresholds are carried: computed where they are used, XLA would compute
    # them once an entry.
    last = Bracket(*lax.while_loop(unfinished, narrow, carry)[0])
    tied = last.tie != -end - 1
    place = jnp.where(tied, sizes - last.low, sizes).astype(jnp.int32)
    return Ends(jnp.where(tied, last.tie, last.low), place)


def _packed(bracket: Bracket, dtype: type) -> Int[Array, "fields arrays"]:
    """Returns a bracket as one array, which takes one kernel to write."""
    return jnp.stack([field.astype(dtype) for field in bracket])


def _first_thresholds(task: Task) -> Thresholds:
    """Places the first thresholds: by a sample, or where most parameters lie."""
    these, groups = task.these, np.asarray(task.groups)
    names, first, own = np.unique(groups, return_index=True, return_inverse=True)
    totals = np.bincount(own, these.sizes)
    if these.is_split() or max(totals) <= 8 * _SAMPLE:
        thresholds = ranking.key_of(jnp.asarray(_FIRST, jnp.float32), these.dtype)
        return jnp.broadcast_to(thresholds, (len(groups), _THRESHOLDS))
    members = [np.flatnonzero(groups == name).tolist() for name in names]
    samples = [ranking.sample(these, each, _SAMPLE) for each in members]
    # About the share of a sample that all entries have, give or take its scatter.
    is_sorted = np.array_equal(own, range(len(groups)))  # each array by itself
    kept = task.kept if is_sorted else task.kept.at(first)
    share = kept.to_float() / np.maximum(totals, 1).astype(np.float32)
    share = jnp.broadcast_to(share[:, None], (len(names), _THRESHOLDS))
    error = jnp.sqrt(_SAMPLE * share * (1 - share))
    place = _SAMPLE * (1 - share) + error * np.asarray([_SPREAD], np.float32)
    place = jnp.clip(place, 0, _SAMPLE - 1).astype(jnp.int32)
    ranked = jnp.sort(jnp.stack(samples), axis=1)
    found = jnp.take_along_axis(ranked, place, axis=1, mode="promise_in_bounds")
    return found if is_sorted else found[own]


def _narrowed(
    task: Task, old: Bracket, thresholds: Thresholds
) -> tuple[Int[Array, "fields arrays"], Thresholds]:
    """Counts once, and returns the part of each bracket in which the answer lies."""
    dtype = task.these.dtype
    tie = old.tie if task.by_place else None
    reach = ranking.reached(task.these, thresholds, tie)
    enough = reach >= old.kept[:, None]
    if task.competes:
        together = _sums(task, reach).at_least(task.kept.at((slice(None), None)))
        enough = jnp.where((old.kept == _UNKNOWN)[:, None], together, enough)
    low, high, reach_low, reach_high = (bound[:, None] for bound in old[:4])
    bounds = [  # the last threshold that enough entries reach, the first that too few
        jnp.where(enough, jnp.maximum(thresholds, low), low),
        -jnp.where(enough, high, jnp.minimum(thresholds, high)),
        -jnp.where(enough, reach, reach_low),
        jnp.where(enough, reach_high, reach),
    ]
    low, high, reach_low, reach_high = jnp.max(jnp.stack(bounds), axis=2)
    new = Bracket(low, -high, -reach_low, reach_high, old.kept, old.tie)
    wide = jnp.float64 if dtype == jnp.int64 else jnp.float32
    if task.competes:
        new, entries, above = _divided(task, new, wide)
    else:
        entries = (new.reach_low - new.reach_high).astype(wide)
        above = (new.reach_low - new.kept).astype(wide)
    new = _with_places(task, new) if task.by_place else new
    # Halved before they are subtracted: the first bracket is wider than an integer.
    widths = [(each.high >> 1) - (each.low >> 1) for each in (new, old)]
    is_narrow = widths[0] <= widths[1] >> 2
    return _packed(new, dtype), _thresholds(new, entries, above, is_narrow)


def _divided(
    task: Task, new: Bracket, wide: type
) -> tuple[Bracket, Float[Array, " arrays"], Float[Array, " arrays"]]:
    """Tells each array what it keeps, once its group has an end.

    The first arrays of a group mark all of the ties that they can.  Also returned are
    the entries in a bracket, and by how many too many reach its low.
    """
    most, least = _sums(task, new.reach_low), _sums(task, new.reach_high)
    is_open = new.kept == _UNKNOWN
    found = is_open & (most.equals(task.kept) | (new.high - 1 <= new.low))
    floors = task.floors.astype(new.low.dtype)
    floored = jnp.maximum(new.reach_high, floors)
    room = counts.of(jnp.maximum(new.reach_low, floors) - floored)
    ties = counts.filled(task.kept - least, room, groups=task.groups).to_integer()
    kept = jnp.where(found, floored + ties.astype(floored.dtype), new.kept)
    none, more = found & (kept == new.reach_high), found & (kept > new.reach_low)
    end, sizes = int(np.iinfo(kept.dtype).max), np.asarray(task.these.sizes, kept.dtype)
    reach_low = jnp.where(more, sizes, new.reach_low)
    own = new._replace(  # a floor is searched for below, by the array itself
        low=jnp.where(none, new.high, jnp.where(more, -end, new.low)),
        high=jnp.where(more, new.low, new.high),
        reach_low=jnp.where(none, new.reach_high, reach_low),
        reach_high=jnp.where(more, new.reach_low, new.reach_high),
        kept=kept,
    )
    entries, above = own.reach_low - own.reach_high, own.reach_low - own.kept
    return (
        own,
        jnp.where(is_open, (most - least).to_float(wide), entries.astype(wide)),
        jnp.where(is_open, (most - task.kept).to_float(wide), above.astype(wide)),
    )


def _with_places(task: Task, old: Bracket) -> Bracket:
    """Goes on with the places of one key, where more entries have it than are kept."""
    none = jnp.iinfo(old.tie.dtype).min
    tied = (old.tie == none) & (old.high - 1 <= old.low)
    tied &= (old.kept != _UNKNOWN) & (old.reach_low > old.kept)
    sizes = np.asarray(task.these.sizes, old.high.dtype)
    return Bracket(
        low=jnp.where(tied, 0, old.low),
        high=jnp.where(tied, sizes, old.high),
        reach_low=jnp.where(tied, old.reach_low - old.reach_high, old.reach_low),
        reach_high=jnp.where(tied, 0, old.reach_high),
        kept=jnp.where(tied, old.kept - old.reach_high, old.kept),
        tie=jnp.where(tied, old.low, old.tie),
    )


def _thresholds(
    bracket: Bracket,
    entries: Float[Array, " arrays"],
    above: Float[Array, " arrays"],
    is_narrow: Bool[Array, " arrays"],
) -> Thresholds:
    """Places the next thresholds: about where the answer is, or evenly.

    Within a few octaves the counts are nearly linear in the key.  The answer is then
    off by the scatter of a sample and by the curvature of the distribution.
    """
    # All of it for every threshold, or each row would be computed in its own kernel.
    shape = (len(entries), _THRESHOLDS)
    low, high, entries, above, is_narrow = (
        jnp.broadcast_to(row[:, None], shape)
        for row in (bracket.low, bracket.high, entries, above, is_narrow)
    )
    dtype = entries.dtype
    octave, end = 1 << (52 if dtype == jnp.float64 else 23), jnp.iinfo(low.dtype).max
    is_wide = (high >> 1) - (low >> 1) >= end // 2
    width = jnp.where(is_wide, end, high - low)  # would overflow
    fifth = np.arange(1, _THRESHOLDS + 1, dtype=low.dtype)[None]
    fifths = lax.div(width, jnp.full_like(width, _THRESHOLDS + 1)) * fifth
    entries = jnp.maximum(entries, 1)
    share = (above + 0.5) / entries
    span = width.astype(dtype)
    scatter = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / entries) / entries)
    curvature = jnp.minimum(span / octave, 1) / 8
    error = jnp.maximum(span * (scatter + curvature), 1)
    guesses = share * span + error * np.asarray([_SPREAD], dtype)
    guesses = jnp.clip(guesses, 0, span).astype(low.dtype)
    linear = is_narrow & (width < 4 * octave)
    places = low + jnp.where(linear, guesses, fifths)
    return jnp.clip(places, low + 1, high - 1)


def _sums(task: Task, numbers: Int[Array, "arrays ..."]) -> Count:
    """Returns for every array the sum over its group, floors taken for granted."""
    alone = [1] * (numbers.ndim - 1)
    floors = task.floors.astype(numbers.dtype).reshape(-1, *alone)
    words = counts.of(jnp.maximum(numbers, floors))
    same = np.equal.outer(task.groups, task.groups)
    same = same.reshape(*same.shape, *alone)
    spread = Count(*(jnp.where(same, word[None], 0) for word in words))
    return counts.total(spread, axis=1)
