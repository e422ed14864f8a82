"""Whole blocks of a grid over some axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import masks
from .._core import checks as check
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ._pattern import Masks, axis_of, best, is_whole
from ._pools import mean

Pool = Callable[[Float[Array, "..."], tuple[int, ...]], Float[Array, "..."]]
"""From scores and the axes of a block to one score, the axes kept with length 1."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Keeps the blocks with the highest scores, and all entries of each.

    The number of blocks is exact; of equal blocks the first stay.  The sparsity is that
    of blocks, and so that of entries where all leaves have blocks of one size.

    Args:
        shape: how long a block is along each of the axes; along all others, 1.
        axes: over which axes the blocks lie; the default is Flax's inputs and outputs.
        pool: how the scores of a block become one: `mean`, `max`, `l2`, or any function
            that keeps the axes with length 1.  What is not finite spoils its block.
        dense_if_ragged: whether a leaf with an axis that no number of blocks fills
            stays dense, and is not counted; otherwise it is refused.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = {"kernel": jnp.array([[3.0, 1.0, 2.0, 2.0, 9.0, 0.0]])}
        >>> pairs = clipjax.patterns.Blocks((2,), axes=(-1,))
        >>> masks = pairs.masks(scores, 2 / 3, allocation=clipjax.allocations.uniform)
        >>> masks["kernel"].astype(int)
        Array([[0, 0, 0, 0, 1, 1]], dtype=int32)

    Reference:
        Sharan Narang, Eric Undersander, Gregory Diamos, Block-Sparse Recurrent Neural
        Networks, 2017, https://arxiv.org/abs/1711.02782
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = (-2, -1)
    pool: Pool = mean
    dense_if_ragged: bool = False

    def __post_init__(self):
        check.function(pool=self.pool)
        check.flag(dense_if_ragged=self.dense_if_ragged)
        if not isinstance(self.shape, tuple | list):
            raise TypeError(
                f"shape must be a tuple of lengths, one for each of axes, but is"
                f" {self.shape!r}."
            )
        for length in self.shape:
            check.whole(1, shape=length)
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape must have one length for each of axes, but is {self.shape} for"
                f" axes {self.axes}."
            )

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
        lengths = {p: self._lengths(x) for p, x in arrays.items()}
        pooled = {p: self._pooled(arrays[p], own) for p, own in lengths.items() if own}
        kept = best(pooled, sparsity, allocation=allocation, axis_name=axis_name)
        return {
            p: _spread(kept[p], x, lengths[p]) if lengths[p] else masks.full(x)
            for p, x in arrays.items()
        }

    def _lengths(self, scores: Float[Array, "..."]) -> tuple[int, ...]:
        """Returns how long a block is along every axis; nothing for a dense leaf."""
        axes = [axis_of(self, axis, scores) for axis in self.axes]
        if len(set(axes)) < len(axes):
            raise ValueError(f"{self} names an axis of shape {scores.shape} twice.")
        lengths = [1] * scores.ndim
        for axis, length in zip(axes, self.shape, strict=True):
            if not is_whole(self, scores, axis, length, self.dense_if_ragged):
                return ()
            lengths[axis] = length
        return tuple(lengths)

    def _pooled(
        self, scores: Float[Array, "..."], lengths: tuple[int, ...]
    ) -> Float[Array, "..."]:
        pooled = self.pool(_split(scores, lengths), _inner(lengths))
        return jnp.squeeze(pooled, _inner(lengths))


def _inner(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Returns which axes are those inside of a block, once each axis is in two."""
    longer = [axis for axis, length in enumerate(lengths) if length > 1]
    return tuple(axis + place + 1 for place, axis in enumerate(longer))


def _split(x: Array, lengths: tuple[int, ...]) -> Array:
    """Splits every axis in two, one after the other: explicit meshes ask for that."""
    for axis in reversed(range(len(lengths))):
        if lengths[axis] > 1:
            parts = (x.shape[axis] // lengths[axis], lengths[axis])
            x = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
    return x


def _spread(
    mask: Bool[Array, "..."], scores: Float[Array, "..."], lengths: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Marks all entries of the blocks that are marked."""
    here = _split(masks.full(scores), lengths)  # lies on a mesh as the scores do
    marked = jnp.expand_dims(mask, _inner(lengths)) & here
    for axis, length in enumerate(lengths):
        if length > 1:
            joined = marked.shape[axis] * length
            marked = marked.reshape(
                *marked.shape[:axis], joined, *marked.shape[axis + 2 :]
            )
    return marked
