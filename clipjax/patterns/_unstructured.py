"""Zeros wherever the scores are lowest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores
from ._pattern import Masks, best


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Keeps the entries with the highest scores, wherever they stand.

    The number of entries is exact; of equal scores the first, in the order of leaves
    and indices, stay.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = {"kernel": jnp.array([3.0, 1.0, 2.0, 2.0])}
        >>> clipjax.patterns.Unstructured().masks(
        ...     scores, 0.5, allocation=clipjax.allocations.uniform
        ... )
        {'kernel': Array([ True, False,  True, False], dtype=bool)}
    """

    def masks(
        self,
        scores: Mapping[str, Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> Masks:
        """Marks what stays.

        Args:
            scores: of every leaf, by path, the highest to keep; or `scores.Magnitude`
                of the leaf.  NaN ranks lowest.
            sparsity: the share of zeros in all leaves together, in [0, 1].
            allocation: how the leaves share it, from `allocations`.
            axis_name: inside `jax.shard_map`, the mesh axes over which leaves are
                split; along their first axis, where the allocation asks for shapes.
        """
        return best(scores, sparsity, allocation=allocation, axis_name=axis_name)
