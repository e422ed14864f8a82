"""Keep training stable and models sparse, with pure Optax transforms.

| you want to ...                         | use                                        |
| --------------------------------------- | ------------------------------------------ |
| clip without tuning a threshold         | `adaptive_clip`                            |
| clip as Optax does, right in any dtype  | `clip`, `clip_by_global_norm`,             |
| and under any sharding                  | `clip_by_block_rms`, `adaptive_grad_clip`, |
|                                         | `normalize_by_update_norm`                 |
| clip each leaf; clip singular values    | `clip_by_leaf_norm`; `spectral_clip`       |
| clip in a way of your own               | `clip_by` with `Bound`, from `scopes`,     |
|                                         | `norms`, `thresholds` and `responses`      |
| clip the gradient of each example       | `per_example`                              |
| leave out the steps that are spikes     | `skip_spikes`                              |
| clip without bias                       | `carry_clipped`                            |
| restart an optimizer's moments          | `reset_moments`                            |
| make parameters exactly sparse          | `sparsify`; once: `prune`                  |
| hide from the optimizer what is pruned  | `sparse`                                   |
| be sparse from the start                | `rigl`, `static_sparse`                    |
| keep dense weights behind sparse ones   | `latent` with `latents`                    |
| train with a penalty, to exact zeros    | `proximal` with `prox`                     |
| keep zeros to the end                   | `constraints`, `finalize`, `lint`          |
| send sparse gradients between devices   | `compression`                              |
| see what a chain did                    | `metrics`                                  |
| see what a model is made of             | `report`                                   |
| say which entries matter                | `scores`                                   |
| say in what shape zeros come            | `patterns`                                 |
| say how leaves share the zeros          | `allocations`                              |
| make, count and pack masks              | `masks`                                    |
| find the k-th largest without sorting   | `selection`                                |
| use a published method that few need    | `contrib`                                  |
"""

import importlib.metadata

from . import (
    allocations,
    compression,
    constraints,
    contrib,
    latents,
    masks,
    norms,
    patterns,
    per_example,
    prox,
    responses,
    scopes,
    scores,
    selection,
    thresholds,
)
from ._clipping._adaptive import adaptive_clip
from ._clipping._carry import carry_clipped
from ._clipping._element import clip
from ._clipping._engine import Bound, clip_by
from ._clipping._norm import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_leaf_norm,
    normalize_by_update_norm,
)
from ._clipping._reset import reset_moments
from ._clipping._skip import skip_spikes
from ._clipping._spectral import spectral_clip
from ._clipping._unit import adaptive_grad_clip
from ._networks._finalize import finalize
from ._networks._lint import lint
from ._networks._metrics import metrics
from ._networks._prune import prune
from ._networks._report import report
from ._proximal import proximal
from ._sparsity._dynamic import rigl, static_sparse
from ._sparsity._sparse import sparse
from ._sparsity._sparsify import sparsify
from .latents._latent import latent

__version__ = importlib.metadata.version("clipjax")

__all__ = [
    "Bound",
    "adaptive_clip",
    "adaptive_grad_clip",
    "allocations",
    "carry_clipped",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "compression",
    "constraints",
    "contrib",
    "finalize",
    "latent",
    "latents",
    "lint",
    "masks",
    "metrics",
    "normalize_by_update_norm",
    "norms",
    "patterns",
    "per_example",
    "prox",
    "proximal",
    "prune",
    "report",
    "reset_moments",
    "responses",
    "rigl",
    "scopes",
    "scores",
    "selection",
    "skip_spikes",
    "sparse",
    "sparsify",
    "spectral_clip",
    "static_sparse",
    "thresholds",
]


def __dir__() -> list[str]:
    return __all__
