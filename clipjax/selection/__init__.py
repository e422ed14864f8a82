"""The k-th largest of one array or of many, found by counting.

No sort, scatter, gather or concatenation: a pass counts how many entries reach each of
a few thresholds, and the next pass looks between two of them.  So the compiled program
holds one scalar all-reduce a pass when the entries are split over devices, and a k that
is traced compiles once.
"""

from ._select import kth_largest, largest, select

__all__ = [
    "kth_largest",
    "largest",
    "select",
]


def __dir__() -> list[str]:
    return __all__
