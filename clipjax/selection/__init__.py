"""The k-th largest of one array or of many, found by counting.

Use it for a threshold or a mask of exactly k entries of large or sharded arrays, where
a sort is slow and gathers them.

Each pass counts how many entries reach each of a few thresholds, and the next pass
looks between two of them: no sort, scatter, gather or concatenation.  So a program
holds one scalar all-reduce a pass where entries are split over devices, and a traced k
compiles once.
"""

from ._select import kth_largest, largest, select

__all__ = [
    "kth_largest",
    "largest",
    "select",
]


def __dir__() -> list[str]:
    return __all__
