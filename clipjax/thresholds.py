"""Thresholds that the parameters set, or the norms of the past.

A rule with a history is a frozen value of three methods: `empty` returns its memory
before the first norm, `threshold` the bound for a norm, and `remember` the memory after
it.  Norms may come in arrays of any shape; each entry has a history of its own.  The
caller sees to it that nothing non-finite is remembered, and no zero, which would pull a
threshold to where no multiple leads back from.

What is remembered of a norm is the rule's `feed`.  `raw`: one spike inflates a mean
and hides the next.  `clipped`: a threshold may never follow a lasting rise.
`Winsorized`, in between, is robust to both.  Numbers may be traced values or, in
`clip_by`, schedules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from . import _checks as check
from ._types import Number

Norms = Float[Array, "..."]
"""One norm, or one for each part that is measured by itself."""

Feed = Callable[[Norms, Norms, Norms], Norms]
"""From a norm, its threshold and the norm after the clip to what is remembered."""


@runtime_checkable
class History(Protocol):
    """What a rule with a history has to offer."""

    def empty(self, norm: Norms) -> PyTree:
        """Returns the memory before the first norm, for norms of this shape."""
        ...

    def threshold(self, memory: PyTree, norm: Norms) -> Norms:
        """Returns the threshold for this norm; infinity where there is none yet."""
        ...

    def remember(
        self, memory: PyTree, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> PyTree:
        """Returns the memory after this norm."""
        ...


def raw(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it came.

    Example:
        >>> raw(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(9., dtype=float32)
    """
    del threshold, clipped_norm
    return norm


def clipped(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it went.

    Example:
        >>> clipped(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(2., dtype=float32)
    """
    del norm, threshold
    return clipped_norm


@dataclasses.dataclass(frozen=True)
class Winsorized:
    """Remembers a norm at no more than so many thresholds.

    Args:
        most: ≥ 1.

    Example:
        >>> Winsorized(3.0)(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(6., dtype=float32)
    """

    most: Number = 3.0

    def __post_init__(self):
        """Checks the argument."""
        check.at_least(1, most=self.most)

    def __call__(self, norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
        """Returns what is remembered."""
        del clipped_norm
        return jnp.minimum(norm, _as(self.most, norm) * threshold)


@dataclasses.dataclass(frozen=True)
class Relative:
    """A multiple of the norm of the parameters that are measured together.

    T = factor·max(‖θ‖, least)

    Args:
        factor: ≥ 0.
        least: > 0, the least parameter norm, so that what starts at zero can move.

    Example:
        >>> Relative(0.5).of(jnp.array([100.0, 0.0])) * 2
        Array([1.e+02, 1.e-03], dtype=float32)
    """

    factor: Any
    least: Any = 1e-3

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(factor=self.factor)
        check.positive(least=self.least)

    def of(self, param_norm: Norms) -> Norms:
        """Returns the threshold for parameters of this norm."""
        larger = jnp.maximum(param_norm, _as(self.least, param_norm))
        return _as(self.factor, param_norm) * larger


@dataclasses.dataclass(frozen=True)
class WindowedQuantile:
    """A multiple of a quantile of the last norms.

    Tₜ = factor · Q_q(n̂ₜ₋₁, …, n̂ₜ₋w), with n̂ₜ = min(nₜ, 3·Tₜ) if not said otherwise

    A norm is remembered at no more than three thresholds: one spike cannot lift the
    quantile, while a lasting change of level fills the window and does.  Between two
    remembered norms the quantile is interpolated.  While the window fills, the quantile
    is that of what is there.

    Args:
        quantile: q in [0, 1].
        factor: how far above the quantile the threshold stands, > 0.
        feed: what is remembered of a norm.
        window: w, how many norms are remembered; static.
        current: whether the norm itself is among those of its own quantile; static.

    Example:
        >>> rule = WindowedQuantile(quantile=0.5, factor=2.0, window=4)
        >>> rule.threshold(jnp.array([3.0, 1.0, 2.0, -1.0]), jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    quantile: Any = 0.9
    factor: Any = 1.05
    feed: Feed = dataclasses.field(default=Winsorized(), metadata={"static": True})
    window: int = 64
    current: bool = False

    def __post_init__(self):
        """Checks the arguments."""
        check.between(0, 1, quantile=self.quantile)
        check.positive(factor=self.factor)
        check.function(feed=self.feed)
        if isinstance(self.feed, Winsorized):
            check.rises(factor=self.factor, most=self.feed.most)
        check.whole(2, window=self.window)

    def empty(self, norm: Norms) -> Float[Array, "..."]:
        """Returns a history with nothing in it, marked by -1."""
        return _repeated(norm, self.window) - 1

    def threshold(self, memory: Float[Array, "..."], norm: Norms) -> Norms:
        """Returns the threshold for a norm; infinity for an empty history."""
        history = _push(memory, norm) if self.current else memory
        known = history >= 0
        last = jnp.maximum(jnp.sum(known, axis=-1, dtype=jnp.int32) - 1, 0)[..., None]
        ordered = jnp.sort(jnp.where(known, history, jnp.inf), axis=-1)
        place = jnp.asarray(self.quantile, jnp.float32) * last.astype(jnp.float32)
        below = jnp.floor(place).astype(jnp.int32)
        low = jnp.take_along_axis(ordered, below, axis=-1)
        high = jnp.take_along_axis(ordered, jnp.minimum(below + 1, last), axis=-1)
        share = place - below.astype(jnp.float32)
        between = jnp.where(share > 0, low + (high - low) * share, low)[..., 0]
        return _as(self.factor, between) * between

    def remember(
        self,
        memory: Float[Array, "..."],
        norm: Norms,
        threshold: Norms,
        clipped_norm: Norms,
    ) -> Float[Array, "..."]:
        """Returns the history with one more norm."""
        return _push(memory, self.feed(norm, threshold, clipped_norm))


@dataclasses.dataclass(frozen=True)
class WindowedDeviation:
    """So many standard deviations above the mean of the last norms.

    Tₜ = μ + k·max(σ, 10⁻⁶), over the last w norms; infinity until there are `warmup`

    Args:
        deviations: k ≥ 0.
        feed: what is remembered of a norm.
        window: w; static.
        warmup: from how many norms on there is a threshold, at most `window`; static.

    Example:
        >>> rule = WindowedDeviation(2.0, window=4, warmup=2)
        >>> rule.threshold(jnp.array([3.0, 1.0, -1.0, -1.0]), jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    deviations: Any = 3.0
    feed: Feed = dataclasses.field(default=raw, metadata={"static": True})
    window: int = 128
    warmup: int = 64

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(deviations=self.deviations)
        check.function(feed=self.feed)
        check.whole(2, window=self.window, warmup=self.warmup)
        check.between(2, self.window, warmup=self.warmup)

    def empty(self, norm: Norms) -> Float[Array, "..."]:
        """Returns a history with nothing in it, marked by -1."""
        return _repeated(norm, self.window) - 1

    def threshold(self, memory: Float[Array, "..."], norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        known = memory >= 0
        number = jnp.sum(known, axis=-1, dtype=jnp.int32)
        entries = jnp.maximum(number, 1).astype(jnp.float32)
        mean = jnp.sum(jnp.where(known, memory, 0), axis=-1) / entries
        apart = jnp.where(known, memory - mean[..., None], 0)
        deviation = jnp.sqrt(jnp.sum(apart**2, axis=-1) / entries)
        bound = mean + _as(self.deviations, mean) * jnp.maximum(deviation, 1e-6)
        return jnp.where(number >= self.warmup, bound, jnp.inf)

    def remember(
        self,
        memory: Float[Array, "..."],
        norm: Norms,
        threshold: Norms,
        clipped_norm: Norms,
    ) -> Float[Array, "..."]:
        """Returns the history with one more norm."""
        return _push(memory, self.feed(norm, threshold, clipped_norm))


class Moments(NamedTuple):
    """Moving averages of norms."""

    norm_mean: Norms
    norm_variance: Norms
    norms_seen: Int[Array, "..."]  # how many norms are in them


def at_limit(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier to the limit: μ + z*·σ.

    Example:
        >>> at_limit(*(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0)))
        Array(2., dtype=float32)
    """
    del score
    return mean + limit * deviation


def at_mean(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier to the mean: μ.

    Example:
        >>> at_mean(*(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0)))
        Array(1., dtype=float32)
    """
    del deviation, score, limit
    return mean


def reciprocal(mean: Norms, deviation: Norms, score: Norms, limit: Norms) -> Norms:
    """Brings an outlier the nearer to the mean, the farther it is: μ + z*·σ·(z*/z).

    Example:
        >>> reciprocal(*(jnp.float32(x) for x in (1.0, 0.5, 10.0, 2.0)))
        Array(1.2, dtype=float32)
    """
    return mean + limit * deviation * limit / jnp.maximum(score, limit)


@dataclasses.dataclass(frozen=True)
class MovingDeviation:
    """A z-score: so many standard deviations above a moving mean.

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
        >>> rule = MovingDeviation(2.0, target=at_limit, warmup=2)
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([3.0, 1.0]):
        ...     memory = rule.remember(memory, norm, jnp.float32(jnp.inf), norm)
        >>> rule.threshold(memory, jnp.float32(9.0))
        Array(4., dtype=float32)
    """

    deviations: Any = 2.5
    decay: Any = 0.97
    factor: Any = 1.0
    target: Callable = dataclasses.field(default=reciprocal, metadata={"static": True})
    feed: Feed = dataclasses.field(default=clipped, metadata={"static": True})
    warmup: int = 25

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(deviations=self.deviations, factor=self.factor)
        check.below_one(decay=self.decay)
        check.function(target=self.target, feed=self.feed)
        check.whole(1, warmup=self.warmup)

    def empty(self, norm: Norms) -> Moments:
        """Returns averages of nothing."""
        return _no_moments(norm)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm; infinity for one that is no outlier."""
        mean, deviation = memory.norm_mean, jnp.sqrt(memory.norm_variance)
        limit = _as(self.deviations, mean)
        score = (norm - mean) / (deviation + 1e-6)
        bound = _as(self.factor, mean) * self.target(mean, deviation, score, limit)
        outlier = (memory.norms_seen >= self.warmup) & (score > limit)
        return jnp.where(outlier, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the averages with one more norm."""
        mean, variance, seen = memory
        norm = self.feed(norm, threshold, clipped_norm)
        norm = jnp.minimum(norm, 1e18)  # whose square is finite
        decay = _as(self.decay, mean)
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
            _one_more(seen),
        )


@dataclasses.dataclass(frozen=True)
class MovingMean:
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

    def empty(self, norm: Norms) -> Moments:
        """Returns an average of nothing."""
        return _no_moments(norm)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm; infinity in the first ones."""
        bound = _as(self.factor, memory.norm_mean) * memory.norm_mean
        return jnp.where(memory.norms_seen >= self.warmup, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = self.feed(norm, threshold, clipped_norm)
        decay = _as(self.decay, mean)
        least = jnp.where(seen == 0, norm, jnp.minimum(mean, norm))
        moved = decay * mean + (1 - decay) * norm
        return Moments(
            jnp.where(seen < self.warmup, least, moved), variance, _one_more(seen)
        )


@dataclasses.dataclass(frozen=True)
class MovingRatio:
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

    def empty(self, norm: Norms) -> Moments:
        """Returns averages of nothing."""
        return _no_moments(norm)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, square, seen = self._moved(memory, norm)
        steps = seen.astype(jnp.float32)
        unbiased = mean / (1 - _as(self.mean_decay, mean) ** steps)
        root = jnp.sqrt(square / (1 - _as(self.square_decay, mean) ** steps))
        return unbiased / (root + 1e-8)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the averages with one more norm."""
        del threshold, clipped_norm
        return self._moved(memory, norm)

    def _moved(self, memory: Moments, norm: Norms) -> Moments:
        first, second = _as(self.mean_decay, norm), _as(self.square_decay, norm)
        norm = jnp.minimum(norm, 1e18)  # whose square is finite
        return Moments(
            first * memory.norm_mean + (1 - first) * norm,
            second * memory.norm_variance + (1 - second) * norm**2,
            _one_more(memory.norms_seen),
        )


@dataclasses.dataclass(frozen=True)
class MovingPeak:
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

    def empty(self, norm: Norms) -> Moments:
        """Returns an average of nothing."""
        return _no_moments(norm)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        mean, _, seen = self.remember(memory, norm, norm, norm)
        return mean / (1 - _as(self.decay, mean) ** seen.astype(jnp.float32))

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        del threshold, clipped_norm
        mean, variance, seen = memory
        decay = _as(self.decay, mean)
        return Moments(decay * mean + (1 - decay) * norm, variance, _one_more(seen))


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
        return Moments(jnp.zeros([], jnp.float32), _zeros(norm), _count())

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        variance = memory.norm_variance
        bound = jnp.sqrt(_as(self.factor, variance)) * jnp.sqrt(variance)
        known = (memory.norms_seen >= self.warmup) & (variance > 0)
        return jnp.where(known, bound, jnp.inf)

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the average with one more norm."""
        mean, variance, seen = memory
        norm = jnp.minimum(self.feed(norm, threshold, clipped_norm), 1e18)
        decay = _as(self.decay, norm)
        moved = decay * variance + (1 - decay) * norm**2
        return Moments(mean, moved, _one_more(seen))


@dataclasses.dataclass(frozen=True)
class QuantileTracker:
    """A quantile of all norms, followed by steps up and down.

    T ← T·exp(-rate·(1[n ≤ T] - q)): in the long run a share q of norms lies below T

    Args:
        quantile: q in [0, 1].
        rate: > 0, the step in the logarithm.
        start: > 0, the first threshold.

    Example:
        >>> rule = QuantileTracker(0.5, rate=0.2, start=4.0)
        >>> norm, bound = jnp.float32(9.0), jnp.float32(4.0)
        >>> memory = rule.remember(rule.empty(norm), norm, bound, bound)
        >>> rule.threshold(memory, norm) / 4  # exp(0.1)
        Array(1.105171, dtype=float32)
    """

    quantile: Any = 0.5
    rate: Any = 0.2
    start: Any = 1.0

    def __post_init__(self):
        """Checks the arguments."""
        check.between(0, 1, quantile=self.quantile)
        check.positive(rate=self.rate, start=self.start)

    def empty(self, norm: Norms) -> Moments:
        """Returns no steps: the sum of those taken is the mean's place."""
        return _no_moments(norm)

    def threshold(self, memory: Moments, norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        mean = memory.norm_mean
        return _as(self.start, mean) * jnp.exp(jnp.clip(mean, -80, 80))

    def remember(
        self, memory: Moments, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Moments:
        """Returns the memory after one step."""
        del clipped_norm
        mean, variance, seen = memory
        below = (norm <= threshold).astype(mean.dtype)
        moved = mean - _as(self.rate, mean) * (below - _as(self.quantile, mean))
        return Moments(jnp.clip(moved, -80, 80), variance, _one_more(seen))


@dataclasses.dataclass(frozen=True)
class Lowest:
    """The lowest of several thresholds.

    Args:
        rules: with a history each, or numbers; in `clip_by`, or schedules.

    Example:
        >>> rule = Lowest((WindowedQuantile(window=2), 3.0))
        >>> rule.threshold(rule.empty(jnp.float32(0.0)), jnp.float32(5.0))
        Array(3., dtype=float32)
    """

    rules: tuple[Any, ...]

    def __post_init__(self):
        """Checks the argument."""
        for rule in self.rules:
            if not isinstance(rule, History):
                check.not_negative(rules=rule)

    def empty(self, norm: Norms) -> tuple:
        """Returns the memory of each."""
        return tuple(
            r.empty(norm) if isinstance(r, History) else () for r in self.rules
        )

    def threshold(self, memory: tuple, norm: Norms) -> Norms:
        """Returns the lowest."""
        lowest = jnp.full_like(norm, jnp.inf, jnp.float32)
        for rule, own in zip(self.rules, memory, strict=True):
            is_history = isinstance(rule, History)
            bound = rule.threshold(own, norm) if is_history else _as(rule, lowest)
            lowest = jnp.minimum(lowest, bound)
        return lowest

    def remember(
        self, memory: tuple, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> tuple:
        """Returns the memory of each, as if it had clipped alone."""
        del threshold, clipped_norm
        result = []
        for rule, own in zip(self.rules, memory, strict=True):
            if isinstance(rule, History):
                bound = rule.threshold(own, norm)  # that of the others is none of its
                own = rule.remember(own, norm, bound, jnp.minimum(norm, bound))
            result.append(own)
        return tuple(result)


def at_step(rule: Any, step: int | Int[Array, ""]) -> Any:
    """Returns a rule with its schedules replaced by their values at this step.

    Example:
        >>> at_step(Relative(lambda step: step * 2.0), 3).factor
        6.0
    """
    if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
        return rule
    changes = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if callable(value) and not field.metadata.get("static"):
            changes[field.name] = value(step)
        if isinstance(value, tuple):
            changes[field.name] = tuple(_part_at(part, step) for part in value)
    return dataclasses.replace(rule, **changes)


def _part_at(part: Any, step: int | Int[Array, ""]) -> Any:
    if dataclasses.is_dataclass(part) or not callable(part):
        return at_step(part, step)
    return part(step)


def _as(number: Any, like: Array) -> Array:
    return jnp.asarray(number).astype(like.dtype)


def _zeros(norm: Norms) -> Norms:
    return jnp.zeros_like(norm, jnp.float32)


def _count() -> Int[Array, ""]:
    return jnp.zeros([], jnp.int32)


def _no_moments(norm: Norms) -> Moments:
    return Moments(_zeros(norm), _zeros(norm), jnp.zeros_like(norm, jnp.int32))


def _one_more(seen: Int[Array, "..."]) -> Int[Array, "..."]:
    return jnp.minimum(seen, jnp.iinfo(jnp.int32).max - 1) + 1


def _repeated(norm: Norms, window: int) -> Float[Array, "..."]:
    zeros = _zeros(norm)
    return jnp.broadcast_to(zeros[..., None], (*zeros.shape, window))


def _push(history: Float[Array, "..."], norm: Norms) -> Float[Array, "..."]:
    norm = norm.astype(history.dtype)
    return jnp.concatenate([norm[..., None], history[..., :-1]], axis=-1)
