"""Thresholds by a moving mean that has the norm itself in it."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .._core import checks as check
from ._history import Norms
from ._moments import Averages, Moments, one_more
from ._numbers import like


@dataclasses.dataclass(frozen=True)
class MovingPeak(Averages):
    """A moving mean of the norms, with the norm itself.

    T = m/(1 - dᵗ), with m ← d·m + (1-d)·n

    Args:
        decay: d in [0, 1).

    Example:
        >>> rule = MovingPeak(0.5)
        >>> norm = jnp.float32(2.0)
        >>> memory = rule.remember(rule.empty(norm), norm, norm, norm)
        >>> rule.threshold(memory, jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    decay: Any = 0.999

    def __post_init__(self):
        """Checks the arguments."""
        check.below_one(decay=self.decay)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, _, seen = self.remember(memory, norm, norm, norm)
        return mean / (1 - like(self.decay, mean) ** seen.astype(jnp.float32))

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        del threshold, clipped_norm
        mean, variance, seen = memory
        decay = like(self.decay, mean)
        return Moments(decay * mean + (1 - decay) * norm, variance, one_more(seen))
