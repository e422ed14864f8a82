"""Allocations that look at the scores before leaves are compared."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import norms
from .._core import checks as check, trees
from .._core.types import AxisName, Number
from ..selection._keys import Magnitude
from ._budget import Allocation, Budget
from ._shapes import global_

Scores = Sequence[Float[Array, "..."] | Magnitude]


def allot(
    allocation: Allocation,
    scores: Scores | None,
    shapes: Sequence[tuple[int, ...]],
    sparsity: Number,
    *,
    axis_name: AxisName = None,
) -> tuple[Any, Budget]:
    """Returns the scores as they are to be compared, and how many of them to keep.

    An allocation with a method `weigh` makes both; any other leaves the scores alone.

    Args:
        allocation: any.
        scores: of the arrays; `None` where there are none to look at.
        shapes: of the arrays, as the allocation counts their entries.
        sparsity: s in [0, 1].
        axis_name: inside `jax.shard_map`, the mesh axes over which arrays are split.

    Example:
        >>> scores = [jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])]
        >>> weighed, budget = allot(normalized(), scores, [(2,), (2,)], 0.5)
        >>> weighed
        [Array([0.6, 0.8], dtype=float32), Array([0.6, 0.8], dtype=float32)]
        >>> budget.kept.low
        Array([2], dtype=int32)
    """
    weigh = getattr(allocation, "weigh", None)
    if weigh is None:
        return scores, allocation(shapes, sparsity)
    return weigh(scores, shapes, sparsity, axis_name=axis_name)


def normalized(power: Number = 1.0, *, floor: int = 1) -> Allocation:
    """Compares the entries of all arrays, each array relative to its norm.

    sᵢⱼ / ‖sᵢ‖₂ᵖ, and k = N - ⌈s·N⌉ for N entries in all

    With p = 0 as `global_`, where arrays of small scores can lose nearly everything;
    with p = 1 the unit of an array does not count.  In between, large scores still
    count for more.  The norm is that of the finite scores.

    Args:
        power: p, usually in [0, 1]; may be traced.
        floor: entries that every array keeps.

    Example:
        >>> normalized()([(10, 10), (4,)], 0.5).kept.low
        Array([52], dtype=int32)
    """
    check.number(power=power)
    check.whole(0, floor=floor)
    return _Normalized(power, floor)


@dataclasses.dataclass(frozen=True)
class _Normalized:
    power: Number
    floor: int

    def __call__(self, shapes: Sequence[tuple[int, ...]], sparsity: Number) -> Budget:
        return global_(shapes, sparsity, floor=self.floor)

    def weigh(self, scores, shapes, sparsity, *, axis_name=None):
        weighed = scores and [self._divided(x, axis_name) for x in scores]
        return weighed, self(shapes, sparsity)

    def _divided(self, scores, axis_name):
        if isinstance(scores, Magnitude):
            return Magnitude(self._divided(scores.x, axis_name))
        x = trees.wide(scores)
        usable = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        norm = norms.global_norm(usable, scaled=True, axis_name=axis_name)
        norm = jnp.where(norm > 0, norm, 1)  # all scores are zero
        return x * (norm ** -jnp.asarray(self.power, norm.dtype)).astype(x.dtype)
