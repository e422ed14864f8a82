"""One pattern inside what another keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from .._core import checks as check
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ._pattern import Masks, Pattern


@dataclasses.dataclass(frozen=True)
class Combined:
    """Keeps what two patterns keep: the inner one chooses among what the outer leaves.

    What the outer pattern drops ranks lowest for the inner one.  With an inner pattern
    of a fixed sparsity, such as `NofM`, the sparsity that is asked for is that of the
    outer: in its kept channels N of M entries stay.  Else give the outer one its own,
    and the total is the inner one's, exactly, unless the outer keeps fewer than that.

    Args:
        outer: the pattern that is applied first, such as `Channels()`.
        inner: the pattern inside of it.
        outer_sparsity: of the outer pattern; `None` for what is asked for, which it
            never exceeds.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> weights = jnp.array([[3.0, 1.0], [2.0, 1.0], [5.0, 4.0], [6.0, 1.0]])
        >>> both = clipjax.patterns.Combined(
        ...     clipjax.patterns.Channels(), clipjax.patterns.NofM(2, 4, axis=0)
        ... )
        >>> masks = both.masks(
        ...     {"w": weights}, 0.5, allocation=clipjax.allocations.uniform
        ... )
        >>> masks["w"].astype(int)
        Array([[0, 0],
               [0, 0],
               [1, 0],
               [1, 0]], dtype=int32)
    """

    outer: Pattern
    inner: Pattern
    outer_sparsity: Number | None = None

    def __post_init__(self):
        check.has_method("masks", outer=self.outer, inner=self.inner)
        if self.outer_sparsity is not None:
            check.between(0, 1, outer_sparsity=self.outer_sparsity)

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
        first = jnp.asarray(sparsity, jnp.float32)
        if self.outer_sparsity is not None:
            first = jnp.minimum(first, jnp.asarray(self.outer_sparsity, jnp.float32))
        outer = self.outer.masks(
            arrays, first, allocation=allocation, axis_name=axis_name
        )
        left = {
            p: jnp.where(outer[p], x, jnp.asarray(jnp.nan, x.dtype))
            for p, x in arrays.items()
        }
        inner = self.inner.masks(
            left, sparsity, allocation=allocation, axis_name=axis_name
        )
        return {p: outer[p] & inner[p] for p in arrays}
