"""Scores without a memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from .._core import trees

Score = Callable[[Array, Array | None], Array]
"""From a parameter and its update, if it has one, to the score of every entry."""


def magnitude(
    param: Num[Array, "..."], update: Num[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Scores an entry by its distance from zero.

    s = |θ|

    The default, and the cheapest: nothing is remembered, and the scores are never
    written to memory.

    Args:
        param: the parameter θ.
        update: ignored.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scores.magnitude(jnp.array([0.5, -2.0]))
        Array([0.5, 2. ], dtype=float32)

    Reference:
        Song Han, Jeff Pool, John Tran, William Dally, Learning both Weights and
        Connections for Efficient Neural Networks, 2015,
        https://arxiv.org/abs/1506.02626
    """
    del update
    return jnp.abs(param)


def saliency(
    param: Num[Array, "..."], update: Num[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Scores an entry by its distance from zero times its update.

    s = |θ·u|

    Use it where u is a gradient: then s is, to first order, how much the loss changes
    if the entry becomes zero.  `clipjax.sparse` and `clipjax.latent` pass gradients;
    `clipjax.sparsify` passes the update that the optimizer made, which after plain SGD
    gives the same order.

    Computed in float32 or wider.  NaN where θ or u is NaN, or where one is infinite and
    the other zero.

    Args:
        param: the parameter θ.
        update: the gradient or the update u.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scores.saliency(jnp.array([0.5, -2.0]), jnp.array([8.0, 1.0]))
        Array([4., 2.], dtype=float32)

    Reference:
        Pavlo Molchanov, Stephen Tyree, Tero Karras, Timo Aila, Jan Kautz, Pruning
        Convolutional Neural Networks for Resource Efficient Inference, 2016,
        https://arxiv.org/abs/1611.06440
    """
    if update is None:
        raise ValueError(
            "saliency reads the update, but update is None. Outside of a step, pass"
            " the tree that `scores.snip` returns."
        )
    return jnp.abs(product(param, update))


def product(param: Num[Array, "..."], update: Num[Array, "..."]) -> Array:
    """Multiplies in float32 or wider; takes the conjugate of a complex parameter."""
    with jax.numpy_dtype_promotion("standard"):  # of a float64 with a float32
        return jnp.conj(trees.wide(param)) * trees.wide(update)
