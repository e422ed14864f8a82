"""Thresholds by the least norm so far."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._rules import Feed, Norms
from ._windows import raw


@dataclasses.dataclass(frozen=True)
class RunningMinimum:
    """A multiple of the least norm so far, which may slowly be forgotten.

    Tₜ = factor·mₜ₋₁; after each norm m ← min(n̂, m·(1 + rise))

    The first norm has no threshold.  A spike never raises this one, a single small norm
    lowers it for long: without `rise` it cannot go up again, so let it rise, or wrap it
    in `Released`.

    Args:
        factor: > 0; below 1 + noise, most norms are clipped.
        rise: ≥ 0, by what share the minimum grows at each norm above it.
        feed: what is remembered of a norm.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.RunningMinimum(2.0)
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([3.0, 1.0, 9.0]):
        ...     memory = rule.remember(memory, norm, norm, norm)
        >>> rule.threshold(memory, jnp.float32(5.0))
        Array(2., dtype=float32)
    """

    factor: Number | Schedule = 2.0
    rise: Number | Schedule = 0.0
    feed: Feed = raw

    def __post_init__(self):
        """Checks the arguments."""
        check.positive(factor=self.factor)
        check.not_negative(rise=self.rise)
        check.function(feed=self.feed)

    def empty(self, norm: Norms) -> Float[Array, "..."]:
        """Returns no minimum, marked by -1."""
        return jnp.zeros_like(norm, jnp.float32) - 1

    def threshold(self, memory: Float[Array, "..."], norm: Norms) -> Norms:
        """Returns the threshold for the next norm; infinity for the first."""
        return jnp.where(memory >= 0, trees.like(self.factor, memory) * memory, jnp.inf)

    def remember(
        self,
        memory: Float[Array, "..."],
        norm: Norms,
        threshold: Norms,
        clipped_norm: Norms,
    ) -> Float[Array, "..."]:
        """Returns the minimum with one more norm."""
        norm = self.feed(norm, threshold, clipped_norm).astype(memory.dtype)
        risen = memory * (1 + trees.like(self.rise, memory))
        return jnp.where(memory >= 0, jnp.minimum(norm, risen), norm)
