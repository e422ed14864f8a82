"""Pruning in one call, outside of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .. import allocations, masks, patterns, scores
from .._core import checks as check, trees
from .._core.bits import mask_of
from .._core.types import AxisName, Number, Where
from .._sparsity._store import chosen
from ..patterns._by_path import marks


def prune(
    params: PyTree,
    sparsity: Number,
    *,
    score: scores.Score | PyTree = scores.magnitude,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation = allocations.square_root,
    where: Where = masks.weights,
    axis_name: AxisName = None,
) -> PyTree:
    """Keeps the highest-scoring parameters and sets the rest to zero, once.

    θᵢ ← 0 where mᵢ = 0, m = pattern(score(θ), s)

    Use it after a training, or before one that `constraints.keep_zeros` keeps sparse.

    Dtypes, structure and sharding stay.  A NaN ranks lowest, and becomes zero where it
    is not kept.

    Args:
        params: the parameters.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.  At least that share is zero, unless the floors of
            the allocation keep more.
        score: a function of a parameter and `None` that returns the score of every
            entry; or a tree of scores, such as `scores.snip` returns.  Leaves without
            a score stay dense.
        pattern: in what shape zeros come, from `patterns`; or a function from path and
            leaf to a pattern.
        allocation: how the leaves share the sparsity, from `allocations`; by default
            `square_root`.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
        >>> clipjax.prune(params, 0.5)["kernel"]
        Array([[ 3.,  0.],
               [ 0., -4.]], dtype=float32)
    """
    check.number(sparsity=sparsity)
    check.between(0, 1, sparsity=sparsity)
    check.function(allocation=allocation, where=where)
    check.pattern(pattern=pattern)
    check.met_by(pattern, sparsity=sparsity)
    if isinstance(score, scores.Tracked):
        raise TypeError(
            f"score must not need a memory of past steps, but is {score!r}. Pass a"
            " function, or a tree such as `scores.snip` or `scores.random` returns."
        )
    leaves = chosen(params, where)
    scored = _scored(score, leaves)
    kept = marks(
        scored,
        leaves,
        jnp.clip(jnp.asarray(sparsity, jnp.float32), 0, 1),
        pattern=pattern,
        allocation=allocation,
        axis_name=axis_name,
    )
    kept = {path: mask_of(mask) for path, mask in kept.items()}
    return trees.map_by_path(lambda x, mask: masks.apply(mask, x), params, kept)


def _scored(score: Any, leaves: dict[str, Array]) -> Mapping[str, Any]:
    if score is scores.magnitude:
        return {path: scores.Magnitude(x) for path, x in leaves.items()}
    if trees.is_function(score):
        result = {path: score(x, None) for path, x in leaves.items()}
    else:
        known = trees.by_path(score)
        result = {path: jnp.asarray(known[path]) for path in leaves if path in known}
        if leaves and not result:
            raise ValueError(
                "score has no leaf at the path of any parameter that is to be pruned:"
                f" it has {sorted(known)}, and they are {sorted(leaves)}."
            )
    for path, own in result.items():
        check.score_shape(path, own, leaves[path])
    return result
