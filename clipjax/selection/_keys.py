"""Entries as integers in the order of their rank, counted in one pass over memory.

A pass makes the integers anew from the floats, which is cheaper than to write them and
read them again.  XLA has to be kept from doing so once, before a loop of passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from .._core import sharding
from .._core.types import AxisName
from . import _reductions as passes

_MOST = 2**31 - 2  # entries of one array, so that places fit an int32


class Magnitude(NamedTuple):
    """The scores |x|, as `magnitude` gives them, but never written to memory.

    Args:
        x: what is compared by its magnitude, in place of an array of scores.
    """

    x: Array


class Candidates(NamedTuple):
    """Arrays whose entries are ranked, or the magnitudes of these."""

    scores: Sequence[Array | Magnitude]
    axis_name: AxisName
    dtype: Any  # of the keys
    sizes: tuple[int, ...]  # entries of each array, over all devices

    def is_split(self) -> bool:
        """Tells whether an array may lie on several devices."""
        arrays = map(array_of, self.scores)
        return bool(self.axis_name) or any(map(sharding.is_partitioned, arrays))

    def keys(self, i: int, after: Array) -> Int[Array, "..."]:
        """Makes the keys of an array anew; `after` is what the pass depends on."""
        own = self.scores[i]
        x, _ = lax.optimization_barrier((array_of(own), after))
        key = magnitude_key if isinstance(own, Magnitude) else key_of
        return key(x, self.dtype)


def candidates(scores: Sequence[Array | Magnitude], axis_name: AxisName) -> Candidates:
    """Returns arrays that can be ranked together."""
    arrays = [array_of(x) for x in scores]
    is_double = any(x.dtype in (jnp.float64, jnp.complex128) for x in arrays)
    sizes = tuple(x.size * sharding.blocks(x, axis_name) for x in arrays)
    largest = max(sizes, default=0)
    if largest > _MOST:
        raise ValueError(
            f"An array of {largest} entries is too large to be ranked: at most {_MOST}."
            " Split it along its first axis."
        )
    return Candidates(scores, axis_name, jnp.int64 if is_double else jnp.int32, sizes)


def array_of(scores: Array | Magnitude) -> Array:
    """Returns the array that is read."""
    return scores.x if isinstance(scores, Magnitude) else scores


def key_of(x: Float[Array, "..."], dtype: Any) -> Int[Array, "..."]:
    """Maps floats to integers of the same order: -0.0 to 0.0, NaN below all."""
    bits = lax.bitcast_convert_type(x.astype(_floating(dtype)), dtype)
    magnitude = magnitude_key(x, dtype)
    return jnp.where((bits < 0) & (magnitude >= 0), -magnitude, magnitude)


def magnitude_key(x: Num[Array, "..."], dtype: Any) -> Int[Array, "..."]:
    """Maps magnitudes to integers of the same order, NaN below all."""
    x = (jnp.abs(x) if jnp.iscomplexobj(x) else x).astype(_floating(dtype))
    end = jnp.iinfo(dtype).max
    magnitude = lax.bitcast_convert_type(x, dtype) & end
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), dtype)
    return jnp.where(magnitude > infinity, -end, magnitude)


def _floating(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.int64 else jnp.float32


def value_of(key: Int[Array, ""]) -> Float[Array, ""]:
    """Turns the key of a float back into that float."""
    value = lax.bitcast_convert_type(jnp.abs(key), _floating(key.dtype))
    return jnp.where(key < 0, -value, value)


def places(x: Array, axis_name: AxisName, zero: Array) -> Int[Array, "..."]:
    """Numbers the entries in the order of their indices, device after device.

    Args:
        x: the array.
        axis_name: inside `jax.shard_map`, the mesh axes over which it is split.
        zero: a condition that does not hold, but for all that XLA knows might from some
            pass on; else it would number once, before all passes, and write that.
    """
    device = zero.astype(jnp.int32)
    for name in sharding.axes_of(x, axis_name):
        device = device * lax.axis_size(name) + lax.axis_index(name)
    place = jnp.broadcast_to(device, x.shape)
    for axis, length in enumerate(x.shape):
        place = place * length + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return sharding.like(place, x)


def reached(
    these: Candidates,
    thresholds: Int[Array, "arrays n"],
    tie: Int[Array, " arrays"] | None,
) -> Int[Array, "arrays n"]:
    """Counts in every array the keys that reach each of its thresholds.

    Where a key is tied, its entries rank by their place, the first highest, and all
    others below them.
    """
    numbers: dict[int, Array] = {}
    split: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(these.sizes)):
        keys = these.keys(i, thresholds)
        if tie is not None:  # the least integer if no key is tied
            none = tie[i] == jnp.iinfo(keys.dtype).min
            rank = these.sizes[i] - 1 - places(keys, these.axis_name, none)
            rank = jnp.where(keys == tie[i], rank.astype(keys.dtype), -1)
            keys = jnp.where(none, keys, rank)
        numbers[i] = passes.passing([keys >= least for least in thresholds[i]])
        split.setdefault(sharding.axes_of(keys, these.axis_name), []).append(i)
    for axes, own in split.items():  # one collective for all arrays
        if axes:
            summed = lax.psum(jnp.stack([numbers[i] for i in own]), axes)
            numbers |= dict(zip(own, summed, strict=True))
    return jnp.stack([numbers[i] for i in range(len(numbers))]).astype(these.dtype)


def least_from(these: Candidates, low: Int[Array, " arrays"]) -> Int[Array, " arrays"]:
    """Returns the least key of each array that reaches `low`."""
    low = lax.optimization_barrier(low)
    return jnp.stack([_least_from(these, i, low) for i in range(len(these.sizes))])


def _least_from(
    these: Candidates, i: int, low: Int[Array, " arrays"]
) -> Int[Array, ""]:
    keys, end = these.keys(i, low), jnp.iinfo(these.dtype).max
    keys = jnp.where(keys >= low[i], keys, end)
    if sharding.is_partitioned(keys):
        least = jnp.min(keys, initial=end)
    else:  # two are faster than one

        def merge(left, right):
            return lax.min(left[0], right[0]), lax.max(left[1], right[1])

        ends = np.asarray(end, keys.dtype), np.asarray(-end, keys.dtype)
        least, _ = passes.reduce((keys, keys), ends, merge)
    return sharding.over(lax.pmin, least, keys, these.axis_name)


def sample(these: Candidates, members: Sequence[int], size: int) -> Int[Array, " n"]:
    """Returns so many keys of some arrays together, of each its share."""
    members = [i for i in members if these.sizes[i]]
    if not members:
        return jnp.zeros(size, these.dtype)
    ends = np.cumsum([these.sizes[i] for i in members])
    ends = ends * size // ends[-1]
    parts = []
    for i, number in zip(members, np.diff(ends, prepend=0).tolist(), strict=True):
        own, most = these.scores[i], these.sizes[i]
        # An odd step visits all columns of a matrix with a power of two of them.
        step = max((most // max(number, 1) - 1) | 1, 1)
        x = array_of(own).reshape(-1)
        x = x[: number * step : step] if number <= most else jnp.resize(x, number)
        key = magnitude_key if isinstance(own, Magnitude) else key_of
        parts.append(key(x, these.dtype))
    return jnp.concatenate(parts)
