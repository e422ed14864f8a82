"""Thresholds by the moving mean of squares."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .._core import checks as check
from ._feeds import clipped
from ._history import Feed, Norms
from ._moments import Moments, one_more, squarable
from ._numbers import like, zeros_like


@dataclasses.dataclass(frozen=True)
class MovingSquare:
    """A multiple of a moving root mean square of the norms.

    T = √(factor·v); after each norm v ← d·v + (1-d)·n̂²; infinity in the first steps

    Args:
        factor: > 0, of the mean square.
        decay: d in [0, 1).
        feed: what is remembered of a norm.
        warmup: how many norms have no threshold; static.

    Example:
        >>> rule = MovingSquare(4.0, decay=0.5, warmup=1)
        >>> norm = jnp.float32(3.0)
        >>> memory = rule.remember(rule.empty(norm), norm, norm, norm)
        >>> jnp.round(rule.threshold(memory, jnp.float32(9.0)) ** 2, 3)
        Array(18., dtype=float32)
    """

    factor: Any = 5000.0
    decay: Any = 0.999
    feed: Feed = dataclasses.field(default=clipped, metadata={"static": True})
    warmup: int = 20

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(factor=self.factor)
        check.below_one(decay=self.decay)
        check.function(feed=self.feed)
        check.whole(0, warmup=self.warmup)

    def empty(self, norm: Norms) -> Moments:
        """Returns an average of nothing."""
        return Moments(
            jnp.zeros([], jnp.float32), zeros_like(norm), jnp.zeros([], jnp.int32)
        )

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        variance = memory.norm_variance
        bound = jnp.sqrt(like(self.factor, variance)) * jnp.sqrt(variance)
        known = (memory.norms_seen >= self.warmup) & (variance > 0)
        return jnp.where(known, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = squarable(self.feed(norm, threshold, clipped_norm))
        decay = like(self.decay, norm)
        moved = decay * variance + (1 - decay) * norm**2
        return Moments(mean, moved, one_more(seen))
