"""Reading the state of `latent`: the dense weights, and the first sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from .. import masks
from .._core import trees
from .._sparsity._store import unpack
from ._latent import LatentState


def sparse_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Sets to zero what the masks of `latent` do not keep.

    For the start of a training: `init` cannot change parameters, so without this the
    first gradient is that of the dense network.  Later on it changes nothing.

    Args:
        opt_state: the state of any optimizer with a `latent` in it, or
            `optimizer.opt_state` of an `nnx.Optimizer`.
        params: the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
        >>> state = clipjax.latent(optax.adam(1e-3), 0.5).init(params)
        >>> clipjax.latents.sparse_params(state, params)["kernel"]
        Array([[ 3.,  0.],
               [-2.,  0.]], dtype=float32)
    """
    bits = _collected(opt_state, lambda state: state.latent_masks.mask_bits)
    return trees.map_by_path(
        lambda param, own: masks.apply(unpack(own, param), param), params, bits
    )


def latent_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters with the latent weights in place of the sparse ones.

    These are the dense weights z before curve and mask, in float32 or wider.

    Args:
        opt_state: the state of any optimizer with a `latent` in it, or
            `optimizer.opt_state` of an `nnx.Optimizer`.
        params: the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
        >>> state = clipjax.latent(optax.adam(1e-3), 0.5).init(params)
        >>> clipjax.latents.latent_params(
        ...     state, clipjax.latents.sparse_params(state, params)
        ... )["kernel"]
        Array([[ 3. ,  1. ],
               [-2. ,  0.5]], dtype=float32)
    """
    latents = _collected(opt_state, lambda state: state.latents)
    return trees.replaced(params, latents)


def _collected(
    opt_state: PyTree, read: Callable[[LatentState], dict[str, Any]]
) -> dict[str, Array]:
    """Returns by path what all states of `latent` hold, as plain arrays."""
    nodes = jax.tree.leaves(
        opt_state, is_leaf=lambda node: isinstance(node, LatentState)
    )
    states = [node for node in nodes if isinstance(node, LatentState)]
    if not states:
        raise ValueError(
            "opt_state holds no state of `latent`. Pass what `tx.init(params)` or"
            " `tx.update(...)` of an optimizer with a `latent` returned."
        )
    found = {}
    for state in states:
        for path, variable in read(state).items():
            (found[path],) = jax.tree.leaves(variable)  # NNX keeps it in a variable
    return found
