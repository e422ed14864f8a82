"""What a pattern is, and what all patterns do with scores."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import allocations, selection
from .._core import sharding
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..selection._keys import Magnitude

Scores = Float[Array, "..."] | Magnitude
"""The scores of one leaf, the highest to keep."""


@runtime_checkable
class Pattern(Protocol):
    """What a pattern has to offer."""

    def masks(
        self,
        scores: Sequence[Any],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> list[Bool[Array, "..."]]:
        """Marks what stays; see `Unstructured.masks`."""
        ...


def best(
    scores: Sequence[Scores],
    sparsity: Number,
    *,
    allocation: Allocation,
    axis_name: AxisName,
) -> list[Bool[Array, "..."]]:
    """Marks the highest scores, as many as the allocation says."""
    if not scores:
        return []
    shapes = [whole_shape(x, axis_name) for x in scores]
    weighed, budget = allocations.allot(
        allocation, scores, shapes, sparsity, axis_name=axis_name
    )
    return selection.select(
        weighed, budget.kept, budget.groups, floors=budget.floors, axis_name=axis_name
    )


def written(scores: Scores) -> Float[Array, "..."]:
    """Returns scores as an array."""
    return jnp.abs(scores.x) if isinstance(scores, Magnitude) else scores


def whole_shape(scores: Scores, axis_name: AxisName) -> tuple[int, ...]:
    """Returns the shape over all devices, if a leaf is split along its first axis."""
    x = scores.x if isinstance(scores, Magnitude) else scores
    blocks = sharding.blocks(x, axis_name)
    return (x.shape[0] * blocks, *x.shape[1:]) if x.ndim else ()


def refuse_split(pattern: Pattern, scores: Array, axis_name: AxisName) -> None:
    """Raises where a pattern would see only a part of its units."""
    if sharding.blocks(scores, axis_name) > 1:
        raise ValueError(
            f"{pattern} compares whole units, but inside `jax.shard_map` this leaf of"
            f" local shape {scores.shape} is split over {axis_name!r}. Call the"
            " transform under `jax.jit` with a mesh, or choose another pattern for"
            " this leaf."
        )


def axis_of(pattern: Pattern, axis: int, scores: Array) -> int:
    """Returns an axis counted from the front."""
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"{pattern} needs an axis {axis}, but the scores have shape"
            f" {scores.shape}. Choose another axis, or another pattern for this leaf"
            " by its path."
        )
    return axis % scores.ndim


def is_whole(
    pattern: Pattern, scores: Array, axis: int, length: int, dense_if_ragged: bool
) -> bool:
    """Tells if an axis is a multiple of `length` long; raises unless it may not be."""
    if scores.shape[axis] % length == 0:
        return True
    if dense_if_ragged:
        return False
    raise ValueError(
        f"{pattern} needs axis {axis} to be a multiple of {length} long, but the scores"
        f" have shape {scores.shape}. Set dense_if_ragged=True to leave such leaves"
        " dense, or choose another axis."
    )
