"""Steps to a given value of a parameter, exact where that is zero.

-θ is never cast to the dtype of an update: a rounded -θ would not cancel θ.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .dtypes import common


def widened(update: Any, param: Array) -> Array:
    """Casts an update to the dtype of its parameter, if that is wider."""
    return jnp.asarray(update, common(update, param))


def step_to(update: Any, param: Array, target: Array) -> Array:
    """Returns the step to a target, in place of an update and of its widened dtype."""
    dtype = common(update, param)
    return target.astype(param.dtype).astype(dtype) - param.astype(dtype)


def kept(update: Any, param: Array, mask: Bool[Array, "..."]) -> Array:
    """Returns the update of what a mask keeps, and the step to zero of all else."""
    dtype = common(update, param)
    return jnp.where(mask, jnp.asarray(update, dtype), -param.astype(dtype))
