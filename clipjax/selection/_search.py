"""The search for a key by its rank: count, and look again between two thresholds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from .._core import sharding
from . import _counts as counts, _keys as ranking
from ._counts import Count
from ._keys import Ranked

_THRESHOLDS = 4  # what a pass can count while it waits for memory
_FIRST = (0.0, 2.0**-9, 2.0**-4, 1.0)  # most parameters lie between the middle two
_SPREAD = (-3, -1, 1, 3)  # where thresholds stand about a guess, in its likely error
_SAMPLE = 1 << 13  # of a group, sorted in a tenth of the time of one pass over 10⁷


class Bracket(NamedTuple):
    """Between which keys the answer lies, for every group: low ≤ answer < high."""

    low: Int[Array, " groups"]
    high: Int[Array, " groups"]
    reach_low: Count  # how many entries reach `low`: at least k
    reach_high: Count  # how many entries reach `high`: fewer than k
    thresholds: Int[Array, "groups n"]  # where to count next, between the two


def search(ranked: Ranked, kept: Count) -> Bracket:
    """Returns where the largest key lies that at least `kept` entries of a group reach.

    The bracket is then exact, or holds a single key; it is above all keys where `kept`
    is zero.
    """
    end = jnp.iinfo(ranked.dtype).max
    none = kept.equals(counts.of(0))
    start = Bracket(
        jnp.where(none, end, -end).astype(ranked.dtype),
        jnp.full_like(kept.high, end, ranked.dtype),
        ranked.sizes(),
        Count(*(jnp.zeros_like(word) for word in kept)),
        _first_thresholds(ranked, kept),
    )
    return close_in(ranked, kept, start)


def answer(ranked: Ranked, kept: Count, bracket: Bracket) -> Int[Array, " groups"]:
    """Returns the one key of each closed or exact bracket that is the answer."""
    lowest, highest = exact(kept, bracket)
    least, most = ranking.ends(ranked, bracket.low, bracket.high)
    result = jnp.where(lowest, least, jnp.where(highest, most, bracket.low))
    return jnp.where(bracket.low < bracket.high - 1, result, bracket.low)


def exact(
    kept: Count, bracket: Bracket
) -> tuple[Bool[Array, " groups"], Bool[Array, " groups"]]:
    """Tells whether the answer is known to be the lowest or the highest key in it.

    It is where just as many entries reach the lower end as are kept, or where one more
    is kept than reach the upper.
    """
    lowest = bracket.reach_low.equals(kept)
    return lowest, (kept - bracket.reach_high).equals(counts.of(1)) & ~lowest


def close_in(ranked: Ranked, kept: Count, bracket: Bracket) -> Bracket:
    """Narrows the bracket of every group until it is exact or holds a single key."""

    def unfinished(bracket):
        lowest, highest = exact(kept, bracket)
        return jnp.any((bracket.low < bracket.high - 1) & ~lowest & ~highest)

    def narrow(old):
        return _narrow(ranked, kept, old)

    if sharding.inside_shard_map():
        # Arrays may differ over devices on which they are ranked one by one.
        kinds = jax.eval_shape(narrow, bracket)
        bracket = jax.tree.map(sharding.varying_as, bracket, kinds)
    # The thresholds are carried: computed where they are used, XLA would compute
    # them once an entry.
    return lax.while_loop(unfinished, narrow, bracket)


def _first_thresholds(ranked: Ranked, kept: Count) -> Int[Array, "groups n"]:
    """Places the first thresholds: by a sample, or where most parameters lie."""
    sizes = [0] * len(kept.high)
    for entries, group in zip(ranked.entries, ranked.groups, strict=True):
        sizes[group] += entries
    if ranked.is_split or max(sizes) <= 8 * _SAMPLE:
        thresholds = ranking.key_of(jnp.asarray(_FIRST, jnp.float32), ranked.dtype)
        return jnp.broadcast_to(thresholds, (len(sizes), _THRESHOLDS))
    samples = ranking.samples(ranked, [max(size // _SAMPLE, 1) for size in sizes])
    return jnp.stack(
        [
            _quantiles(sample, kept.at(group).to_float() / float(max(size, 1)))
            for group, (sample, size) in enumerate(zip(samples, sizes, strict=True))
        ]
    )


def _quantiles(sample: Int[Array, " n"], share: Array) -> Int[Array, " thresholds"]:
    """Returns the keys of a sample that about this share of all entries reaches."""
    share = jnp.clip(share, 0, 1)
    error = jnp.sqrt(len(sample) * share * (1 - share))
    place = len(sample) * (1 - share) + error * jnp.asarray(_SPREAD, jnp.float32)
    place = jnp.clip(place, 0, len(sample) - 1).astype(jnp.int32)
    return jnp.sort(sample)[place]


def _narrow(ranked: Ranked, kept: Count, old: Bracket) -> Bracket:
    """Counts once, and returns the part of the bracket in which the answer lies."""
    reach = ranking.count(ranked, old.thresholds)
    new = old
    for i in range(old.thresholds.shape[1]):
        threshold, here = old.thresholds[:, i], reach.at((slice(None), i))
        enough = here.at_least(kept)
        up, down = enough & (threshold > new.low), ~enough & (threshold < new.high)
        new = Bracket(
            jnp.where(up, threshold, new.low),
            jnp.where(down, threshold, new.high),
            counts.where(up, here, new.reach_low),
            counts.where(down, here, new.reach_high),
            old.thresholds,
        )
    # Halved before they are subtracted: the first bracket is wider than an integer.
    narrowed = new.high // 2 - new.low // 2 <= (old.high // 2 - old.low // 2) // 4
    return new._replace(thresholds=jax.vmap(_thresholds)(new, kept, narrowed))


def _thresholds(
    bracket: Bracket, kept: Count, narrowed: Bool[Array, ""]
) -> Int[Array, " n"]:
    """Places one group's next thresholds: about where the answer is, or evenly.

    Within a few octaves the counts are nearly linear in the key.  The answer is then
    off by the scatter of a sample and by the curvature of the distribution.
    """
    is_double = bracket.low.dtype == jnp.int64
    dtype, octave = (jnp.float64, 1 << 52) if is_double else (jnp.float32, 1 << 23)
    end = jnp.iinfo(bracket.low.dtype).max
    is_wide = bracket.high // 2 - bracket.low // 2 >= end // 2
    width = jnp.where(is_wide, end, bracket.high - bracket.low)  # would overflow
    fifths = (width // 5) * jnp.arange(1, _THRESHOLDS + 1, dtype=width.dtype)
    entries = jnp.maximum((bracket.reach_low - bracket.reach_high).to_float(dtype), 1)
    share = ((bracket.reach_low - kept).to_float(dtype) + dtype(0.5)) / entries
    span = width.astype(dtype)
    scatter = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / entries) / entries)
    curvature = jnp.minimum(span / octave, 1) / 8
    error = jnp.maximum(span * (scatter + curvature), 1)
    guesses = share * span + error * jnp.asarray(_SPREAD, dtype)
    guesses = jnp.clip(guesses, 0, span).astype(width.dtype)
    linear = narrowed & (width < 4 * octave)
    places = bracket.low + jnp.where(linear, guesses, fifths)
    return jnp.clip(places, bracket.low + 1, bracket.high - 1)


def between(
    size: Int[Array, " groups"], ties: Count, open_: Bool[Array, " groups"]
) -> Bracket:
    """Returns the bracket of places in [0, size); closed where there is no search."""
    low = jnp.zeros_like(size)
    middle = jnp.broadcast_to((size // 2)[:, None], (len(size), _THRESHOLDS))
    return Bracket(low, jnp.where(open_, size, 1), ties, counts.of(low), middle)
