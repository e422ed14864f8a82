"""Numbers beside norms."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ._history import Norms


def like(number: Any, norm: Array) -> Array:
    """Returns a number in the dtype of a norm."""
    return jnp.asarray(number).astype(norm.dtype)


def zeros_like(norm: Norms) -> Norms:
    """Returns zeros in float32, laid out as the norms."""
    return jnp.zeros_like(norm, jnp.float32)
