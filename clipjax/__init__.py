"""Keep training stable and models sparse, with pure Optax transforms.

| you want to …                            | use                                       |
| ---------------------------------------- | ----------------------------------------- |
| clip without tuning a threshold          | `adaptive_clip`                           |
| clip as Optax does, right in any dtype   | `clip`, `clip_by_global_norm`,            |
| and under any sharding                   | `clip_by_block_rms`,                      |
|                                          | `adaptive_grad_clip`,                     |
|                                          | `normalize_by_update_norm`                |
| clip as a paper does                     | `clip_by_leaf_norm`, `smooth_clip`,       |
|                                          | `spectral_clip`, `spectra_clip`,          |
|                                          | `autoclip`, `clip_by_percentile`,         |
|                                          | `quantile_clip`, `zclip`, `adagc`,        |
|                                          | `aggc`, `clip_by_moving_sigma`,           |
|                                          | `spam_clip`, `stable_spam_clip`,          |
|                                          | `gradient_stabilizer`                     |
| clip in a way of your own                | `clip_by`, of `scopes`, `norms`,          |
|                                          | `thresholds` and `responses`              |
| leave out the steps that are spikes      | `skip_spikes`                             |
| clip without bias                        | `carry_clipped`                           |
| restart moments after a spike or a time  | `reset_moments`                           |
| take the threshold that helps most       | `greedy_clip`                             |
| keep one example from dominating         | `per_example`                             |
| keep attention logits bounded            | `qk_clip`                                 |
| make parameters exactly sparse           | `sparsify`, `prune`, `cyclic_schedule`    |
| hide what is pruned from the optimizer   | `sparse`                                  |
| be sparse from the start                 | `rigl`, `sparse_evolutionary`,            |
|                                          | `sparse_momentum`, `static_sparse`        |
| keep dense weights behind sparse ones    | `latent` with `reparametrizations`,       |
|                                          | `sparse_params`, `latent_params`          |
| prune in rounds, and rewind              | `rewinding`                               |
| send sparse gradients                    | `error_feedback` with `compressors`,      |
|                                          | `deep_gradient_compression`               |
| keep zeros to the end                    | `keep_zeros`, `finalize`, `lint`          |
| train with a penalty, to exact zeros     | `proximal` with `prox`,                   |
|                                          | `regularized_dual_averaging`              |
| learn which gates to shut                | `gates`                                   |
| choose input features                    | `selected_features`                       |
| see what a chain did                     | `metrics`                                 |
| see what a model is made of              | `report`                                  |
| say what matters, in what shape zeros    | `scores`, `patterns`, `allocations`       |
| come, how layers share them              |                                           |
| make, count and pack masks               | `masks`                                   |
| find the k-th largest without sorting    | `selection`                               |
"""

import importlib.metadata

from . import (
    allocations as allocations,
    compressors as compressors,
    gates as gates,
    masks as masks,
    norms as norms,
    patterns as patterns,
    per_example as per_example,
    prox as prox,
    reparametrizations as reparametrizations,
    responses as responses,
    scopes as scopes,
    scores as scores,
    selection as selection,
    thresholds as thresholds,
)
from ._metrics import metrics as metrics
from ._report import report as report
from .clipping._adaptive import adaptive_clip as adaptive_clip
from .clipping._carry import carry_clipped as carry_clipped
from .clipping._element import clip as clip
from .clipping._engine import clip_by as clip_by
from .clipping._greedy import greedy_clip as greedy_clip
from .clipping._history import (
    adagc as adagc,
    aggc as aggc,
    autoclip as autoclip,
    clip_by_moving_sigma as clip_by_moving_sigma,
    clip_by_percentile as clip_by_percentile,
    gradient_stabilizer as gradient_stabilizer,
    quantile_clip as quantile_clip,
    spam_clip as spam_clip,
    stable_spam_clip as stable_spam_clip,
    zclip as zclip,
)
from .clipping._norm import (
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_leaf_norm as clip_by_leaf_norm,
    normalize_by_update_norm as normalize_by_update_norm,
    smooth_clip as smooth_clip,
)
from .clipping._qk import qk_clip as qk_clip
from .clipping._reset import reset_moments as reset_moments
from .clipping._skip import skip_spikes as skip_spikes
from .clipping._spectral import (
    spectra_clip as spectra_clip,
    spectral_clip as spectral_clip,
)
from .clipping._unit import adaptive_grad_clip as adaptive_grad_clip
from .sparsity._dynamic import (
    rigl as rigl,
    sparse_evolutionary as sparse_evolutionary,
    sparse_momentum as sparse_momentum,
    static_sparse as static_sparse,
)
from .sparsity._features import selected_features as selected_features
from .sparsity._feedback import (
    deep_gradient_compression as deep_gradient_compression,
    error_feedback as error_feedback,
)
from .sparsity._finish import finalize as finalize, keep_zeros as keep_zeros
from .sparsity._latent import latent as latent
from .sparsity._latent_params import (
    latent_params as latent_params,
    sparse_params as sparse_params,
)
from .sparsity._lint import Finding as Finding, lint as lint
from .sparsity._proximal import proximal as proximal
from .sparsity._prune import prune as prune
from .sparsity._rda import regularized_dual_averaging as regularized_dual_averaging
from .sparsity._rewind import rewinding as rewinding
from .sparsity._schedules import cyclic_schedule as cyclic_schedule
from .sparsity._sparse import sparse as sparse
from .sparsity._sparsify import sparsify as sparsify

__version__ = importlib.metadata.version("clipjax")
