"""Losses that come as extra arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import sharding
from .types import AxisName


def scalar(value: Any, said: str, axis_name: AxisName) -> Float[Array, ""]:
    """Returns a loss in float32, averaged where devices differ.

    Raises what is said, with the shape behind, if it is none.
    """
    loss = jnp.asarray(value).astype(jnp.float32)
    if loss.ndim:
        raise ValueError(f"{said} {loss.shape}. Pass the mean.")
    return sharding.over(jax.lax.pmean, loss, loss, axis_name)
