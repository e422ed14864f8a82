"""Thresholds by moving averages of the norms."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._rules import Feed, Norms
from ._windows import clipped


class Moments(NamedTuple):
    """Moving averages of norms."""

    norm_mean: Norms
    norm_variance: Norms
    norms_seen: Int[Array, "..."]  # how many norms are in them


class Averages:
    """What rules by moving averages share: they begin with none."""

    def empty(self, norm: Norms) -> Moments:
        """Returns averages of nothing."""
        none = jnp.zeros_like(norm, jnp.int32)  # each anew, so that they can be donated
        return Moments(
            jnp.zeros_like(norm, jnp.float32), jnp.zeros_like(norm, jnp.float32), none
        )


def squarable(norm: Norms) -> Norms:
    """Cuts a norm off where its square would be infinite."""
    return jnp.minimum(norm, 1e18)


def one_more(seen: Int[Array, "..."]) -> Int[Array, "..."]:
    """Adds one, up to the last int32."""
    return jnp.minimum(seen, jnp.iinfo(jnp.int32).max - 1) + 1


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
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.MovingMean(2.0, warmup=2)
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([3.0, 5.0]):
        ...     memory = rule.remember(memory, norm, jnp.float32(jnp.inf), norm)
        >>> rule.threshold(memory, jnp.float32(9.0))
        Array(6., dtype=float32)
    """

    factor: Number | Schedule = 1.05
    decay: Number | Schedule = 0.98
    feed: Feed = clipped
    warmup: int = 100

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(factor=self.factor)
        check.below_one(decay=self.decay)
        check.function(feed=self.feed)
        check.whole(0, warmup=self.warmup)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm; infinity in the first ones."""
        bound = trees.like(self.factor, memory.norm_mean) * memory.norm_mean
        return jnp.where(memory.norms_seen >= self.warmup, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = self.feed(norm, threshold, clipped_norm)
        decay = trees.like(self.decay, mean)
        least = jnp.where(seen == 0, norm, jnp.minimum(mean, norm))
        moved = decay * mean + (1 - decay) * norm
        return Moments(
            jnp.where(seen < self.warmup, least, moved), variance, one_more(seen)
        )


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
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.MovingSquare(4.0, decay=0.5, warmup=1)
        >>> norm = jnp.float32(3.0)
        >>> memory = rule.remember(rule.empty(norm), norm, norm, norm)
        >>> jnp.round(rule.threshold(memory, jnp.float32(9.0)) ** 2, 3)
        Array(18., dtype=float32)
    """

    factor: Number | Schedule = 5000.0
    decay: Number | Schedule = 0.999
    feed: Feed = clipped
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
            jnp.zeros([], jnp.float32),
            jnp.zeros_like(norm, jnp.float32),
            jnp.zeros([], jnp.int32),
        )

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        variance = memory.norm_variance
        bound = jnp.sqrt(trees.like(self.factor, variance)) * jnp.sqrt(variance)
        known = (memory.norms_seen >= self.warmup) & (variance > 0)
        return jnp.where(known, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = squarable(self.feed(norm, threshold, clipped_norm))
        decay = trees.like(self.decay, norm)
        moved = decay * variance + (1 - decay) * norm**2
        return Moments(mean, moved, one_more(seen))


@dataclasses.dataclass(frozen=True)
class MovingPeak(Averages):
    """A moving mean of the norms, with the norm itself.

    T = m/(1 - dᵗ), with m ← d·m + (1-d)·n

    Args:
        decay: d in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.MovingPeak(0.5)
        >>> norm = jnp.float32(2.0)
        >>> memory = rule.remember(rule.empty(norm), norm, norm, norm)
        >>> rule.threshold(memory, jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    decay: Number | Schedule = 0.999

    def __post_init__(self):
        """Checks the arguments."""
        check.below_one(decay=self.decay)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, _, seen = self.remember(memory, norm, norm, norm)
        return mean / (1 - trees.like(self.decay, mean) ** seen.astype(jnp.float32))

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        del threshold, clipped_norm
        mean, variance, seen = memory
        decay = trees.like(self.decay, mean)
        return Moments(decay * mean + (1 - decay) * norm, variance, one_more(seen))


@dataclasses.dataclass(frozen=True)
class MovingRatio(Averages):
    """A moving mean over a moving root mean square, both with the norm itself.

    T = m̂/(√v̂ + 10⁻⁸), with m ← d₁·m + (1-d₁)·n, v ← d₂·v + (1-d₂)·n², debiased

    About one where the norms are alike: a threshold without the norms' own scale.

    Args:
        mean_decay: d₁ in [0, 1).
        square_decay: d₂ in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.MovingRatio(0.5, 0.5)
        >>> rule.threshold(rule.empty(jnp.float32(0.0)), jnp.float32(7.0))
        Array(1., dtype=float32)
    """

    mean_decay: Number | Schedule = 0.7
    square_decay: Number | Schedule = 0.9

    def __post_init__(self):
        """Checks the arguments."""
        check.below_one(mean_decay=self.mean_decay, square_decay=self.square_decay)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, square, seen = self._moved(memory, norm)
        steps = seen.astype(jnp.float32)
        unbiased = mean / (1 - trees.like(self.mean_decay, mean) ** steps)
        root = jnp.sqrt(square / (1 - trees.like(self.square_decay, mean) ** steps))
        return unbiased / (root + 1e-8)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the averages with one more norm."""
        del threshold, clipped_norm
        return self._moved(memory, norm)

    def _moved(self, memory: Moments, norm: Norms) -> Moments:
        first, second = (
            trees.like(self.mean_decay, norm),
            trees.like(self.square_decay, norm),
        )
        norm = squarable(norm)
        return Moments(
            first * memory.norm_mean + (1 - first) * norm,
            second * memory.norm_variance + (1 - second) * norm**2,
            one_more(memory.norms_seen),
        )
