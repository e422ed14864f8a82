"""The search for the highest entries: count, and look again between two thresholds.

One loop for all arrays.  A group of several arrays is searched with one threshold for
all of them, until it is known how many entries each array keeps.  Then every array goes
on by itself: values first, and where more entries are equal than are kept, places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

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


class Bracket(NamedTuple):
    """Between which keys the answer of every array lies: low ≤ answer < high."""

    low: Numbers
    high: Numbers
    reach_low: Numbers  # how many entries reach `low`: as many as are kept, or more
    reach_high: Numbers  # how many entries reach `high`: fewer
    kept: Numbers  # unknown as long as the group is searched as a whole
    tie: Numbers  # the key whose entries are ranked by place; the least integer: none
    thresholds: Int[Array, "arrays n"]  # where to count next, between low and high


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

    @property
    def sizes(self) -> Numbers:
        """Returns the entries of each array."""
        return jnp.asarray(self.these.sizes, jnp.int32)


class Ends(NamedTuple):
    """From which key on entries are marked; of that key, those before a place."""

    key: Numbers
    place: Numbers


def search(task: Task) -> Ends:
    """Returns where the highest entries of each array end."""

    def unfinished(bracket):
        exact = bracket.reach_low == bracket.kept
        return jnp.any(~exact & (bracket.low < bracket.high - 1))

    def narrow(bracket):
        return _narrowed(task, bracket)

    start = _start(task)
    if sharding.inside_shard_map():
        # Arrays may differ over devices on which they are ranked one by one.
        kinds = jax.eval_shape(narrow, start)
        start = jax.tree.map(sharding.varying_as, start, kinds)
    # The thresholds are carried: computed where they are used, XLA would compute
    # them once an entry.
    end = lax.while_loop(unfinished, narrow, start)
    tied = end.tie != jnp.iinfo(task.these.dtype).min
    return Ends(
        jnp.where(tied, end.tie, end.low),
        jnp.where(tied, task.sizes - end.low.astype(jnp.int32), task.sizes),
    )


def _start(task: Task) -> Bracket:
    dtype = task.these.dtype
    end, none = jnp.iinfo(dtype).max, task.kept.equals(counts.of(0))
    kept = _integer(task.kept)
    return Bracket(
        low=jnp.where(none, end, -end).astype(dtype),
        high=jnp.full_like(kept, end, dtype),
        reach_low=jnp.where(none, 0, task.sizes),
        reach_high=jnp.zeros_like(kept),
        kept=jnp.full_like(kept, _UNKNOWN) if task.competes else kept,
        tie=jnp.full_like(kept, -end - 1, dtype),
        thresholds=_first_thresholds(task),
    )


def _first_thresholds(task: Task) -> Int[Array, "arrays n"]:
    """Places the first thresholds: by a sample, or where most parameters lie."""
    these = task.these
    sizes = dict.fromkeys(task.groups, 0)
    for group, size in zip(task.groups, these.sizes, strict=True):
        sizes[group] += size
    if these.is_split() or max(sizes.values()) <= 8 * _SAMPLE:
        thresholds = ranking.key_of(jnp.asarray(_FIRST, jnp.float32), these.dtype)
        return jnp.broadcast_to(thresholds, (len(task.groups), _THRESHOLDS))
    found = {}
    for group, size in sizes.items():
        members = [i for i, other in enumerate(task.groups) if other == group]
        sample = ranking.sample(these, members, max(size // _SAMPLE, 1))
        share = task.kept.at(members[0]).to_float() / float(max(size, 1))
        found[group] = _quantiles(sample, share)
    return jnp.stack([found[group] for group in task.groups])


def _quantiles(sample: Int[Array, " n"], share: Array) -> Int[Array, " thresholds"]:
    """Returns the keys of a sample that about this share of all entries reaches."""
    share = jnp.clip(share, 0, 1)
    error = jnp.sqrt(len(sample) * share * (1 - share))
    place = len(sample) * (1 - share) + error * jnp.asarray(_SPREAD, jnp.float32)
    place = jnp.clip(place, 0, len(sample) - 1).astype(jnp.int32)
    return jnp.sort(sample)[place]


def _narrowed(task: Task, old: Bracket) -> Bracket:
    """Counts once, and returns the part of each bracket in which the answer lies."""
    tie = old.tie if task.by_place else None
    reach = ranking.reached(task.these, old.thresholds, tie)
    enough = reach >= old.kept[:, None]
    if task.competes:
        together = _sums(task, reach).at_least(task.kept.at((slice(None), None)))
        enough = jnp.where((old.kept == _UNKNOWN)[:, None], together, enough)
    low, reach_low = old.low[:, None], old.reach_low[:, None]
    high, reach_high = old.high[:, None], old.reach_high[:, None]
    new = old._replace(
        low=jnp.max(jnp.where(enough, jnp.maximum(old.thresholds, low), low), 1),
        high=jnp.min(jnp.where(enough, high, jnp.minimum(old.thresholds, high)), 1),
        reach_low=jnp.min(jnp.where(enough, reach, reach_low), 1),
        reach_high=jnp.max(jnp.where(enough, reach_high, reach), 1),
    )
    new, entries, above = _divided(task, new) if task.competes else _counted(task, new)
    new = _with_places(task, new) if task.by_place else new
    # Halved before they are subtracted: the first bracket is wider than an integer.
    is_narrow = new.high // 2 - new.low // 2 <= (old.high // 2 - old.low // 2) // 4
    return new._replace(thresholds=_thresholds(new, entries, above, is_narrow))


def _counted(task: Task, new: Bracket) -> tuple[Bracket, Array, Array]:
    """Also returns the entries in a bracket, and by how many too many reach its low."""
    dtype = _float(task)
    entries = (new.reach_low - new.reach_high).astype(dtype)
    return new, entries, (new.reach_low - new.kept).astype(dtype)


def _divided(task: Task, new: Bracket) -> tuple[Bracket, Array, Array]:
    """Does so too, and tells each array what it keeps, once its group has an end.

    The first arrays of a group mark all of the ties that they can.
    """
    most, least = _sums(task, new.reach_low), _sums(task, new.reach_high)
    is_open = new.kept == _UNKNOWN
    found = is_open & (most.equals(task.kept) | (new.high - 1 <= new.low))
    floored = jnp.maximum(new.reach_high, task.floors)
    room = counts.of(jnp.maximum(new.reach_low, task.floors) - floored)
    ties = counts.filled(task.kept - least, room, groups=task.groups)
    kept = jnp.where(found, floored + _integer(ties), new.kept)
    none, more = found & (kept == new.reach_high), found & (kept > new.reach_low)
    end = jnp.iinfo(new.low.dtype).max
    own = new._replace(  # a floor is searched for below, by the array itself
        low=jnp.where(none, new.high, jnp.where(more, -end, new.low)),
        high=jnp.where(more, new.low, new.high),
        reach_low=jnp.where(
            none, new.reach_high, jnp.where(more, task.sizes, new.reach_low)
        ),
        reach_high=jnp.where(more, new.reach_low, new.reach_high),
        kept=kept,
    )
    own, entries, above = _counted(task, own)
    entries = jnp.where(is_open, (most - least).to_float(entries.dtype.type), entries)
    above = jnp.where(is_open, (most - task.kept).to_float(above.dtype.type), above)
    return own, entries, above


def _with_places(task: Task, old: Bracket) -> Bracket:
    """Goes on with the places of one key, where more entries have it than are kept."""
    none = jnp.iinfo(old.tie.dtype).min
    tied = (old.tie == none) & (old.high - 1 <= old.low)
    tied &= (old.kept != _UNKNOWN) & (old.reach_low > old.kept)
    return Bracket(
        low=jnp.where(tied, 0, old.low),
        high=jnp.where(tied, task.sizes.astype(old.high.dtype), old.high),
        reach_low=jnp.where(tied, old.reach_low - old.reach_high, old.reach_low),
        reach_high=jnp.where(tied, 0, old.reach_high),
        kept=jnp.where(tied, old.kept - old.reach_high, old.kept),
        tie=jnp.where(tied, old.low, old.tie),
        thresholds=old.thresholds,
    )


def _thresholds(
    bracket: Bracket, entries: Array, above: Array, is_narrow: Bool[Array, " arrays"]
) -> Int[Array, "arrays n"]:
    """Places the next thresholds: about where the answer is, or evenly.

    Within a few octaves the counts are nearly linear in the key.  The answer is then
    off by the scatter of a sample and by the curvature of the distribution.
    """
    low, high, dtype = bracket.low, bracket.high, entries.dtype
    octave, end = 1 << (52 if dtype == jnp.float64 else 23), jnp.iinfo(low.dtype).max
    is_wide = high // 2 - low // 2 >= end // 2
    width = jnp.where(is_wide, end, high - low)  # would overflow
    fifth = np.arange(1, _THRESHOLDS + 1, dtype=low.dtype)[None]
    fifths = (width // (_THRESHOLDS + 1))[:, None] * fifth
    entries = jnp.maximum(entries, 1)
    share = (above + 0.5) / entries
    span = width.astype(dtype)
    scatter = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / entries) / entries)
    curvature = jnp.minimum(span / octave, 1) / 8
    error = jnp.maximum(span * (scatter + curvature), 1)
    spread = np.asarray(_SPREAD, dtype)[None]
    guesses = (share * span)[:, None] + error[:, None] * spread
    guesses = jnp.clip(guesses, 0, span[:, None]).astype(low.dtype)
    linear = is_narrow & (width < 4 * octave)
    places = low[:, None] + jnp.where(linear[:, None], guesses, fifths)
    return jnp.clip(places, low[:, None] + 1, high[:, None] - 1)


def _float(task: Task) -> Any:
    return jnp.float64 if task.these.dtype == jnp.int64 else jnp.float32


def _sums(task: Task, numbers: Int[Array, "arrays ..."]) -> Count:
    """Returns for every array the sum over its group, floors taken for granted."""
    alone = [1] * (numbers.ndim - 1)
    words = counts.of(jnp.maximum(numbers, task.floors.reshape(-1, *alone)))
    same = np.equal.outer(task.groups, task.groups)
    same = same.reshape(*same.shape, *alone)
    spread = Count(*(jnp.where(same, word[None], 0) for word in words))
    return counts.total(spread, axis=1)


def _integer(count: Count) -> Int[Array, "..."]:
    return (count.high << 16) + count.low
