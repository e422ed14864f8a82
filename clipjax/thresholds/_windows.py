"""Thresholds by the last norms, which are all remembered, and what is remembered.

The rule of `clipjax.adaptive_clip` is here.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._rules import Feed, Norms

_LATELY = 16  # of the last norms: eight of them are a new level


def raw(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it came.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.raw(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(9., dtype=float32)
    """
    del threshold, clipped_norm
    return norm


def clipped(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it went.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.clipped(
        ...     jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0)
        ... )
        Array(2., dtype=float32)
    """
    del norm, threshold
    return clipped_norm


@dataclasses.dataclass(frozen=True)
class Winsorized:
    """Remembers a norm at no more than a multiple of the threshold.

    Args:
        most: ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.thresholds.Winsorized(3.0)(
        ...     jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0)
        ... )
        Array(6., dtype=float32)
    """

    most: Number | Schedule = 3.0

    def __post_init__(self):
        """Checks the argument."""
        check.at_least(1, most=self.most)

    def __call__(self, norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
        """Returns what is remembered."""
        del clipped_norm
        return jnp.minimum(norm, trees.like(self.most, norm) * threshold)


class _Window:
    """The last norms, newest first, and -1 where there is none yet."""

    feed: Feed
    window: int

    def empty(self, norm: Norms) -> Float[Array, "..."]:
        """Returns a history with nothing in it, marked by -1."""
        zeros = jnp.zeros_like(norm, jnp.float32)
        shape = (*zeros.shape, self.window)
        return jnp.broadcast_to(zeros[..., None], shape) - 1

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
class WindowedQuantile(_Window):
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
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.WindowedQuantile(
        ...     quantile=0.5, factor=2.0, window=4
        ... )
        >>> rule.threshold(jnp.array([3.0, 1.0, 2.0, -1.0]), jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    quantile: Number | Schedule = 0.9
    factor: Number | Schedule = 1.05
    feed: Feed = Winsorized()
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
        check.flag(current=self.current)

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
        return trees.like(self.factor, between) * between


@dataclasses.dataclass(frozen=True)
class WindowedSpread(_Window):
    """As far above the median of the last norms as they spread, unless by a heavy tail.

    Tₜ = factor · max(m·min(rᵃ, (c/r)⁶), s), r = Q₀.₉/m

    Here m and Q₀.₉ are the median and the 0.9-quantile of the last w norms, as they are
    remembered, and s is the median of the last 16; each is the norm of the nearest
    rank.  Where norms scatter little the threshold is just above them; where they
    scatter more it is further away, at up to 2.8 medians.  Where they scatter yet more
    they have a heavy tail, and it falls to s.  A lasting rise lifts s after eight
    steps; a burst of seven bad steps does not.

    Args:
        factor: > 0.
        spread: a ≥ 0; norms with lognormal scatter exceed the threshold at 1.28·a of
            their deviations.
        tail: c ≥ 1, the larger, the later a tail is heavy; infinity for never.
        feed: what is remembered of a norm.
        window: w, how many norms are remembered; static.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.WindowedSpread(spread=2.0, window=11)
        >>> norms = jnp.array([1.0, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3])
        >>> rule.threshold(norms, jnp.float32(9.0))  # 2·(3/2)²
        Array(4.5, dtype=float32)
    """

    factor: Number | Schedule = 1.0
    spread: Number | Schedule = 1.8
    tail: Number | Schedule = 2.1
    feed: Feed = Winsorized()
    window: int = 128

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(factor=self.factor)
        check.at_least(1, tail=self.tail)
        check.not_negative(spread=self.spread)
        check.function(feed=self.feed)
        if isinstance(self.feed, Winsorized):
            check.rises(factor=self.factor, most=self.feed.most)
        check.whole(2, window=self.window)

    def threshold(self, memory: Float[Array, "..."], norm: Norms) -> Norms:
        """Returns the threshold for the next norm; infinity for an empty history."""
        del norm
        middle, high = _ranked(memory, 0.5, 0.9)
        (lately,) = _ranked(memory[..., :_LATELY], 0.5)
        spread, tail = (trees.like(x, middle) for x in (self.spread, self.tail))
        tells = jnp.isfinite(middle) & (middle > 0)
        ratio = jnp.where(tells, high / jnp.where(tells, middle, 1), 1)
        times = jnp.minimum(ratio**spread, (tail / ratio) ** 6)
        usual = jnp.maximum(middle * times, lately)
        return trees.like(self.factor, usual) * usual


@dataclasses.dataclass(frozen=True)
class WindowedDeviation(_Window):
    """So many standard deviations above the mean of the last norms.

    Tₜ = μ + k·max(σ, 10⁻⁶), over the last w norms; infinity until there are `warmup`

    Args:
        deviations: k ≥ 0.
        feed: what is remembered of a norm.
        window: w; static.
        warmup: from how many norms on there is a threshold, at most `window`; static.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.WindowedDeviation(2.0, window=4, warmup=2)
        >>> rule.threshold(jnp.array([3.0, 1.0, -1.0, -1.0]), jnp.float32(5.0))
        Array(4., dtype=float32)
    """

    deviations: Number | Schedule = 3.0
    feed: Feed = raw
    window: int = 128
    warmup: int = 64

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(deviations=self.deviations)
        check.function(feed=self.feed)
        check.whole(2, window=self.window, warmup=self.warmup)
        check.between(2, self.window, warmup=self.warmup)

    def threshold(self, memory: Float[Array, "..."], norm: Norms) -> Norms:
        """Returns the threshold for the next norm."""
        known = memory >= 0
        number = jnp.sum(known, axis=-1, dtype=jnp.int32)
        entries = jnp.maximum(number, 1).astype(jnp.float32)
        mean = jnp.sum(jnp.where(known, memory, 0), axis=-1) / entries
        apart = jnp.where(known, memory - mean[..., None], 0)
        deviation = jnp.sqrt(jnp.sum(apart**2, axis=-1) / entries)
        bound = mean + trees.like(self.deviations, mean) * jnp.maximum(deviation, 1e-6)
        return jnp.where(number >= self.warmup, bound, jnp.inf)


def _ranked(history: Float[Array, "..."], *shares: float) -> list[Float[Array, "..."]]:
    """Returns the norms of what is known with these ranks; infinity if nothing is."""
    known = history >= 0
    ordered = jnp.sort(jnp.where(known, history, jnp.inf), axis=-1)
    last = jnp.sum(known, axis=-1, keepdims=True, dtype=jnp.float32) - 1
    places = jnp.arange(history.shape[-1], dtype=jnp.float32)
    wanted = [jnp.round(share * jnp.maximum(last, 0)) for share in shares]
    return [jnp.sum(jnp.where(places == w, ordered, 0), axis=-1) for w in wanted]


def _push(history: Float[Array, "..."], norm: Norms) -> Float[Array, "..."]:
    norm = norm.astype(history.dtype)
    return jnp.concatenate([norm[..., None], history[..., :-1]], axis=-1)
