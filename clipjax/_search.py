"""The search for a key by its rank: count, and look again between two thresholds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from . import _counts as counts, _ranking as ranking
from ._counts import Count
from ._ranking import Ranked

_THRESHOLDS = 4  # what a pass can count while it waits for memory
_FIRST = (0.0, 2.0**-9, 2.0**-4, 1.0)  # most parameters lie between the middle two


class Bracket(NamedTuple):
    """Between which keys the answer lies, for every group: low ≤ answer < high."""

    low: Int[Array, " groups"]
    high: Int[Array, " groups"]
    reach_low: Count  # how many entries reach `low`: at least k
    reach_high: Count  # how many entries reach `high`: fewer than k
    thresholds: Int[Array, "groups n"]  # where to count next, between the two


def search(ranked: Ranked, kept: Count) -> Int[Array, " groups"]:
    """Returns the largest key that at least `kept` entries of the group reach.

    Above all keys where `kept` is zero.
    """
    end = jnp.iinfo(ranked.dtype).max
    none = kept.equals(counts.of(0))
    thresholds = ranking.key_of(jnp.asarray(_FIRST, jnp.float32), ranked.dtype)
    start = Bracket(
        jnp.where(none, end, -end).astype(ranked.dtype),
        jnp.full_like(kept.high, end, ranked.dtype),
        ranked.sizes(),
        Count(*(jnp.zeros_like(word) for word in kept)),
        jnp.broadcast_to(thresholds, (len(none), len(thresholds))),
    )
    return close_in(ranked, kept, start)


def close_in(ranked: Ranked, kept: Count, bracket: Bracket) -> Int[Array, " groups"]:
    """Narrows the bracket of every group down to a single key."""

    def exact(bracket):
        """Has it just as many entries above, or one less: the answer is at its end."""
        enough = bracket.reach_low.equals(kept)
        return enough, (kept - bracket.reach_high).equals(counts.of(1)) & ~enough

    def unfinished(bracket):
        lowest, highest = exact(bracket)
        return jnp.any((bracket.low < bracket.high - 1) & ~lowest & ~highest)

    # The thresholds are carried: computed where they are used, XLA would compute
    # them once an entry.
    def look(bracket):
        return _narrow(ranked, kept, bracket)

    bracket = lax.while_loop(unfinished, look, bracket)
    lowest, highest = exact(bracket)
    least, most = ranking.ends(ranked, bracket.low, bracket.high)
    answer = jnp.where(lowest, least, jnp.where(highest, most, bracket.low))
    return jnp.where(bracket.low < bracket.high - 1, answer, bracket.low)


def _narrow(ranked: Ranked, kept: Count, old: Bracket) -> Bracket:
    """Counts once, and returns the part of the bracket in which the answer lies."""
    reach = ranking.count(ranked, old.thresholds)
    new = old
    for i in range(old.thresholds.shape[1]):
        threshold, here = old.thresholds[:, i], Count(*(word[:, i] for word in reach))
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
    width = bracket.high - bracket.low
    fifths = (width // 5) * jnp.arange(1, _THRESHOLDS + 1, dtype=width.dtype)
    entries = jnp.maximum((bracket.reach_low - bracket.reach_high).to_float(dtype), 1)
    share = ((bracket.reach_low - kept).to_float(dtype) + dtype(0.5)) / entries
    span = width.astype(dtype)
    scatter = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / entries) / entries)
    curvature = jnp.minimum(span / octave, 1) / 8
    error = jnp.maximum(span * (scatter + curvature), 1)
    guesses = share * span + error * jnp.asarray([-3, -1, 1, 3], dtype)
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
