"""How much each entry matters: a score is any function of a parameter and its update.

The entries with the highest scores are kept.  A score may be negative, and NaN ranks
lowest.  Sparsity comes from comparing scores, never from their size.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

Score = Callable[[Array, Array | None], Array]
"""From a parameter and its update, if it has one, to the score of every entry."""


def magnitude(
    param: Num[Array, "..."], update: Num[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Scores an entry by its distance from zero.

    s = |θ|

    Reads no update, and so costs no memory while it is compared.

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
