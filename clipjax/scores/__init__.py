"""How much each entry matters: a score is any function of a parameter and its update.

The entries with the highest scores are kept.  A score may be negative, and NaN ranks
lowest.  Sparsity comes from comparing scores, never from their size.

A score with a memory is a frozen value with the methods of `Tracked`.  Scores of a loss
and a batch, or of what went into a layer, are computed once, outside of the step: trees
in, trees out, for `clipjax.prune`.
"""

from ._calibrated import sparse_gpt as sparse_gpt, wanda as wanda
from ._one_shot import grasp as grasp, random as random, snip as snip
from ._plain import (
    Magnitude as Magnitude,
    Score as Score,
    magnitude as magnitude,
    saliency as saliency,
)
from ._tracked import (
    Fisher as Fisher,
    Movement as Movement,
    Random as Random,
    Tracked as Tracked,
)
