"""Thresholds that the parameters set."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._rules import Norms


@dataclasses.dataclass(frozen=True)
class Relative:
    """A multiple of the norm of the parameters that are measured together.

    T = factor·max(‖θ‖, least)

    Args:
        factor: ≥ 0.
        least: > 0, the least parameter norm, so that what starts at zero can move.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.Relative(0.5).of(jnp.array([100.0, 0.0])) * 2
        Array([1.e+02, 1.e-03], dtype=float32)
    """

    factor: Number | Schedule
    least: Number | Schedule = 1e-3

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(factor=self.factor)
        check.positive(least=self.least)

    def of(self, param_norm: Norms) -> Norms:
        """Returns the threshold for parameters of this norm."""
        larger = jnp.maximum(param_norm, trees.like(self.least, param_norm))
        larger = jnp.where(jnp.isfinite(param_norm), larger, jnp.inf)
        return trees.like(self.factor, param_norm) * larger
