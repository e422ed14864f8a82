"""What a pattern is, and what all patterns do with scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool

from .._core import sharding
from .._core.bits import Packed, mask_of
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores
from ..allocations._compared import grouped
from ..selection._keys import Magnitude
from ..selection._select import selected

Masks = dict[str, Bool[Array, "..."]]
"""Of every leaf, by path, what stays."""

PackedMasks = dict[str, Bool[Array, "..."] | Packed]


@runtime_checkable
class Pattern(Protocol):
    """The method of a pattern."""

    def masks(
        self,
        scores: Mapping[str, Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> Masks:
        """Marks what stays; see `Unstructured.masks`."""
        ...


def best(
    scores: Mapping[str, Scores],
    sparsity: Number,
    *,
    allocation: Allocation,
    axis_name: AxisName,
) -> Masks:
    """Marks the highest scores, as many as the allocation says."""
    found = packed_best(scores, sparsity, allocation=allocation, axis_name=axis_name)
    return {path: mask_of(mask) for path, mask in found.items()}


def packed_best(
    scores: Mapping[str, Scores],
    sparsity: Number,
    *,
    allocation: Allocation,
    axis_name: AxisName,
) -> PackedMasks:
    """Does as `best`, and leaves masks as they were made: as bits, where it can."""
    if not scores:
        return {}
    paths, arrays = list(scores), list(scores.values())
    shapes = whole_shapes(arrays, axis_name)
    own = grouped(allocation, paths, shapes, sparsity, arrays, axis_name)
    marks = selected(
        own.scores or (), own.kept, own.groups, floors=own.floors, axis_name=axis_name
    )
    return dict(zip(paths, marks, strict=True))


def whole_shapes(arrays: Iterable[Scores], axis_name: AxisName) -> list[tuple]:
    """Returns shapes over all devices, of leaves split along their first axis."""
    arrays = [x.x if isinstance(x, Magnitude) else x for x in arrays]
    rows = [sharding.blocks(x, axis_name) * x.shape[0] if x.ndim else 0 for x in arrays]
    return [(n, *x.shape[1:])[: x.ndim] for n, x in zip(rows, arrays, strict=True)]


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
