"""The same number of entries in every unit."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .. import allocations
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..selection import _keys as ranking
from ..selection._counts import Count
from ._pattern import Scores, axis_of, refuse_split, whole_shape, written


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Keeps the same number of entries in every unit, the best of each.

    k = ⌊K/units⌋ entries of each, one at least, where the allocation gives the leaf K

    Of equal scores the first stays.  Found by counting, for all units at once: on a
    mesh, two small all-reduces for each bit.  An allocation that lets the entries of
    different leaves compete has no K for each, and is refused.

    Args:
        axis: along which units are counted; the default is Flax's axis of outputs, of
            which each then has the same number of inputs.

    Example:
        >>> from clipjax import allocations
        >>> scores = [jnp.array([[3.0, 1.0], [9.0, 2.0], [8.0, 2.0], [0.0, 0.5]])]
        >>> FanIn().masks(scores, 0.5, allocation=allocations.uniform)[0].astype(int)
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
        scores: Sequence[Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> list[Bool[Array, "..."]]:
        """Marks what stays; arguments as for `Unstructured.masks`."""
        arrays = [written(x) for x in scores]
        if not arrays:
            return []
        for x in arrays:
            refuse_split(self, x, axis_name)
        shapes = [whole_shape(x, axis_name) for x in arrays]
        _, budget = allocations.allot(
            allocation, arrays, shapes, sparsity, axis_name=axis_name
        )
        if len(set(budget.groups)) < len(budget.groups):
            raise ValueError(
                f"{self} needs to know how many entries each leaf keeps, but allocation"
                " lets leaves compete. Use `allocations.uniform`,"
                " `allocations.erdos_renyi` or `allocations.lamp`."
            )
        result = []
        for x, group in zip(arrays, budget.groups, strict=True):
            axis = axis_of(self, self.axis, x)
            number = _divided(budget.kept.at(group), max(x.shape[axis], 1))
            others = tuple(i for i in range(x.ndim) if i != axis)
            result.append(_best_of_each(x, number, others))
        return result


def _divided(kept: Count, units: int) -> Int[Array, ""]:
    """Returns ⌊kept/units⌋, by long division, eight bits at a time; 1 for less."""
    result, rest = kept.high // units, kept.high % units
    for digits in (kept.low >> 8, kept.low & 255):
        rest = rest * 256 + digits
        result, rest = result * 256 + rest // units, rest % units
    return jnp.maximum(result, jnp.minimum(kept.high + kept.low, 1))


def _best_of_each(
    scores: Float[Array, "..."], number: Int[Array, ""], axes: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Marks the `number` highest scores over some axes, for every place on the others.

    The highest threshold that so many reach is found by halving; then, likewise, up to
    which place those that are equal to it count.
    """
    is_double = scores.dtype == jnp.float64
    keys = ranking.key_of(scores, jnp.int64 if is_double else jnp.int32)

    def count(marked):
        return jnp.sum(marked, axes, dtype=jnp.int32, keepdims=True)

    end = jnp.iinfo(keys.dtype).max
    none = count(keys != keys)  # lies on a mesh as the units do
    zero = none.astype(keys.dtype)
    least = _last(lambda key: count(keys >= key) >= number, zero - end, zero + end)
    left = number - count(keys > least)
    tied, place = keys == least, ranking.places(keys, None)
    before = _last(
        lambda end: count(tied & (place < end)) <= left, none, none + scores.size + 1
    )
    return ((keys > least) | (tied & (place < before))) & (number > 0)


def _last(
    holds: Callable[[Array], Array], low: Int[Array, "..."], high: Int[Array, "..."]
) -> Int[Array, "..."]:
    """Returns the last integer from `low` to below `high` for which it still holds."""

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # a sum of both might not fit
        up = holds(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    return lax.fori_loop(0, jnp.iinfo(low.dtype).bits, halve, (low, high))[0]
