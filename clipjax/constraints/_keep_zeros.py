"""Fine-tuning without losing what a network was given."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .. import masks
from .._core import checks as check, trees
from .._core.eager import compiled
from .._core.types import Where


class KeepZerosState(NamedTuple):
    """What `keep_zeros` remembers: the zeros are in the parameters themselves."""

    step: Int[Array, ""]

    keeps_zeros = True


def keep_zeros(*, where: Where | None = None) -> optax.GradientTransformationExtraArgs:
    """Lets parameters that are zero stay zero.

    uᵢ ← 0 where θᵢ = 0

    Use it last in a chain, to fine-tune a model that is sparse already.

    Nothing is stored or ranked: a parameter that is 0.0 when its update arrives stays
    0.0, whatever the update holds, NaN too.  So one that becomes exactly zero by itself
    is pruned from then on.  The dtype of an update stays as it is.

    Args:
        where: which leaves are sparse, by path and leaf: the same as in training, and
            none that only starts at zero, such as a bias.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = optax.chain(optax.sgd(0.5), clipjax.constraints.keep_zeros())
        >>> params = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> grads = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'bias': Array([-0.5, -0.5], dtype=float32),
         'kernel': Array([[2.5, 0. ]], dtype=float32)}
    """
    where = masks.weights if where is None else where
    check.function(where=where)

    def init(params):
        del params
        return KeepZerosState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("keep_zeros", params)
        leaves = trees.floats(params)
        chosen = {path: leaf for path, leaf in leaves.items() if where(path, leaf)}
        kept = trees.map_by_path(_kept, updates, chosen)
        return kept, KeepZerosState(trees.next_step(state.step))

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _kept(update: Any, param: Array) -> Array:
    return masks.apply(masks.nonzero(param), jnp.asarray(update))
