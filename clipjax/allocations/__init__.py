"""How many entries each array may keep, so that all together meet one sparsity.

An allocation is a function of shapes and a sparsity; it returns a `Budget`.  Numbers of
entries are exact integers, and the sparsity may be traced.  `floor` entries of every
array always stay, so that no layer dies: where the floors ask for more than the
sparsity leaves, they win.  Set one with `functools.partial(uniform, floor=16)`.

Two kinds need more than shapes, and are frozen values that can be called all the same.
One that goes by path has a method `at`; see `at_paths`.  One that looks at the scores
has a method `weigh`; see `allot`.
"""

from ._budget import Allocation, Budget
from ._by_path import at_paths, by_path, excluding, weighs
from ._lamp import lamp
from ._shapes import erdos_renyi, erdos_renyi_kernel, global_, uniform
from ._weighed import allot, normalized

__all__ = [
    "Allocation",
    "Budget",
    "allot",
    "at_paths",
    "by_path",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "excluding",
    "global_",
    "lamp",
    "normalized",
    "uniform",
    "weighs",
]


def __dir__() -> list[str]:
    return __all__
