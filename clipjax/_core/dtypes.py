"""Sums of leaves that differ in dtype, also where JAX promotes none by itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def common(one: Any, other: Any) -> Any:
    """Returns the dtype in which two leaves are added."""
    with jax.numpy_dtype_promotion("standard"):  # nothing else is computed in here
        return jnp.promote_types(jnp.result_type(one), jnp.result_type(other))
