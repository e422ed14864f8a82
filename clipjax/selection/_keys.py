"""Entries as integers in the order of their rank, counted in one pass over memory.

A pass makes the integers anew from the floats, which is cheaper than to write them and
read them again.  XLA has to be kept from doing so once, before a loop of passes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from .._core import sharding
from .._core.types import AxisName
from . import _counts as counts, _reductions as passes
from ._counts import Count

_MOST = 2**31 - 2  # entries of one array, so that places fit an int32

Keys = Callable[[Array], Int[Array, "..."]]
"""Makes the keys of one array; the argument is any value that the pass depends on."""


class Magnitude(NamedTuple):
    """The scores |x|, as `magnitude` gives them, but never written to memory.

    Args:
        x: what is compared by its magnitude, in place of an array of scores.
    """

    x: Array


class Ranked(NamedTuple):
    """Entries as integers in the order of their rank, in groups."""

    keys: list[Keys]
    groups: tuple[int, ...]
    axis_name: AxisName
    dtype: Any
    entries: tuple[int, ...]  # of each array, over all devices
    is_split: bool  # an array may lie on several devices

    def sizes(self) -> Count:
        """Returns the entries of every group."""
        sizes = [0] * (max(self.groups) + 1)
        for entries, group in zip(self.entries, self.groups, strict=True):
            sizes[group] += entries
        return counts.of(sizes)


def ranked(
    scores: Sequence[Array | Magnitude], groups: Sequence[int], axis_name: AxisName
) -> Ranked:
    """Ranks arrays by their entries, or by the magnitudes of these."""
    makers = [magnitude_key if isinstance(x, Magnitude) else key_of for x in scores]
    arrays = [x.x if isinstance(x, Magnitude) else x for x in scores]
    is_double = any(x.dtype in (jnp.float64, jnp.complex128) for x in arrays)
    dtype = jnp.int64 if is_double else jnp.int32
    entries = tuple(x.size * sharding.blocks(x, axis_name) for x in arrays)
    largest = max(entries, default=0)
    if largest > _MOST:
        raise ValueError(
            f"An array of {largest} entries is too large to be ranked: at most {_MOST}."
            " Split it along its first axis."
        )
    keys = [
        functools.partial(_anew, key, x, dtype)
        for key, x in zip(makers, arrays, strict=True)
    ]
    is_split = bool(axis_name) or any(sharding.is_partitioned(x) for x in arrays)
    return Ranked(keys, tuple(groups), axis_name, dtype, entries, is_split)


def _anew(
    key: Callable[[Array, Any], Array], x: Array, dtype: Any, after: Array
) -> Int[Array, "..."]:
    x, _ = lax.optimization_barrier((x, after))
    return key(x, dtype)


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


def ahead(make: Keys, mask: Bool[Array, "..."], after: Array) -> Int[Array, "..."]:
    """Ranks what is marked before all the rest."""
    keys = make(after)
    return jnp.where(mask, jnp.iinfo(keys.dtype).max - 1, keys)


def count(ranked: Ranked, thresholds: Int[Array, "groups n"]) -> Count:
    """Counts in every group the keys that reach each of its thresholds."""
    reach: dict[tuple[str, ...], list] = {}
    for make, group in zip(ranked.keys, ranked.groups, strict=True):
        key = make(thresholds)
        axes = sharding.axes_of(key, ranked.axis_name)
        passing = counts.passing([key >= least for least in thresholds[group]])
        reach.setdefault(axes, []).append((group, passing))
    parts = []
    for axes, found in reach.items():  # one collective for all arrays
        every = counts.of(jnp.stack([number for _, number in found]))
        part = _per_group(every, [group for group, _ in found], len(thresholds))
        parts.append(counts.normal(*lax.psum(tuple(part), axes)) if axes else part)
    return counts.total(counts.stack(parts))


def _per_group(every: Count, index: list[int], groups: int) -> Count:
    """Adds up the counts of the arrays of each group."""
    if index == list(range(groups)):  # each array is its own group
        return every
    own = [[i for i, g in enumerate(index) if g == group] for group in range(groups)]
    pick = [Count(*(word[np.asarray(i, int)] for word in every)) for i in own]
    return counts.stack([counts.total(count) for count in pick])


def samples(ranked: Ranked, strides: Sequence[int]) -> list[Int[Array, " n"]]:
    """Returns of every group about every so manieth key, without reading the others."""
    parts: list[list[Array]] = [[jnp.zeros(1, ranked.dtype)] for _ in strides]
    for make, group in zip(ranked.keys, ranked.groups, strict=True):
        key, stride = make(jnp.zeros([])), strides[group]
        steps = []
        for length in key.shape:  # whole rows, as far as possible
            steps.append(slice(None, None, max(min(stride, length), 1)))
            stride //= max(min(stride, length), 1)
        parts[group].append(key[tuple(steps)].reshape(-1))
    return [jnp.concatenate(own) for own in parts]


def first_places(
    ranked: Ranked, keys: Int[Array, " arrays"]
) -> tuple[Int[Array, " arrays"], Count]:
    """Returns where each array first holds a key, and how often it does."""
    first, often = [], []
    for i, (make, size) in enumerate(zip(ranked.keys, ranked.entries, strict=True)):
        key = make(keys)
        place = places(key, ranked.axis_name)
        least, number = _first_and_count(key == keys[i], place, size)
        first.append(sharding.over(lax.pmin, least, key, ranked.axis_name))
        often.append(sharding.over(lax.psum, number, key, ranked.axis_name))
    return jnp.stack(first), counts.of(jnp.stack(often))


def _first_and_count(
    here: Bool[Array, "..."], place: Int[Array, "..."], size: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns the least place that is marked, and how many are."""
    place = jnp.where(here, place, size)
    if sharding.is_partitioned(place):
        return jnp.min(place, initial=size), jnp.sum(here, dtype=jnp.int32)

    def merge(left, right):
        return lax.min(left[0], right[0]), left[1] + right[1]

    start = (np.int32(size), np.int32(0))
    least, number = passes.reduce((place, here.astype(jnp.int32)), start, merge)
    return least, number


def places(x: Array, axis_name: AxisName) -> Int[Array, "..."]:
    """Numbers the entries in the order of their indices, device after device."""
    place = jnp.zeros(x.shape, jnp.int32)
    for axis, length in enumerate(x.shape):
        place = place * length + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    device = jnp.int32(0)
    for name in sharding.axes_of(x, axis_name):
        device = device * lax.axis_size(name) + lax.axis_index(name)
    return sharding.like(place, x) + device * jnp.int32(x.size)


def ends(
    ranked: Ranked, low: Int[Array, " groups"], high: Int[Array, " groups"]
) -> tuple[Array, Array]:
    """Returns of every group the least key from `low` on, the most below `high`."""
    result = [jnp.full(2, -jnp.iinfo(ranked.dtype).max, ranked.dtype)] * len(low)
    for make, group in zip(ranked.keys, ranked.groups, strict=True):
        key = make(low)
        peaks = _peaks(key, low[group], high[group])
        peaks = sharding.over(lax.pmax, peaks, key, ranked.axis_name)
        result[group] = jnp.maximum(result[group], peaks)
    return -jnp.stack(result)[:, 0], jnp.stack(result)[:, 1]


def _peaks(
    key: Int[Array, "..."], low: Int[Array, ""], high: Int[Array, ""]
) -> Int[Array, " 2"]:
    """Returns -(the least key from `low` on) and the greatest below `high`."""
    end = jnp.asarray(jnp.iinfo(key.dtype).max, key.dtype)
    least, most = jnp.where(key >= low, -key, -end), jnp.where(key < high, key, -end)
    if sharding.is_partitioned(key):
        return jnp.stack([jnp.max(x, initial=-end) for x in (least, most)])

    def merge(left, right):
        return tuple(lax.max(a, b) for a, b in zip(left, right, strict=True))

    start = (-np.asarray(jnp.iinfo(key.dtype).max, key.dtype),) * 2
    return jnp.stack(passes.reduce((least, most), start, merge))
