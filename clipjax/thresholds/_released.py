"""What lets a threshold rise again after a lasting change of level."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._core import checks as check, trees
from .._core.types import Number, Schedule
from ._averages import one_more
from ._rules import History, Norms

_MOST = 2.0**60  # times which all releases together raise a threshold


class Release(NamedTuple):
    """What `Released` remembers."""

    released_memory: PyTree  # of the rule inside
    released_scale: Norms  # times which its threshold is the one in force
    above_in_row: Int[Array, "..."]  # norms above the threshold, up to now


@dataclasses.dataclass(frozen=True)
class Released:
    """A rule whose threshold rises after many norms in a row were above it.

    Tₜ = s·T'(n/s), for the rule's T'; s ← growth·s at each norm that is above T after
    `patience` others in a row were

    With s the rule's whole past is raised: it goes on from the new level as if the past
    had been of that level, and may come down again as it does by itself.  Spikes in a
    row, as long as they are no more than `patience`, release nothing.  A lasting rise
    by f passes after `patience` + ⌈ln f / ln growth⌉ steps at the latest.

    Args:
        rule: one with a history that would stay behind, such as a moving mean of
            clipped norms.
        patience: ≥ 0, how many norms in a row are clipped before the threshold rises.
        growth: > 1, times which it does, at each further norm above it.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.thresholds.Released(
        ...     clipjax.thresholds.MovingMean(1.0, warmup=1), patience=2
        ... )
        >>> memory = rule.empty(jnp.float32(0.0))
        >>> for norm in jnp.array([1.0, 9.0, 9.0, 9.0]):
        ...     bound = rule.threshold(memory, norm)
        ...     memory = rule.remember(memory, norm, bound, jnp.minimum(norm, bound))
        >>> rule.threshold(memory, jnp.float32(9.0))
        Array(2., dtype=float32)
    """

    rule: History
    patience: Number | Schedule = 10
    growth: Number | Schedule = 2.0

    def __post_init__(self):
        """Checks the arguments."""
        check.has_method("threshold", rule=self.rule)
        check.not_negative(patience=self.patience)
        check.rises(growth=self.growth)

    def empty(self, norm: Norms) -> Release:
        """Returns the empty memory of the rule, and no release."""
        none = jnp.zeros_like(norm, jnp.int32)
        return Release(
            self.rule.empty(norm), jnp.zeros_like(norm, jnp.float32) + 1, none
        )

    def threshold(self, memory: Release, norm: Norms) -> Norms:
        """Returns the threshold for a norm."""
        scale = memory.released_scale
        return scale * self.rule.threshold(memory.released_memory, norm / scale)

    def remember(
        self, memory: Release, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> Release:
        """Returns the memory after a norm."""
        inner, scale, above = memory
        seen = (x / scale for x in (norm, threshold, clipped_norm))
        above = jnp.where(norm > threshold, one_more(above), 0)
        is_due = above.astype(jnp.float32) > jnp.asarray(self.patience, jnp.float32)
        raised = jnp.minimum(scale * trees.like(self.growth, scale), _MOST)
        return Release(
            self.rule.remember(inner, *seen), jnp.where(is_due, raised, scale), above
        )
