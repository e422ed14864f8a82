"""Allocations that tell arrays apart by their paths."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax.numpy as jnp

from .._core import checks as check
from .._core.types import Number
from ..selection import _counts as counts
from ..selection._counts import Count
from ._budget import Allocation, Budget, check_numbers, exactly, kept_of
from ._shapes import uniform
from ._weighed import allot

SparsityByPath = Callable[[str, Number], Number | None]
"""From the path of a leaf and the sparsity that is asked for to that of the leaf."""

DenseByPath = Callable[[str, tuple[int, ...]], bool]
"""Tells from the path of a leaf and its shape whether it stays dense."""


def at_paths(allocation: Allocation, paths: Sequence[str]) -> Allocation:
    """Returns the allocation for the arrays at these paths, in their order.

    Args:
        allocation: any; one that goes by path has a method `at`.
        paths: of the arrays whose shapes it will be given.

    Example:
        >>> mine = by_path(lambda path, sparsity: 0.5 if path == "head" else None)
        >>> at_paths(mine, ["body", "head"])([(10,), (10,)], 0.9).kept.low
        Array([1, 5], dtype=int32)
        >>> at_paths(uniform, ["body", "head"]) is uniform
        True
    """
    at = getattr(allocation, "at", None)
    return at(tuple(paths)) if at else allocation


def weighs(allocation: Allocation) -> bool:
    """Tells whether an allocation looks at scores, and not only at shapes.

    Args:
        allocation: any; one that weighs scores has a method `weigh`.

    Example:
        >>> weighs(uniform), weighs(excluding(lambda path, shape: False))
        (False, False)
    """
    if isinstance(allocation, _Excluding):
        return weighs(allocation.allocation)
    return hasattr(allocation, "weigh")


def by_path(function: SparsityByPath, *, floor: int = 1) -> Allocation:
    """Gives every array the sparsity that a function of its path says.

    kᵢ = max(nᵢ - ⌈sᵢ·nᵢ⌉, min(floor, nᵢ)), sᵢ = f(pathᵢ, s)

    Args:
        function: f, of the path and the sparsity s that is asked for, which may be
            traced; `None` for just that.  A ramp reaches all leaves where f scales s.
        floor: entries that every array keeps.

    Example:
        >>> mine = by_path(lambda path, sparsity: 0.4 if "head" in path else sparsity)
        >>> at_paths(mine, ["body", "head"])([(10, 10), (10, 10)], 0.8).kept.low
        Array([20, 60], dtype=int32)
    """
    check.function(function=function)
    check.whole(0, floor=floor)
    return _ByPath(function, floor)


def excluding(dense: DenseByPath, allocation: Allocation = uniform) -> Allocation:
    """Leaves some arrays dense, and lets the others make up for them.

    Σᵢ kᵢ = N - ⌈s·N⌉ for the N entries of all arrays, those that stay dense included.
    Exactly that many stay, unless these and the floors are more.  What is not to count
    at all belongs into the `where` of `clipjax.sparsify`.

    Args:
        dense: of the path and the shape of an array, whether it stays dense.  With a
            pattern of channels or blocks the shape is that of their grid.
        allocation: how the other arrays share what is left.

    Example:
        >>> mine = excluding(lambda path, shape: path == "head")
        >>> at_paths(mine, ["body", "head"])([(100,), (10,)], 0.8).kept.low
        Array([12, 10], dtype=int32)
    """
    check.function(dense=dense, allocation=allocation)
    return _Excluding(dense, allocation)


def _no_paths(name: str) -> NoReturn:
    raise ValueError(
        f"{name} goes by path, but knows none. Hand it to `clipjax.sparsify` or"
        " `clipjax.prune`, or call `allocations.at_paths(allocation, paths)` first."
    )


@dataclasses.dataclass(frozen=True)
class _ByPath:
    function: SparsityByPath
    floor: int
    paths: tuple[str, ...] | None = None

    def at(self, paths: tuple[str, ...]) -> Allocation:
        return dataclasses.replace(self, paths=paths)

    def __call__(self, shapes: Sequence[tuple[int, ...]], sparsity: Number) -> Budget:
        check_numbers(sparsity, self.floor)
        sizes = [math.prod(shape) for shape in shapes]
        paths = self.paths or _no_paths("by_path")
        sparsities = []
        for path, _ in zip(paths, shapes, strict=True):
            own = self.function(path, sparsity)
            own = sparsity if own is None else own
            check.between(0, 1, **{f"the sparsity of {path!r}": own})
            sparsities.append(jnp.asarray(own).astype(jnp.float32))
        floors = [min(self.floor, size) for size in sizes]
        kept = kept_of(jnp.stack(sparsities), sizes, floors)
        return Budget(kept, tuple(range(len(sizes))), (0,) * len(sizes))


@dataclasses.dataclass(frozen=True)
class _Excluding:
    dense: DenseByPath
    allocation: Allocation
    paths: tuple[str, ...] | None = None

    def at(self, paths: tuple[str, ...]) -> Allocation:
        return dataclasses.replace(self, paths=paths)

    def __call__(self, shapes: Sequence[tuple[int, ...]], sparsity: Number) -> Budget:
        nothing = [jnp.zeros(0, jnp.float32)] * len(shapes)
        return self.weigh(nothing, shapes, sparsity)[1]

    def weigh(self, scores, shapes, sparsity, *, axis_name=None):
        """Weighs what is not dense; returns all scores, and the budget of all."""
        paths = self.paths or _no_paths("excluding")
        sizes = [math.prod(shape) for shape in shapes]
        pairs = enumerate(zip(paths, shapes, strict=True))
        rest = [i for i, (path, shape) in pairs if not self.dense(path, shape)]
        left = sum(sizes[i] for i in rest)
        wanted = kept_of(sparsity, sum(sizes), sum(sizes) - left)
        wanted = wanted - counts.of(sum(sizes) - left)
        share = 1 - jnp.minimum(wanted.to_float() / float(max(left, 1)), 1)
        inner = at_paths(self.allocation, [paths[i] for i in rest])

        def budget_at(share):
            own, own_shapes = [scores[i] for i in rest], [shapes[i] for i in rest]
            return allot(inner, own, own_shapes, share, axis_name=axis_name)

        scores, groups, floors = list(scores), [-1] * len(sizes), [0] * len(sizes)
        kept = counts.of([])
        if rest:
            weighed, budget = budget_at(share)
            for place, i in enumerate(rest):
                scores[i], groups[i] = weighed[place], budget.groups[place]
                floors[i] = budget.floors[place]
            least = budget_at(1.0)[1].kept
            kept = _brought_to(wanted, budget.kept, least, groups, sizes)
        dense = [i for i, group in enumerate(groups) if group < 0]
        for place, i in enumerate(dense):
            groups[i] = len(kept.low) + place
        both = zip(kept, counts.of([sizes[i] for i in dense]), strict=True)
        kept = Count(*(jnp.concatenate(words) for words in both))
        return scores, Budget(kept, tuple(groups), tuple(floors))


def _brought_to(
    wanted: Count, kept: Count, least: Count, groups: list[int], sizes: list[int]
) -> Count:
    """Returns what each group keeps, with what is wanted as their sum."""
    most = [0] * len(kept.low)
    for group, size in zip(groups, sizes, strict=True):
        if group >= 0:
            most[group] += size
    return exactly(wanted, kept, most, least)
