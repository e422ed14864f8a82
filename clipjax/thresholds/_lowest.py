"""Several thresholds, of which the lowest counts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._rules import History, Norms


@dataclasses.dataclass(frozen=True)
class Lowest:
    """The lowest of several thresholds.

    Args:
        rules: with a history each, or numbers; in `clip_by`, or schedules.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.Lowest(
        ...     (clipjax.thresholds.WindowedQuantile(window=2), 3.0)
        ... )
        >>> rule.threshold(rule.empty(jnp.float32(0.0)), jnp.float32(5.0))
        Array(3., dtype=float32)
    """

    rules: tuple[History | Number | Schedule, ...]

    def __post_init__(self):
        """Checks the argument."""
        for rule in self.rules:
            if not isinstance(rule, History):
                check.not_negative(rules=rule)

    def at_step(self, step: Int[Array, ""]) -> "Lowest":
        """Returns it with the schedules of each at this step."""
        now = (
            trees.at_step(r, step)
            if isinstance(r, History) or not callable(r)
            else r(step)
            for r in self.rules
        )
        return Lowest(tuple(now))

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
            bound = (
                rule.threshold(own, norm) if is_history else trees.like(rule, lowest)
            )
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
