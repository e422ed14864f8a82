"""How the scores of a block become one."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import norms
from .._core import trees
from .._core.types import Axes


def mean(scores: Float[Array, "..."], axis: Axes) -> Float[Array, "..."]:
    """Returns the mean over some axes, kept with length 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.patterns.mean(jnp.array([[3.0, 4.0]]), -1)
        Array([[3.5]], dtype=float32)
    """
    return jnp.mean(trees.wide(scores), axis, keepdims=True)


def max(scores: Float[Array, "..."], axis: Axes) -> Float[Array, "..."]:
    """Returns the highest score over some axes, kept with length 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.patterns.max(jnp.array([[3.0, 4.0]]), -1)
        Array([[4.]], dtype=float32)
    """
    return jnp.max(trees.wide(scores), axis, keepdims=True)


def l2(scores: Float[Array, "..."], axis: Axes) -> Float[Array, "..."]:
    """Returns the Euclidean norm over some axes, kept with length 1.

    ‖max(s, 0)‖₂ - ‖max(-s, 0)‖₂, so that scores below zero count against a block

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.patterns.l2(jnp.array([[3.0, 4.0], [0.0, -4.0]]), -1)
        Array([[ 5.],
               [-4.]], dtype=float32)
    """
    wide = trees.wide(scores)
    signs = {"above": jnp.maximum(wide, 0), "below": jnp.maximum(-wide, 0)}
    norm = norms.unit_norms(signs, dict.fromkeys(signs, axis))
    return norm["above"] - norm["below"]
