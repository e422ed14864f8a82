"""In what shape zeros come: from scores and a sparsity to masks.

| you want to keep ...                          | use                                  |
| --------------------------------------------- | ------------------------------------ |
| any entries (the default)                     | `Unstructured`                       |
| n of every m neighbors                        | `NofM`                               |
| whole tiles                                   | `Blocks`                             |
| whole neurons or filters                      | `Channels`                           |
| the same number of inputs for every output    | `FanIn`                              |
| one of these inside another                   | `Combined`                           |

A pattern is a frozen value with one method, `masks`, which gets the scores of all
leaves by path and may compare them.  Where a network needs several patterns, pass a
function of path and leaf; the leaves of each pattern then share the sparsity among
themselves.

Inside `jax.shard_map`, `NofM` and `Blocks` need groups and blocks that lie on one
device, and `Channels` and `FanIn` refuse a leaf that is split.  Under `jax.jit` all are
right on any mesh.
"""

from ._blocks import Blocks
from ._by_path import PatternByPath
from ._channels import Channels
from ._combined import Combined
from ._fan_in import FanIn
from ._n_of_m import NofM
from ._pattern import Pattern
from ._pools import l2, max, mean
from ._unstructured import Unstructured

__all__ = [
    "Blocks",
    "Channels",
    "Combined",
    "FanIn",
    "NofM",
    "Pattern",
    "PatternByPath",
    "Unstructured",
    "l2",
    "max",
    "mean",
]


def __dir__() -> list[str]:
    return __all__
