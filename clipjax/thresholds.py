"""Thresholds that a stream of norms sets for itself.

A history holds the last norms that were remembered, -1 where there is none yet; nothing
non-finite ever enters it.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _checks as check
from ._types import Number


@dataclasses.dataclass(frozen=True)
class WindowedQuantile:
    """A multiple of a quantile of the last norms.

    Tₜ = factor · Q_q(n̂ₜ₋₁, …, n̂ₜ₋w), with n̂ₜ = min(nₜ, growth·Tₜ)

    A norm is remembered at no more than `growth` thresholds: one spike cannot lift the
    quantile, while a lasting change of level fills the window and does.

    Args:
        quantile: q in [0, 1].
        factor: how far above the quantile the threshold stands, > 0.
        growth: how many thresholds a norm may be remembered at, ≥ 1; the threshold
            can rise only if factor·growth > 1.
        window: w, how many norms are remembered; static.
    """

    quantile: Number = 0.9
    factor: Number = 1.05
    growth: Number = 3.0
    window: int = 64

    def __post_init__(self):
        """Checks the arguments."""
        check.between(0, 1, quantile=self.quantile)
        check.positive(factor=self.factor)
        check.at_least(1, growth=self.growth)
        check.rises(factor=self.factor, growth=self.growth)
        check.whole(2, window=self.window)

    def empty(self) -> Float[Array, " window"]:
        """Returns a history with nothing in it."""
        return jnp.full(self.window, -1, jnp.float32)

    def threshold(self, history: Float[Array, " window"]) -> Float[Array, ""]:
        """Returns the threshold for the next norm; infinity for an empty history.

        Between two remembered norms the quantile is interpolated.

        Example:
            >>> rule = WindowedQuantile(quantile=0.5, factor=2.0, window=4)
            >>> rule.threshold(jnp.array([3.0, 1.0, 2.0, -1.0]))
            Array(4., dtype=float32)
        """
        known = history >= 0
        last = jnp.maximum(jnp.sum(known, dtype=jnp.int32) - 1, 0)
        ordered = jnp.sort(jnp.where(known, history, jnp.inf))
        place = jnp.asarray(self.quantile, jnp.float32) * last.astype(jnp.float32)
        below = jnp.floor(place).astype(jnp.int32)
        low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
        share = place - below.astype(jnp.float32)
        between = jnp.where(share > 0, low + (high - low) * share, low)
        return jnp.asarray(self.factor, jnp.float32) * between

    def remember(
        self,
        history: Float[Array, " window"],
        norm: Float[Array, ""],
        threshold: Float[Array, ""],
    ) -> Float[Array, " window"]:
        """Returns the history with one more norm, if that is finite and not zero.

        Zeros would pull the threshold to a level from which no multiple leads back.

        Example:
            >>> rule = WindowedQuantile(window=2)
            >>> rule.remember(rule.empty(), jnp.float32(100), jnp.float32(1))
            Array([ 3., -1.], dtype=float32)
        """
        capped = jnp.minimum(norm, jnp.asarray(self.growth, jnp.float32) * threshold)
        longer = jnp.concatenate([capped[None], history[:-1]])
        return jnp.where(jnp.isfinite(norm) & (norm > 0), longer, history)
