"""In what shape zeros come: from scores and a sparsity to masks.

A pattern is a frozen value with one method, `masks`; `sparsify` calls it with the
scores of all leaves together, so that a pattern may compare them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from . import _meshes as meshes, selection
from ._types import AxisName, Number
from .allocations import Allocation


@runtime_checkable
class Pattern(Protocol):
    """What a pattern has to offer."""

    def masks(
        self,
        scores: Sequence[Float[Array, "..."]],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> list[Bool[Array, "..."]]:
        """Marks what stays; see `Unstructured.masks`."""
        ...


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Keeps the entries with the highest scores, wherever they stand.

    The number of entries is exact; of equal scores the first, in the order of leaves
    and indices, stay.

    Example:
        >>> import jax.numpy as jnp
        >>> from clipjax import allocations
        >>> scores = [jnp.array([3.0, 1.0, 2.0, 2.0])]
        >>> Unstructured().masks(scores, 0.5, allocation=allocations.uniform)
        [Array([ True, False,  True, False], dtype=bool)]
    """

    def masks(
        self,
        scores: Sequence[Float[Array, "..."]],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> list[Bool[Array, "..."]]:
        """Marks what stays.

        Args:
            scores: of every leaf, the highest to keep; NaN ranks lowest.
            sparsity: the share of zeros in all leaves together, in [0, 1].
            allocation: how the leaves share it, from `allocations`.
            axis_name: inside `jax.shard_map`, the mesh axes over which leaves are
                split; along their first axis, where the allocation asks for shapes.
        """
        shapes = [_whole_shape(x, axis_name) for x in scores]
        budget = allocation(shapes, sparsity)
        return selection.select(
            scores,
            budget.kept,
            budget.groups,
            floors=budget.floors,
            axis_name=axis_name,
        )


def _whole_shape(x: Array, axis_name: AxisName) -> tuple[int, ...]:
    blocks = meshes.blocks(x, axis_name)
    return (x.shape[0] * blocks, *x.shape[1:]) if x.ndim else ()
