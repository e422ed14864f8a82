"""Exact numbers of entries to keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import _checks as check, _counts as counts
from .._counts import Count
from .._types import Number


class Budget(NamedTuple):
    """How many entries to keep, and among which arrays they are compared."""

    kept: Count  # for every group, [groups]
    groups: tuple[int, ...]  # the group of each array
    floors: tuple[int, ...]  # how many entries each array keeps in any case


Allocation = Callable[[Sequence[tuple[int, ...]], Number], Budget]
"""From the shapes of the arrays and the sparsity of all of them to a budget."""


def check_numbers(sparsity: Number, floor: int) -> None:
    """Raises unless both are possible."""
    check.between(0, 1, sparsity=sparsity)
    check.whole(0, floor=floor)


def kept_of(sparsity: Number, size: int, floor: int) -> Count:
    """Returns n - ⌈s·n⌉, but the floor at least."""
    kept = counts.of(size) - counts.zeros_of(sparsity, size)
    return counts.clip(kept, counts.of(floor), counts.of(size))


def exactly(
    wanted: Count,
    kept: list[Count],
    sizes: Sequence[int],
    floors: Sequence[int] | Sequence[Count],
) -> Count:
    """Brings numbers into their bounds, and their sum to what is wanted."""
    bounds = [
        (counts.of(low), counts.of(high))
        for low, high in zip(floors, sizes, strict=True)
    ]
    result = [counts.clip(k, *b) for k, b in zip(kept, bounds, strict=True)]
    rest = wanted - counts.total(counts.stack(result))
    for i in sorted(range(len(kept)), key=lambda i: -sizes[i]):
        moved = result[i] - (counts.of(0) - rest)
        result[i] = counts.clip(moved, *bounds[i])
        rest = moved - result[i]
    return counts.stack(result)
