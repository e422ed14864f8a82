"""LAMP: how many entries each array keeps, from its scores and without sorting them.

The score of LAMP grows with the score itself within an array.  So what an array keeps
is all above some threshold, and it is enough to find the thresholds.  All arrays are
searched at once: one pass counts, and sums squares, at a few thresholds of each array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .. import norms
from .._core import checks as check, sharding, trees
from .._core.types import AxisName
from ..selection import _counts as counts, _reductions as passes
from ..selection._counts import Count
from ..selection._keys import Magnitude
from ._budget import Allocation, kept_of
from ._compared import Grouping, apart, given

_THRESHOLDS = 4  # of each array in one pass
_END = 0x40000001  # above the bits of 2.0


def lamp(*, floor: int = 1) -> Allocation:
    """Keeps the entries whose square is the largest share of what would still be there.

    aᵢ = sᵢ² / Σ_{j: sⱼ ≥ sᵢ} sⱼ² within each array; the k = N - ⌈s·N⌉ highest aᵢ of all
    arrays stay

    No array dies, since the highest score of each has a = 1.  The total is exact.
    Nothing is sorted: some 20 passes over the scores, with all-reduces of a few numbers
    for each array where these are split.  Equal scores of one array have one a, and the
    first of them stay.  Meant for scores that are not negative; negative ones and NaN
    count as zero.  Sums of squares are rounded to float32, so arrays that compete for
    one last entry may trade it on another number of devices.

    Args:
        floor: entries that every array keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = [jnp.array([4.0, 3.0, 3.0]), jnp.array([0.3, 0.4, 0.001])]
        >>> clipjax.allocations.lamp()(
        ...     ["a", "b"], [(3,), (3,)], 0.5, scores
        ... )  # a: 1 .26 .26 and .36 1 0
        Array([1, 2], dtype=int32)

    Reference:
        Jaeho Lee, Sejun Park, Sangwoo Mo, Sungsoo Ahn, Jinwoo Shin, Layer-adaptive
        Sparsity for the Magnitude-based Pruning, 2020, https://arxiv.org/abs/2010.07611
    """
    check.whole(0, floor=floor)
    return _Lamp(floor)


@dataclasses.dataclass(frozen=True)
class _Lamp(Grouping):
    floor: int

    def grouped(self, paths, shapes, sparsity, scores, axis_name):
        """Returns the scores as they are, and how many of each array to keep."""
        del paths, shapes
        check.between(0, 1, sparsity=sparsity)
        arrays = [_Scaled.of(x, axis_name) for x in given("lamp", scores)]
        floors = [min(self.floor, x.entries) for x in arrays]
        wanted = kept_of(sparsity, sum(x.entries for x in arrays), sum(floors))
        return apart(scores, _kept(arrays, wanted, counts.of(floors)))


class _Scaled(NamedTuple):
    """The scores of one array, and by what they are divided to lie in [0, 2)."""

    x: Array
    unit: Float[Array, ""]
    entries: int  # on all devices
    axis_name: AxisName

    @classmethod
    def of(cls, scores: Array | Magnitude, axis_name: AxisName) -> "_Scaled":
        """Scales magnitudes as what they are the magnitudes of."""
        x = jnp.abs(scores.x) if isinstance(scores, Magnitude) else scores
        usable = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        peak = norms.inf_norm(usable, axis_name=axis_name).astype(jnp.float32)
        entries = x.size * sharding.blocks(x, axis_name)
        return cls(x, trees.power_of_two(peak), entries, axis_name)

    def at(self, thresholds: Int[Array, " n"]) -> tuple[Count, Float[Array, " n"]]:
        """Returns how many entries reach each threshold, and what LAMP gives there.

        Thresholds are float32 read as integers, which keeps their order.
        """
        x = trees.wide(self.x)
        x = (x / self.unit.astype(x.dtype)).astype(jnp.float32)
        x = jnp.where(x > 0, jnp.minimum(x, 2), 0)  # NaN too becomes zero
        keys = lax.bitcast_convert_type(x, jnp.int32)
        here = [keys >= least for least in thresholds]
        reach = counts.of(passes.passing(here))
        mass = jnp.stack([jnp.sum(jnp.where(h, x * x, 0)) for h in here])
        if axes := sharding.axes_of(x, self.axis_name):
            reach = counts.normal(*lax.psum(tuple(reach), axes))
            mass = lax.psum(mass, axes)
        value = lax.bitcast_convert_type(thresholds, jnp.float32)
        # Above all scores nothing is left; an array of zeros has no share.
        share = jnp.where(
            mass > 0, value * value / jnp.where(mass > 0, mass, 1), jnp.inf
        )
        return reach, lax.cummax(jnp.where(value > 0, share, 0))


class _Ends(NamedTuple):
    """Between which keys the threshold of each array lies: low ≤ key < high."""

    low: Int[Array, " arrays"]
    high: Int[Array, " arrays"]
    reach_low: Count  # over all arrays at least as many as are wanted
    reach_high: Count  # and fewer


def _kept(arrays: list[_Scaled], wanted: Count, floors: Count) -> Count:
    """Returns how many entries of each array are among those that are wanted."""

    def at(thresholds):
        found = [x.at(t) for x, t in zip(arrays, thresholds, strict=True)]
        reach = counts.stack([count for count, _ in found])
        least = Count(*(jnp.broadcast_to(w[:, None], reach.low.shape) for w in floors))
        shares = jnp.stack([share for _, share in found])
        return counts.where(reach.at_least(least), reach, least), shares

    start = _Ends(
        jnp.zeros(len(arrays), jnp.int32),
        jnp.full(len(arrays), _END, jnp.int32),
        counts.of([x.entries for x in arrays]),
        floors,
    )
    ends = lax.while_loop(
        lambda ends: jnp.any(ends.high - ends.low > 1),
        lambda ends: _closer(ends, wanted, at),
        start,
    )
    _, shares = at(ends.low[:, None])
    return _shared_out(ends, wanted, jnp.argsort(-shares[:, 0], stable=True))


def _closer(
    ends: _Ends,
    wanted: Count,
    at: Callable[[Array], tuple[Count, Array]],
) -> _Ends:
    """Counts once, and brings the ends of at least one array closer."""
    width = ends.high - ends.low
    is_open = (width > 1)[:, None]
    place = jnp.arange(1, _THRESHOLDS + 1, dtype=jnp.int32)[None]
    steps = jnp.maximum(width // (_THRESHOLDS + 1), 1)[:, None] * place
    keys = ends.low[:, None] + jnp.clip(steps, 0, jnp.maximum(width - 1, 0)[:, None])
    reach, shares = at(keys)
    keys = _framed(ends.low, keys, ends.high)
    frame = zip(ends.reach_low, reach, ends.reach_high, strict=True)
    reach = Count(*(_framed(*words) for words in frame))

    # Each share at hand is tried: how many entries have it or more, at least, at most.
    tried = shares.reshape(-1)
    below = jnp.sum(shares[None] < tried[:, None, None], -1, dtype=jnp.int32)
    upto = jnp.sum(shares[None] <= tried[:, None, None], -1, dtype=jnp.int32)
    row = jnp.arange(len(width), dtype=jnp.int32)[None]
    upto = jnp.where(is_open[:, 0][None], upto, below + 1)  # of one key, all or none
    least = counts.total(reach.at((row, below + 1)), axis=1)
    most = counts.total(reach.at((row, upto)), axis=1)
    is_tried = jnp.broadcast_to(is_open, shares.shape).reshape(-1)
    enough = is_tried & least.at_least(wanted)
    few = is_tried & ~most.at_least(wanted)
    floor = jnp.max(jnp.where(enough, tried, -jnp.inf))
    cap = jnp.min(jnp.where(few, tried, jnp.inf))

    low = _sum(shares < floor) + jnp.minimum(_sum(shares == floor), 1)
    high = _sum(shares <= cap) + 1 - jnp.minimum(_sum(shares == cap), 1)
    low = jnp.where(jnp.any(enough) & is_open[:, 0], low, 0)
    high = jnp.where(jnp.any(few) & is_open[:, 0], high, _THRESHOLDS + 1)
    return _between(keys, reach, low, high)


def _between(keys: Array, reach: Count, low: Array, high: Array) -> _Ends:
    """Returns the ends at two columns, or closer where no entry lies between."""
    row = jnp.arange(len(keys), dtype=jnp.int32)
    at_low, at_high = reach.at((row, low)), reach.at((row, high))

    def as_column(count):
        return Count(*(word[:, None] for word in count))

    high = _sum(~as_column(at_high).at_least(reach))
    low = jnp.minimum(_sum(reach.at_least(as_column(at_low))) - 1, high)
    return _Ends(keys[row, low], keys[row, high], at_low, at_high)


def _shared_out(ends: _Ends, wanted: Count, order: Int[Array, " arrays"]) -> Count:
    """Gives what is still wanted to the last key of each array, in this order."""
    left = wanted - counts.total(ends.reach_high)
    most = ends.reach_low - ends.reach_high
    return counts.plus(ends.reach_high, counts.filled(left, most, order=order))


def _framed(first: Array, middle: Array, last: Array) -> Array:
    """Puts a column in front of the others and one behind."""
    return jnp.concatenate([first[:, None], middle, last[:, None]], axis=1)


def _sum(marked: Bool[Array, "arrays n"]) -> Int[Array, " arrays"]:
    return jnp.sum(marked, 1, dtype=jnp.int32)
