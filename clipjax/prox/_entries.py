"""What all penalties share: functions of the magnitudes of entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._core import trees
from .._core.types import Axes, AxisName, Number, Schedule


@runtime_checkable
class Penalty(Protocol):
    """The methods of a penalty."""

    def prox(
        self,
        x: Inexact[Array, "..."],
        step_size: Number,
        *,
        axis: Axes | None = None,
        axis_name: AxisName = None,
    ) -> Inexact[Array, "..."]:
        """Returns argmin_z ½·‖z - x‖² + η·penalty(z), in the dtype of `x`.

        Args:
            x: one leaf, real or complex.
            step_size: η ≥ 0.
            axis: the axes that a group spans, `None` for all; only penalties on groups
                read it.
            axis_name: inside `jax.shard_map`, the mesh axes over which groups are
                split; only penalties on groups read it.
        """
        ...

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty of a leaf, in float32 or wider."""
        ...


def resized(x: Array, function: Callable[[Array], Array]) -> Array:
    """Applies a function to the magnitudes; keeps signs, phases and the dtype."""
    wide = trees.wide(x)
    old = jnp.abs(wide)
    new = function(old)
    if jnp.iscomplexobj(wide):
        factor = new / jnp.where(old > 0, old, 1)  # what is zero stays zero
        result = jnp.where(new == old, wide, wide * factor.astype(wide.dtype))
    else:
        result = jnp.copysign(new, wide)
    result = jnp.where(new == 0, jnp.zeros_like(result), result)
    return result.astype(jnp.result_type(x))


def total(
    x: Array, function: Callable[[Array], Array], strength: Number | Schedule
) -> Float[Array, ""]:
    """Returns λ·Σᵢ f(|xᵢ|), in float32 or wider."""
    value = jnp.sum(function(jnp.abs(trees.wide(x))))
    return trees.like(strength, value) * value
