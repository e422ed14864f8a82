"""Thresholds that know no scale: a mean over a root mean square."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .._core import checks as check
from ._history import Norms
from ._moments import Averages, Moments, one_more, squarable
from ._numbers import like


@dataclasses.dataclass(frozen=True)
class MovingRatio(Averages):
    """A moving mean over a moving root mean square, both with the norm itself.

    T = m̂/(√v̂ + 10⁻⁸), with m ← d₁·m + (1-d₁)·n, v ← d₂·v + (1-d₂)·n², debiased

    About one where the norms are alike: a threshold without the norms' own scale.

    Args:
        mean_decay: d₁ in [0, 1).
        square_decay: d₂ in [0, 1).

    Example:
        >>> rule = MovingRatio(0.5, 0.5)
        >>> rule.threshold(rule.empty(jnp.float32(0.0)), jnp.float32(7.0))
        Array(1., dtype=float32)
    """

    mean_decay: Any = 0.7
    square_decay: Any = 0.9

    def __post_init__(self):
        """Checks the arguments."""
        check.below_one(mean_decay=self.mean_decay, square_decay=self.square_decay)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, square, seen = self._moved(memory, norm)
        steps = seen.astype(jnp.float32)
        unbiased = mean / (1 - like(self.mean_decay, mean) ** steps)
        root = jnp.sqrt(square / (1 - like(self.square_decay, mean) ** steps))
        return unbiased / (root + 1e-8)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the averages with one more norm."""
        del threshold, clipped_norm
        return self._moved(memory, norm)

    def _moved(self, memory: Moments, norm: Norms) -> Moments:
        first, second = like(self.mean_decay, norm), like(self.square_decay, norm)
        norm = squarable(norm)
        return Moments(
            first * memory.norm_mean + (1 - first) * norm,
            second * memory.norm_variance + (1 - second) * norm**2,
            one_more(memory.norms_seen),
        )
