"""Outliers by their z-score, and where they are brought."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._averages import Averages, Moments, one_more, squarable
from ._rules import Feed, Norms
from ._windows import clipped


def at_limit(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier to the limit: μ + z*·σ.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.at_limit(
        ...     *(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0))
        ... )
        Array(2., dtype=float32)
    """
    del score
    return mean + limit * deviation


def at_mean(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier to the mean: μ.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.at_mean(*(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0)))
        Array(1., dtype=float32)
    """
    del deviation, score, limit
    return mean


def reciprocal(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier the nearer to the mean, the farther it is: μ + z*·σ·(z*/z).

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.reciprocal(
        ...     *(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0))
        ... )
        Array(1.2, dtype=float32)
    """
    return mean + limit * deviation * limit / jnp.maximum(score, limit)


@dataclasses.dataclass(frozen=True)
class MovingDeviation(Averages):
    """A z-score: some standard deviations above a moving mean.

    z = (n - μ)/(σ + 10⁻⁶); where z > z*, T = μ + z*·σ·(z*/z) or what `target` says;
    after each norm μ ← d·μ + (1-d)·n̂ and σ² ← d·σ² + (1-d)·(n̂ - μ)²

    The first `warmup` norms are remembered raw, and have no threshold.

    Args:
        deviations: z* > 0.
        decay: d in [0, 1).
        target: where an outlier is brought: `reciprocal`, `at_limit` or `at_mean`.
        factor: times which the target is the threshold, > 0.
        feed: what is remembered of a norm.
        warmup: norms before there is a threshold; static.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.MovingDeviation(
        ...     2.0, target=clipjax.thresholds.at_limit, warmup=2
        ... )
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([3.0, 1.0]):
        ...     memory = rule.remember(memory, norm, jnp.float32(jnp.inf), norm)
        >>> rule.threshold(memory, jnp.float32(9.0))
        Array(4., dtype=float32)
    """

    deviations: Number | Schedule = 2.5
    decay: Number | Schedule = 0.97
    factor: Number | Schedule = 1.0
    target: Callable = reciprocal
    feed: Feed = clipped
    warmup: int = 25

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(deviations=self.deviations, factor=self.factor)
        check.below_one(decay=self.decay)
        check.function(target=self.target, feed=self.feed)
        check.whole(1, warmup=self.warmup)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm; infinity for one that is no outlier."""
        mean, deviation = memory.norm_mean, jnp.sqrt(memory.norm_variance)
        limit = trees.like(self.deviations, mean)
        score = (norm - mean) / (deviation + 1e-6)
        bound = trees.like(self.factor, mean) * self.target(
            mean, deviation, score, limit
        )
        outlier = (memory.norms_seen >= self.warmup) & (score > limit)
        return jnp.where(outlier, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the averages with one more norm."""
        mean, variance, seen = memory
        norm = squarable(self.feed(norm, threshold, clipped_norm))
        decay = trees.like(self.decay, mean)
        moved = decay * mean + (1 - decay) * norm
        spread = decay * variance + (1 - decay) * (norm - moved) ** 2
        # Mean and variance of all norms so far: those of a buffer, without one.
        number = (seen + 1).astype(jnp.float32)
        plain = mean + (norm - mean) / number
        wide = variance + ((norm - mean) * (norm - plain) - variance) / number
        warm = seen < self.warmup
        return Moments(
            jnp.where(warm, plain, moved),
            jnp.where(warm, wide, spread),
            one_more(seen),
        )
