"""Keep training stable and models sparse, with pure Optax transforms.

| you want to …                            | use                                       |
| ---------------------------------------- | ----------------------------------------- |
| clip without tuning a threshold          | `adaptive_clip`                           |
| clip as Optax does, right in any dtype   | `clip`, `clip_by_global_norm`,            |
| and under any sharding                   | `clip_by_block_rms`, `adaptive_grad_clip` |
| make parameters exactly sparse           | `sparsify`                                |
| see what a chain did                     | `metrics`                                 |
| see what a model is made of              | `report`                                  |
| say what matters, in what shape zeros    | `scores`, `patterns`, `allocations`       |
| come, how layers share them              |                                           |
| make, count and pack masks               | `masks`                                   |
| measure a tree without overflow          | `norms`                                   |
| say which axes are measured together     | `scopes`                                  |
| let a stream of norms set a threshold    | `thresholds`                              |
| find the k-th largest without sorting    | `selection`                               |
"""

import importlib.metadata

from . import (
    allocations as allocations,
    masks as masks,
    norms as norms,
    patterns as patterns,
    scopes as scopes,
    scores as scores,
    selection as selection,
    thresholds as thresholds,
)
from ._metrics import metrics as metrics
from ._report import report as report
from .clipping._adaptive import adaptive_clip as adaptive_clip
from .clipping._element import clip as clip
from .clipping._norm import (
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
)
from .clipping._unit import adaptive_grad_clip as adaptive_grad_clip
from .sparsity._sparsify import sparsify as sparsify

__version__ = importlib.metadata.version("clipjax")
