"""Moving averages of norms, as rules remember them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from ._history import Norms
from ._numbers import zeros_like


class Moments(NamedTuple):
    """Moving averages of norms."""

    norm_mean: Norms
    norm_variance: Norms
    norms_seen: Int[Array, "..."]  # how many norms are in them


class Averages:
    """What rules by moving averages share: they begin with none."""

    def empty(self, norm: Norms) -> Moments:
        """Returns averages of nothing."""
        none = jnp.zeros_like(norm, jnp.int32)  # each anew, so that they can be donated
        return Moments(zeros_like(norm), zeros_like(norm), none)


def squarable(norm: Norms) -> Norms:
    """Cuts a norm off where its square would be infinite."""
    return jnp.minimum(norm, 1e18)


def one_more(seen: Int[Array, "..."]) -> Int[Array, "..."]:
    """Adds one, up to the last int32."""
    return jnp.minimum(seen, jnp.iinfo(jnp.int32).max - 1) + 1
