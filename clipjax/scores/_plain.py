"""Scores without a memory."""

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

    Reads no update, and is not written to memory while it is compared.

    Args:
        param: the parameter.
        update: not used.

    Example:
        >>> magnitude(jnp.array([0.5, -2.0]))
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
    """Scores an entry by how much its update has to do with its distance from zero.

    s = |θ·u|

    With a gradient as u it is, to first order, by how much the loss changes where the
    entry becomes zero.  In `clipjax.sparsify`, last in a chain, u is what is about to
    be added: after plain SGD, which gives all entries the gradient times one number,
    the order is the same.  An entry that is zero scores zero.  Computed in float32 or
    wider; NaN where θ or u is, or where an infinity meets a zero.

    Args:
        param: the parameter θ.
        update: the gradient or the update u.

    Example:
        >>> saliency(jnp.array([0.5, -2.0]), jnp.array([8.0, 1.0]))
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
    """Multiplies in float32 or wider; the conjugate of a complex parameter.

    Example:
        >>> product(jnp.float16(300), jnp.float16(300))
        Array(90000., dtype=float32)
    """
    with jax.numpy_dtype_promotion("standard"):  # of a float64 with a float32
        return jnp.conj(trees.wide(param)) * trees.wide(update)
