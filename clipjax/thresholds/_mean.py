"""Thresholds by the moving mean of the norms."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from .._core import checks as check
from ._feeds import clipped
from ._history import Feed, Norms
from ._moments import Averages, Moments, one_more
from ._numbers import like


@dataclasses.dataclass(frozen=True)
class MovingMean(Averages):
    """A multiple of a moving mean of the norms.

    T = factor·m; after each norm m ← d·m + (1-d)·n̂

    In the first `warmup` norms there is no threshold, and m is the least of them.

    Args:
        factor: > 0.
        decay: d in [0, 1).
        feed: what is remembered of a norm.
        warmup: how many norms; static.  Without any, m starts at zero.

    Example:
        >>> rule = MovingMean(2.0, warmup=2)
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([3.0, 5.0]):
        ...     memory = rule.remember(memory, norm, jnp.float32(jnp.inf), norm)
        >>> rule.threshold(memory, jnp.float32(9.0))
        Array(6., dtype=float32)
    """

    factor: Any = 1.05
    decay: Any = 0.98
    feed: Feed = dataclasses.field(default=clipped, metadata={"static": True})
    warmup: int = 100

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(factor=self.factor)
        check.below_one(decay=self.decay)
        check.function(feed=self.feed)
        check.whole(0, warmup=self.warmup)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm; infinity in the first ones."""
        bound = like(self.factor, memory.norm_mean) * memory.norm_mean
        return jnp.where(memory.norms_seen >= self.warmup, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = self.feed(norm, threshold, clipped_norm)
        decay = like(self.decay, mean)
        least = jnp.where(seen == 0, norm, jnp.minimum(mean, norm))
        moved = decay * mean + (1 - decay) * norm
        return Moments(
            jnp.where(seen < self.warmup, least, moved), variance, one_more(seen)
        )
