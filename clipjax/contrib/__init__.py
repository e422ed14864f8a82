"""Published methods that few need: correct and tested, but try a flat name first.

| you want ...                              | use                                      |
| ----------------------------------------- | ---------------------------------------- |
| a clip by the norms of the past           | `autoclip`, `clip_by_percentile`,        |
|                                           | `quantile_clip`, `zclip`, `adagc`,       |
|                                           | `aggc`, `clip_by_moving_sigma`,          |
|                                           | `spam_clip`, `stable_spam_clip`,         |
|                                           | `gradient_stabilizer`                    |
| the threshold that lowers the loss most   | `greedy_clip`                            |
| attention logits below a threshold        | `qk_clip`                                |
| to be sparse from the start, moved by     | `sparse_evolutionary` (SET),             |
| chance or by momentum                     | `sparse_momentum` (SNFS)                 |
| to prune in rounds, and rewind            | `rewinding`                              |
| to alternate dense and sparse (AC/DC)     | `cyclic_schedule`                        |
| gates that learn to shut                  | `gates`                                  |
| to choose input features                  | `lassonet`, `selected_features`          |
| zeros by dual averaging                   | `regularized_dual_averaging`             |
| sparse gradients between devices          | `deep_gradient_compression`              |
"""

from . import gates
from ._by_history import (
    adagc,
    aggc,
    autoclip,
    clip_by_moving_sigma,
    clip_by_percentile,
    gradient_stabilizer,
    quantile_clip,
    spam_clip,
    stable_spam_clip,
    zclip,
)
from ._deep_compression import deep_gradient_compression
from ._dual_averaging import regularized_dual_averaging
from ._features import selected_features
from ._greedy import greedy_clip
from ._lassonet import lassonet
from ._qk import qk_clip
from ._rewinding import rewinding
from ._schedules import cyclic_schedule
from ._set import sparse_evolutionary
from ._snfs import sparse_momentum

__all__ = [
    "adagc",
    "aggc",
    "autoclip",
    "clip_by_moving_sigma",
    "clip_by_percentile",
    "cyclic_schedule",
    "deep_gradient_compression",
    "gates",
    "gradient_stabilizer",
    "greedy_clip",
    "lassonet",
    "qk_clip",
    "quantile_clip",
    "regularized_dual_averaging",
    "rewinding",
    "selected_features",
    "spam_clip",
    "sparse_evolutionary",
    "sparse_momentum",
    "stable_spam_clip",
    "zclip",
]


def __dir__() -> list[str]:
    return __all__
