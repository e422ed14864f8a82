"""How much each entry matters: a score is any function of a parameter and its update.

The entries with the highest scores are kept.  A score may be negative, and NaN ranks
lowest.  Sparsity comes from comparing scores, never from their size.

A score with a memory is a frozen value with the methods of `Tracked`.  Scores of a loss
and a batch, or of what went into a layer, are computed once, outside of the step: trees
in, trees out, for `clipjax.prune`.
"""

from ..selection._keys import Magnitude
from ._calibrated import sparse_gpt, wanda
from ._one_shot import grasp, random, snip
from ._plain import Score, magnitude, saliency
from ._tracked import Fisher, Movement, Random, Tracked

__all__ = [
    "Fisher",
    "Magnitude",
    "Movement",
    "Random",
    "Score",
    "Tracked",
    "grasp",
    "magnitude",
    "random",
    "saliency",
    "snip",
    "sparse_gpt",
    "wanda",
]


def __dir__() -> list[str]:
    return __all__
