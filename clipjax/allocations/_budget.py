"""Exact numbers of entries to keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from .._core import checks as check
from .._core.types import Number
from ..selection import _counts as counts
from ..selection._counts import Count


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


def kept_of(
    sparsity: Number | Float[Array, " n"],
    size: int | Sequence[int],
    floor: int | Sequence[int],
) -> Count:
    """Returns n - ⌈s·n⌉, but the floor at least, for one array or for each."""
    kept = counts.of(size) - counts.zeros_of(sparsity, size)
    return counts.clip(kept, counts.of(floor), counts.of(size))


def exactly(wanted: Count, kept: Count, sizes: Sequence[int], floors: Count) -> Count:
    """Brings numbers into their bounds, and their sum to what is wanted.

    The largest arrays that have room make up for the others.
    """
    most = counts.of(sizes)
    floors = counts.clip(floors, counts.of(0), most)
    kept = counts.clip(kept, floors, most)
    rest = wanted - counts.total(kept)
    order = counts.largest_first(sizes)
    more = counts.filled(rest, most - kept, order=order)
    less = counts.filled(counts.of(0) - rest, kept - floors, order=order)
    return counts.plus(kept, more) - less
