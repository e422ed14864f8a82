"""Several patterns in one model: which leaf has which is told by its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Array

from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ._pattern import PackedMasks, Pattern, packed_best
from ._unstructured import Unstructured

PatternByPath = Callable[[str, Array], Pattern]
"""From the path of a leaf and the leaf to its pattern."""


def marks(
    scores: Mapping[str, Scores],
    leaves: Mapping[str, Array],
    sparsity: Number,
    *,
    pattern: Pattern | PatternByPath,
    allocation: Allocation,
    axis_name: AxisName = None,
) -> PackedMasks:
    """Marks what stays in each leaf, by path.

    The leaves of one pattern share the sparsity among themselves: each pattern meets
    it by itself.  Masks come as bits where that is how they were made.

    Args:
        scores: of every leaf, the highest to keep, or `scores.Magnitude` of it.
        leaves: the parameters, for a pattern that is chosen by leaf.
        sparsity: the share of zeros, in [0, 1].
        pattern: one for all, or a function of path and leaf.
        allocation: how leaves share the sparsity; it may go by path.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> from clipjax.patterns._by_path import marks
        >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
        >>> own = lambda path, leaf: (
        ...     clipjax.patterns.NofM(2, 2)
        ...     if path == "a"
        ...     else clipjax.patterns.Unstructured()
        ... )
        >>> found = marks(
        ...     scores, scores, 0.5, pattern=own, allocation=clipjax.allocations.uniform
        ... )
        >>> found["a"], int(found["b"].kept)
        (Array([ True,  True], dtype=bool), 1)
    """
    groups: list[tuple[Pattern, dict[str, Scores]]] = []
    for path, score in scores.items():
        own = pattern if isinstance(pattern, Pattern) else pattern(path, leaves[path])
        if not isinstance(own, Pattern):
            raise TypeError(
                f"pattern must return a value with a method `masks`, but at {path!r} it"
                f" returned {own!r}."
            )
        if not any(known == own for known, _ in groups):
            groups.append((own, {}))
        # Magnitudes are spared the way through memory where a pattern can rank them.
        score = score if isinstance(own, Unstructured) else written(score)
        next(same for known, same in groups if known == own)[path] = score
    result = {}
    for own, same in groups:
        make = packed_best if type(own) is Unstructured else own.masks
        result |= make(same, sparsity, allocation=allocation, axis_name=axis_name)
    return {path: result[path] for path in scores}
