"""How much each entry matters: a score is any function of a parameter and its update.

The entries with the highest scores are kept; only their order counts.  A score may be
negative, and NaN ranks lowest.

| you want to ...                                    | use                           |
| -------------------------------------------------- | ----------------------------- |
| keep large entries (the default)                   | `magnitude`                   |
| also see what a step does to them                  | `saliency`                    |
| keep what moves away from zero, in fine-tuning     | `Movement()`                  |
| keep what the loss depends on most, over many      | `Fisher()`                    |
| steps                                              |                               |
| compare with chance                                | `Random(key)`, `random`       |
| prune once before training, from a loss and a      | `snip`, `grasp`               |
| batch                                              |                               |
| prune a trained network once, from its activations | `wanda`, `sparse_gpt`         |

A score that remembers has the methods of `Tracked`.  The functions of the last two rows
return a tree of scores for `clipjax.prune`.
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
