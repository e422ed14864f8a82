"""The same number of entries in every unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ..allocations._compared import numbers
from ..selection import _keys as ranking
from ._pattern import Masks, axis_of, refuse_split, whole_shapes


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Keeps the same number of entries in every unit, the best of each.

    k = ⌊K/units⌋ entries of each, one at least, where the allocation gives the leaf K

    Of equal scores the first stays.  Found by counting, for all units and leaves at
    once: on a mesh, a small all-reduce for each bit.

    Args:
        axis: along which units are counted; the default is Flax's axis of outputs, of
            which each then has the same number of inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> weights = jnp.array([[3.0, 1.0], [9.0, 2.0], [8.0, 2.0], [0.0, 0.5]])
        >>> masks = clipjax.patterns.FanIn().masks(
        ...     {"w": weights}, 0.5, allocation=clipjax.allocations.uniform
        ... )
        >>> masks["w"].astype(int)
        Array([[0, 0],
               [1, 1],
               [1, 1],
               [0, 0]], dtype=int32)

    Reference:
        Mike Lasby, Anna Golubeva, Utku Evci, Mihai Nica, Yani Ioannou, Dynamic Sparse
        Training with Structured Sparsity, 2023, https://arxiv.org/abs/2305.02299
    """

    axis: int = -1

    def masks(
        self,
        scores: Mapping[str, Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> Masks:
        """Marks what stays; arguments as for `Unstructured.masks`."""
        paths, arrays = list(scores), [written(x) for x in scores.values()]
        if not arrays:
            return {}
        for x in arrays:
            refuse_split(self, x, axis_name)
        axes = [axis_of(self, self.axis, x) for x in arrays]
        units = [max(x.shape[axis], 1) for x, axis in zip(arrays, axes, strict=True)]
        shapes = whole_shapes(arrays, axis_name)
        kept = numbers(allocation, paths, shapes, sparsity, arrays, axis_name)
        each = jnp.maximum(kept // np.asarray(units, np.int32), jnp.minimum(kept, 1))
        marks = _best_of_each(arrays, each, axes)
        return dict(zip(paths, marks, strict=True))


class _Ends(NamedTuple):
    """In every unit: low ≤ its threshold < high, and likewise the place among ties."""

    low: Int[Array, "..."]
    high: Int[Array, "..."]
    first: Int[Array, "..."]
    last: Int[Array, "..."]


def _best_of_each(
    scores: list[Float[Array, "..."]], kept: Int[Array, " arrays"], axes: list[int]
) -> list[Bool[Array, "..."]]:
    """Marks the highest scores of every unit, as many in each unit of one array.

    The highest threshold that so many reach is found by halving, and then up to which
    place those that are equal to it count: in one loop for all arrays.
    """
    is_double = any(x.dtype == jnp.float64 for x in scores)
    keys = [ranking.key_of(x, jnp.int64 if is_double else jnp.int32) for x in scores]
    arrays = list(zip(keys, kept, axes, strict=True))
    by_value = jnp.iinfo(keys[0].dtype).bits
    by_place = max(key.size for key in keys).bit_length() + 1

    def halve(step, ends):
        return [
            _halved(step < by_value, own, *array)
            for own, array in zip(ends, arrays, strict=True)
        ]

    ends = [_whole(key, axis) for key, _, axis in arrays]
    ends = lax.fori_loop(0, by_value + by_place, halve, ends)
    return [_ahead(key, x.low, x.first) for key, x in zip(keys, ends, strict=True)]


def _whole(key: Int[Array, "..."], axis: int) -> _Ends:
    """Returns the ends between which all keys and places lie."""
    none = _count(key != key, axis)  # lies on a mesh as the units do
    zero, end = none.astype(key.dtype), jnp.iinfo(key.dtype).max
    return _Ends(zero - end, zero + end, none, none + key.size + 1)


def _halved(
    by_value: Bool[Array, ""],
    ends: _Ends,
    key: Int[Array, "..."],
    kept: Int[Array, ""],
    axis: int,
) -> _Ends:
    """Brings the ends closer: those of values, or later those of places."""
    low, high, first, last = ends
    value = jnp.where(by_value, _middle(low, high), low)
    place = jnp.where(by_value, last, _middle(first, last))
    reach = _count(_ahead(key, value, place), axis)
    up = jnp.where(by_value, reach >= kept, reach <= kept)
    return _Ends(
        jnp.where(by_value & up, value, low),
        jnp.where(by_value & ~up, value, high),
        jnp.where(up & ~by_value, place, first),
        jnp.where(~up & ~by_value, place, last),
    )


def _ahead(key: Int[Array, "..."], value: Array, place: Array) -> Bool[Array, "..."]:
    """Marks what is above a value, and what is equal to it and before a place."""
    before = ranking.places(key, None, jnp.zeros([], bool)) < place
    return (key > value) | ((key == value) & before)


def _count(marked: Bool[Array, "..."], axis: int) -> Int[Array, "..."]:
    others = tuple(i for i in range(marked.ndim) if i != axis)
    return jnp.sum(marked, others, dtype=jnp.int32, keepdims=True)


def _middle(low: Array, high: Array) -> Array:
    return (low & high) + ((low ^ high) >> 1)  # a sum of both might not fit
