"""Whole units of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from .. import masks
from .._core import checks as check
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ._blocks import Pool
from ._pattern import Masks, axis_of, best, refuse_split
from ._pools import l2


@dataclasses.dataclass(frozen=True)
class Channels:
    """Keeps the units with the highest scores: all that has one index along an axis.

    The number of units is exact; of equal units the first stay.  The sparsity is that
    of units, and the allocation sees their numbers.  The units of different leaves are
    chosen apart: what a unit feeds in the next layer stays.

    Args:
        axis: along which units are counted; by default the axis of outputs: the first
            of a `weight`, as Equinox and PyTorch lay it out, and else the last.
        pool: how the scores of a unit become one: `l2`, `mean`, `max`, or any function
            that keeps the axes with length 1.  What is not finite spoils its unit.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = {"kernel": jnp.array([[3.0, 1.0, 2.0], [0.0, 1.0, 3.0]])}
        >>> masks = clipjax.patterns.Channels().masks(
        ...     scores, 2 / 3, allocation=clipjax.allocations.uniform
        ... )
        >>> masks["kernel"].astype(int)
        Array([[0, 0, 1],
               [0, 0, 1]], dtype=int32)

    Reference:
        Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf, Pruning
        Filters for Efficient ConvNets, 2016, https://arxiv.org/abs/1608.08710
    """

    axis: int | None = None
    pool: Pool = l2

    def __post_init__(self):
        check.function(pool=self.pool)

    def masks(
        self,
        scores: Mapping[str, Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> Masks:
        """Marks what stays; arguments as for `Unstructured.masks`."""
        arrays = {p: written(x) for p, x in scores.items()}
        pooled, others = {}, {}
        for path, x in arrays.items():
            refuse_split(self, x, axis_name)
            axis = self.axis
            if axis is None:
                axis = 0 if "weight" in path.rpartition("/")[2] else -1
            axis = axis_of(self, axis, x)
            others[path] = tuple(i for i in range(x.ndim) if i != axis)
            pooled[path] = jnp.squeeze(self.pool(x, others[path]), others[path])
        kept = best(pooled, sparsity, allocation=allocation, axis_name=axis_name)
        return {
            p: jnp.expand_dims(kept[p], others[p]) & masks.full(x)
            for p, x in arrays.items()
        }
