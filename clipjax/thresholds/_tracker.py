"""Thresholds that follow a quantile by small steps."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._averages import Averages, Moments, one_more
from ._rules import Norms


@dataclasses.dataclass(frozen=True)
class QuantileTracker(Averages):
    """A quantile of all norms, followed by steps up and down.

    T ← T·exp(-rate·(1[n ≤ T] - q)): in the long run a share q of norms lies below T

    Args:
        quantile: q in [0, 1].
        rate: > 0, the step in the logarithm.
        start: > 0, the first threshold.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.QuantileTracker(0.5, rate=0.2, start=4.0)
        >>> norm, bound = jnp.float32(9.0), jnp.float32(4.0)
        >>> memory = rule.remember(rule.empty(norm), norm, bound, bound)
        >>> rule.threshold(memory, norm) / 4  # exp(0.1)
        Array(1.105171, dtype=float32)
    """

    quantile: Number | Schedule = 0.5
    rate: Number | Schedule = 0.2
    start: Number | Schedule = 1.0

    def __post_init__(self):
        """Checks the arguments."""
        check.between(0, 1, quantile=self.quantile)
        check.positive(rate=self.rate, start=self.start)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        mean = memory.norm_mean
        return trees.like(self.start, mean) * jnp.exp(jnp.clip(mean, -80, 80))

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the memory after one step."""
        del clipped_norm
        mean, variance, seen = memory
        below = (norm <= threshold).astype(mean.dtype)
        moved = mean - trees.like(self.rate, mean) * (
            below - trees.like(self.quantile, mean)
        )
        return Moments(jnp.clip(moved, -80, 80), variance, one_more(seen))
