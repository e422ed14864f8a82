"""How many entries each array keeps, so that all together meet one sparsity.

An allocation is a function of paths, shapes, a sparsity that may be traced, and scores;
it returns an integer for each array.  Write your own, with whatever numbers:

    def half_of_the_head(paths, shapes, sparsity, scores=None):
        keep = lambda path: 0.5 if path == "head" else 0.1
        return [int(keep(p) * math.prod(s)) for p, s in zip(paths, shapes)]

With `patterns.Channels` or `patterns.Blocks` shapes and scores are those of the units,
and so are the numbers.  Numbers that are traced are brought between none and all.

Of ours, `floor` entries of every array always stay, so that no layer dies: where the
floors ask for more than the sparsity leaves, they win.  Set one with
`functools.partial(uniform, floor=16)`.
"""

from ._budget import Allocation
from ._by_path import by_path, excluding
from ._compared import global_, normalized
from ._lamp import lamp
from ._shapes import erdos_renyi, erdos_renyi_kernel, square_root, uniform

__all__ = [
    "Allocation",
    "by_path",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "excluding",
    "global_",
    "lamp",
    "normalized",
    "square_root",
    "uniform",
]


def __dir__() -> list[str]:
    return __all__
