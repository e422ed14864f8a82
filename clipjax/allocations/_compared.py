"""Allocations under which the entries of all arrays are compared with each other.

Whoever ranks entries need not find out first how many of each array are kept: `grouped`
says which arrays are compared, so that one search marks the entries.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .. import masks, norms, selection
from .._core import checks as check, trees
from .._core.types import AxisName, Number
from ..selection import _counts as counts
from ..selection._counts import Count
from ..selection._keys import Magnitude
from ._budget import (
    Allocation,
    Scores,
    check_numbers,
    checked,
    kept_of,
    sizes_of,
    written,
)
from ._shapes import uniform

Paths = Sequence[str]
Shapes = Sequence[tuple[int, ...]]


class Groups(NamedTuple):
    """Which arrays are compared, by which scores, and how many entries are kept."""

    scores: Sequence[Scores] | None
    kept: Count  # of every group
    groups: tuple[int, ...]  # the group of each array
    floors: tuple[int, ...]  # how many entries each array keeps in any case


class Grouping(abc.ABC):
    """An allocation of ours that reads scores, and says what is to be compared."""

    @abc.abstractmethod
    def grouped(
        self,
        paths: Paths,
        shapes: Shapes,
        sparsity: Number,
        scores: Sequence[Scores] | None,
        axis_name: AxisName,
    ) -> Groups:
        """Returns which arrays are compared."""

    def __call__(
        self,
        paths: Paths,
        shapes: Shapes,
        sparsity: Number,
        scores: Sequence[Scores] | None = None,
    ) -> Int[Array, " arrays"]:
        """Returns how many entries each array keeps."""
        return numbers(self, paths, shapes, sparsity, scores)


def grouped(
    allocation: Allocation,
    paths: Paths,
    shapes: Shapes,
    sparsity: Number,
    scores: Sequence[Scores] | None,
    axis_name: AxisName,
) -> Groups:
    """Returns which arrays an allocation compares; none, if it returns integers."""
    if isinstance(allocation, functools.partial) and allocation.func is global_:
        allocation = _Compared(None, **allocation.keywords)
    elif allocation is global_:
        allocation = _Compared(None)
    if isinstance(allocation, Grouping):
        return allocation.grouped(paths, shapes, sparsity, scores, axis_name)
    read = scores and [written(x) for x in scores]
    kept = allocation(paths, shapes, sparsity, read)
    return apart(scores, counts.of(checked(kept, paths, sizes_of(shapes))))


def apart(scores: Sequence[Scores] | None, kept: Count) -> Groups:
    """Returns groups of one array each."""
    size = len(kept.low)
    return Groups(scores, kept, tuple(range(size)), (0,) * size)


def numbers(
    allocation: Allocation,
    paths: Paths,
    shapes: Shapes,
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    axis_name: AxisName = None,
) -> Int[Array, " arrays"]:
    """Returns how many entries each array keeps, whatever the allocation."""
    own = grouped(allocation, paths, shapes, sparsity, scores, axis_name)
    if own.scores is None or len(set(own.groups)) == len(own.groups):
        return own.kept.at(np.asarray(own.groups, int)).to_integer()
    marks = selection.select(
        own.scores, own.kept, own.groups, floors=own.floors, axis_name=axis_name
    )
    return jnp.stack([masks.count(mask, axis_name=axis_name) for mask in marks])


def given(name: str, scores: Sequence[Scores] | None) -> Sequence[Scores]:
    """Returns scores, and raises where an allocation has none to read."""
    if scores is None:
        raise ValueError(
            f"allocation must go by shapes where masks start at random, but is {name},"
            " which reads scores. Use `allocations.uniform`, `.erdos_renyi_kernel` or"
            " `.by_path`."
        )
    return scores


def global_(
    paths: Paths,
    shapes: Shapes,
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    *,
    floor: int = 1,
) -> Int[Array, " arrays"]:
    """Compares the entries of all arrays with each other.

    kᵢ = how many of the k highest scores of all arrays are in the i-th, k = N - ⌈s·N⌉
    for N entries in all

    Of equal scores the first count, in the order of arrays and indices.  Where there
    are no scores, as where masks start at random, arrays share as under `uniform`.

    Args:
        paths: of the arrays; not read.
        shapes: of the arrays.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        scores: of the arrays, or `None`.
        floor: entries that every array keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = [jnp.array([3.0, 4.0, 5.0]), jnp.array([0.3, 0.4, 9.0])]
        >>> clipjax.allocations.global_(["a", "b"], [(3,), (3,)], 0.5, scores)
        Array([2, 1], dtype=int32)
    """
    return _Compared(None, floor)(paths, shapes, sparsity, scores)


def normalized(power: Number = 1.0, *, floor: int = 1) -> Allocation:
    """Compares the entries of all arrays, each array relative to its norm.

    As `global_`, with the scores sᵢⱼ / ‖sᵢ‖₂ᵖ

    With p = 0 as `global_`, where arrays of small scores can lose nearly everything;
    with p = 1 the unit of an array does not count.  In between, large scores still
    count for more.  The norm is that of the finite scores.

    Args:
        power: p, usually in [0, 1]; may be traced.
        floor: entries that every array keeps.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = [jnp.array([3.0, 4.0, 5.0]), jnp.array([0.3, 0.4, 0.5])]
        >>> clipjax.allocations.global_(["a", "b"], [(3,), (3,)], 0.5, scores)
        Array([2, 1], dtype=int32)
        >>> clipjax.allocations.normalized(0.0)(["a", "b"], [(3,), (3,)], 0.3, scores)
        Array([3, 1], dtype=int32)
        >>> clipjax.allocations.normalized()(["a", "b"], [(3,), (3,)], 0.3, scores)
        Array([2, 2], dtype=int32)
    """
    check.number(power=power)
    check.whole(0, floor=floor)
    return _Compared(power, floor)


@dataclasses.dataclass(frozen=True)
class _Compared(Grouping):
    power: Number | None  # by which scores are divided by their norm; `None`: they stay
    floor: int = 1

    def grouped(self, paths, shapes, sparsity, scores, axis_name):
        check_numbers(sparsity, self.floor)
        if scores is None and self.power is None:
            kept = uniform(paths, shapes, sparsity, floor=self.floor)
            return apart(None, counts.of(kept))
        scores = given(f"normalized({self.power})", scores)
        sizes = sizes_of(shapes)
        floors = tuple(min(self.floor, size) for size in sizes)
        kept = kept_of(sparsity, [sum(sizes)], [sum(floors)])
        weighed = [self._divided(x, axis_name) for x in scores]
        return Groups(weighed, kept, (0,) * len(sizes), floors)

    def _divided(self, scores: Scores, axis_name: AxisName) -> Scores:
        if self.power is None:
            return scores
        if isinstance(scores, Magnitude):
            return Magnitude(self._relative(scores.x, axis_name))
        return self._relative(scores, axis_name)

    def _relative(self, scores: Array, axis_name: AxisName) -> Array:
        x = trees.wide(scores)
        usable = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        norm = norms.global_norm(usable, scaled=True, axis_name=axis_name)
        norm = jnp.where(norm > 0, norm, 1)  # all scores are zero
        return x * (norm ** -jnp.asarray(self.power, norm.dtype)).astype(x.dtype)
