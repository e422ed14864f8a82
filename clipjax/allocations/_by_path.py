"""Allocations that tell arrays apart by their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from .._core import checks as check
from .._core.types import Number
from ..selection import _counts as counts
from ..selection._counts import Count
from ._budget import Allocation, Scores, exactly, kept_of, sizes_of
from ._compared import Grouping, Groups, apart, grouped
from ._shapes import uniform

SparsityByPath = Callable[[str, Number], Number | None]
"""From the path of a leaf and the sparsity that is asked for to that of the leaf."""

DenseByPath = Callable[[str, tuple[int, ...]], bool]
"""Tells from the path of a leaf and its shape whether it stays dense."""


def by_path(function: SparsityByPath, *, floor: int = 1) -> Allocation:
    """Gives every array the sparsity that a function of its path says.

    kᵢ = max(nᵢ - ⌈sᵢ·nᵢ⌉, min(floor, nᵢ)), sᵢ = f(pathᵢ, s)

    Args:
        function: f, of the path and the sparsity s that is asked for, which may be
            traced; `None` for just that.  A ramp reaches all leaves where f scales s.
        floor: entries that every array keeps.

    Example:
        >>> import clipjax
        >>> mine = clipjax.allocations.by_path(
        ...     lambda path, sparsity: 0.4 if "head" in path else sparsity
        ... )
        >>> mine(["body", "head"], [(10, 10), (10, 10)], 0.8)
        Array([20, 60], dtype=int32)
    """
    check.function(function=function)
    check.whole(0, floor=floor)

    def allocation(paths, shapes, sparsity, scores=None):
        del scores
        check.between(0, 1, sparsity=sparsity)
        sizes, sparsities = sizes_of(shapes), []
        for path in paths:
            own = function(path, sparsity)
            own = sparsity if own is None else own
            check.between(0, 1, **{f"the sparsity of {path!r}": own})
            sparsities.append(jnp.asarray(own).astype(jnp.float32))
        floors = [min(floor, size) for size in sizes]
        return kept_of(jnp.stack(sparsities), sizes, floors).to_integer()

    return allocation


def excluding(dense: DenseByPath, allocation: Allocation = uniform) -> Allocation:
    """Leaves some arrays dense, and lets the others make up for them.

    Σᵢ kᵢ = N - ⌈s·N⌉ for the N entries of all arrays, those that stay dense included.
    Exactly that many stay, unless these and what the others keep at s = 1 are more.
    What is not to count at all belongs into the `where` of `clipjax.sparsify`.

    Args:
        dense: of the path and the shape of an array, whether it stays dense.  With a
            pattern of channels or blocks the shape is that of their grid.
        allocation: how the other arrays share what is left; your own too, which is
            asked at s = 1 as well.

    Example:
        >>> import clipjax
        >>> mine = clipjax.allocations.excluding(lambda path, shape: path == "head")
        >>> mine(["body", "head"], [(100,), (10,)], 0.8)
        Array([12, 10], dtype=int32)
    """
    check.function(dense=dense, allocation=allocation)
    return _Excluding(dense, allocation)


@dataclasses.dataclass(frozen=True)
class _Excluding(Grouping):
    dense: DenseByPath
    allocation: Allocation

    def grouped(self, paths, shapes, sparsity, scores, axis_name):
        check.between(0, 1, sparsity=sparsity)
        sizes, pairs = sizes_of(shapes), zip(paths, shapes, strict=True)
        rest = [i for i, pair in enumerate(pairs) if not self.dense(*pair)]
        if not rest:
            return apart(scores, counts.of(sizes))
        left = sum(sizes[i] for i in rest)
        wanted = kept_of(sparsity, sum(sizes), sum(sizes) - left)
        wanted = wanted - counts.of(sum(sizes) - left)
        share = 1 - jnp.minimum(wanted.to_float() / float(left or 1), 1)

        def inner_at(share):
            own = None if scores is None else [scores[i] for i in rest]
            where = [paths[i] for i in rest], [shapes[i] for i in rest]
            return grouped(self.allocation, *where, share, own, axis_name)

        inner, least = inner_at(share), inner_at(1.0).kept
        most = [0] * len(least.low)
        for i, group in zip(rest, inner.groups, strict=True):
            most[group] += sizes[i]
        kept = exactly(wanted, inner.kept, most, least)
        return _beside_dense(inner._replace(kept=kept), rest, sizes, scores)


def _beside_dense(
    inner: Groups, rest: list[int], sizes: list[int], scores: Sequence[Scores] | None
) -> Groups:
    """Returns groups of all arrays: those of the rest, and one for each dense array."""
    dense = [i for i in range(len(sizes)) if i not in rest]
    first = len(inner.kept.low)  # of the groups of dense arrays
    groups = dict(zip(rest, inner.groups, strict=True))
    groups |= {i: first + place for place, i in enumerate(dense)}
    floors = dict(zip(rest, inner.floors, strict=True))
    if scores is not None and inner.scores is not None:
        own = dict(zip(rest, inner.scores, strict=True))
        scores = [own.get(i, x) for i, x in enumerate(scores)]
    words = zip(inner.kept, counts.of([sizes[i] for i in dense]), strict=True)
    return Groups(
        scores,
        Count(*(jnp.concatenate(pair) for pair in words)),
        tuple(groups[i] for i in range(len(sizes))),
        tuple(floors.get(i, 0) for i in range(len(sizes))),
    )
