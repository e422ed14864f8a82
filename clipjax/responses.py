"""What becomes of a part of an update, from its norm n and its threshold T.

| you want ...                                       | use                             |
| -------------------------------------------------- | ------------------------------- |
| norms above T brought down to T (the default)      | `scale`                         |
| norms shrunk smoothly, so that they tend to T      | `smooth`                        |
| every norm to be T                                 | `normalize`                     |
| norms below T raised to T                          | `floor`                         |
| norms between a share of T and T                   | `Band`                          |
| parts above T dropped                              | `zero`                          |
| single entries clipped, not norms                  | `clamp`, `lower_peaks`          |

A response is a function of n and T that returns a factor, or an `Entrywise` value.

What becomes of an update that is not finite is another matter: `propagate` lets it
pass, `zero_scope` makes its part zero, `skip` the whole update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._core import checks as check, trees
from ._core.types import Number, Schedule

__all__ = [
    "Band",
    "Entrywise",
    "Policy",
    "Response",
    "clamp",
    "clamped",
    "floor",
    "lower_peaks",
    "lowered",
    "normalize",
    "propagate",
    "scale",
    "skip",
    "smooth",
    "zero",
    "zero_scope",
]


Response = Callable[[Float[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]
"""From norm and threshold to a factor."""

Policy = Callable[[Bool[Array, "..."], Bool[Array, ""]], Bool[Array, "..."] | None]
"""From whether the norm of each part is finite, and whether all are, to what passes.

`None` lets everything pass; what does not pass becomes zero.
"""


def scale(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Brings a norm above the threshold down to it.

    r = T / max(T, n): one, exactly, for a norm within its bound.

    One also for a norm or a threshold that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.scale(jnp.array([4.0, 1.0]), jnp.array(2.0))
        Array([0.5, 1. ], dtype=float32)
    """
    # The division comes last, where XLA does not repeat it for every entry.
    known, norm, bound = _sane(norm, threshold)
    larger = jnp.maximum(bound, norm)
    # Zero only where both are; what is scaled is then zero too.
    larger = jnp.where(larger > 0, larger, 1)
    return jnp.where(known, bound, larger) / larger


def smooth(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Shrinks everything a little, and what is large to the threshold.

    r = 1 / √(1 + (n/T)²): the outgoing norm tends to T, and to n where n ≪ T.

    One for a norm or a threshold that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> norms = jnp.array([0.75, 1e6])
        >>> norms * clipjax.responses.smooth(norms, jnp.array(1.0))
        Array([0.6, 1. ], dtype=float32)

    Reference:
        Shuhua Yu, Dusan Jakovetic, Soummya Kar, Smoothed Gradient Clipping and Error
        Feedback for Distributed Optimization under Heavy-Tailed Noise, 2023,
        https://arxiv.org/abs/2310.16920
    """
    known, norm, bound = _sane(norm, threshold)
    larger = jnp.maximum(bound, norm)
    larger = jnp.where(larger > 0, larger, 1)
    # T / √(T² + n²), both divided by the larger: no square leaves the range.
    share, own = norm / larger, bound / larger
    root = jnp.sqrt(own**2 + share**2)  # zero only where both are
    return jnp.where(known, own, 1) / jnp.where(known & (root > 0), root, 1)


def normalize(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Gives every update the norm of the threshold.

    r = T / n; zero for n = 0, one for a norm or a threshold that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.normalize(jnp.array([4.0, 0.5, 0.0]), jnp.array(2.0))
        Array([0.5, 4. , 0. ], dtype=float32)
    """
    known, norm, bound = _sane(norm, threshold)
    known &= jnp.isfinite(threshold)
    usable = norm > 0
    ratio = jnp.where(usable, bound, 0) / jnp.where(usable, norm, 1)
    ratio = jnp.where(known, ratio, 1)
    return jnp.minimum(ratio, jnp.finfo(norm.dtype).max)


def floor(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Raises a norm below the threshold to it.

    r = max(1, T / n); one for n = 0, which has no direction.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.floor(jnp.array([4.0, 0.5, 0.0]), jnp.array(2.0))
        Array([1., 4., 1.], dtype=float32)
    """
    known, norm, bound = _sane(norm, threshold)
    raised = known & (norm > 0) & (norm < bound) & jnp.isfinite(threshold)
    ratio = jnp.where(raised, bound, 1) / jnp.where(raised, norm, 1)
    return jnp.minimum(ratio, jnp.finfo(norm.dtype).max)


def zero(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Drops what is above the threshold.

    r = 0 for n > T, and 1 else; one for a norm that is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.zero(jnp.array([4.0, 2.0]), jnp.array(2.0))
        Array([0., 1.], dtype=float32)
    """
    above = jnp.isfinite(norm) & (norm > threshold.astype(norm.dtype))
    return jnp.where(above, 0, 1).astype(norm.dtype)


@dataclasses.dataclass(frozen=True)
class Entrywise:
    """Compares each entry, and not the norm, with the threshold of its scope.

    Args:
        entries: from a leaf, the norm of its scope and the threshold to the new leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> u = jnp.array([4.0, 1.0])
        >>> clipjax.responses.clamp.entries(u, jnp.array(4.0), jnp.array(2.0))
        Array([2., 1.], dtype=float32)
        >>> clipjax.responses.lower_peaks.entries(u, jnp.array(8.0), jnp.array(2.0))
        Array([1., 1.], dtype=float32)
    """

    entries: Callable[[Array, Float[Array, "..."], Float[Array, "..."]], Array]

    def __call__(
        self, norm: Float[Array, "..."], threshold: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the factor for the largest entry."""
        return scale(norm, threshold)

    def at(
        self, path: str, leaves: Mapping[str, Array]
    ) -> Callable[[Array, Float[Array, "..."], Float[Array, "..."]], Array]:
        """Returns what becomes of the leaf at `path`."""
        del path, leaves
        return self.entries


def clamped(
    leaf: Array, norm: Float[Array, "..."], bound: Float[Array, "..."]
) -> Array:
    """Brings every entry into [-T, T], T rounded down to the dtype of the leaf.

    A complex one is brought to magnitude T.  An infinity becomes ±T, a NaN stays.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.clamped(
        ...     jnp.array([4.0, -1.0]), jnp.array(4.0), jnp.array(2.0)
        ... )
        Array([ 2., -1.], dtype=float32)
    """
    del norm
    bound = jnp.maximum(jnp.nan_to_num(bound, nan=jnp.inf, posinf=jnp.inf), 0)
    if jnp.iscomplexobj(leaf):
        size = jnp.abs(leaf)
        bound = bound.astype(size.dtype)
        shrunk = leaf * (bound / jnp.where(size > bound, size, 1)).astype(leaf.dtype)
        return jnp.where(size > bound, shrunk, leaf)
    rounded = bound.astype(leaf.dtype)
    if jnp.finfo(leaf.dtype).bits < jnp.finfo(bound.dtype).bits:
        inward = jnp.nextafter(rounded, jnp.zeros_like(rounded))
        rounded = jnp.where(rounded.astype(bound.dtype) > bound, inward, rounded)
    return jnp.clip(leaf, -rounded, rounded)


def lowered(
    leaf: Array, norm: Float[Array, "..."], bound: Float[Array, "..."]
) -> Array:
    """Scales the entries above T by T/n, so that the largest comes out at T.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.lowered(
        ...     jnp.array([8.0, 4.0, 1.0]), jnp.array(8.0), jnp.array(2.0)
        ... )
        Array([2., 1., 1.], dtype=float32)
    """
    factor = scale(norm, bound)
    above = jnp.abs(trees.wide(leaf)) > bound.astype(factor.dtype)
    return jnp.where(above, trees.scale(leaf, factor), leaf)


clamp = Entrywise(clamped)
"""Bounds every entry by the threshold of its scope; the direction turns."""

lower_peaks = Entrywise(lowered)
"""Scales the entries above the threshold, by what brings the largest down to it."""


@dataclasses.dataclass(frozen=True)
class Band:
    """Keeps norms between a share of the threshold and the threshold.

    r = min(max(n, low·T), T) / n, brought between `least` and `most`; one for n = 0.

    Args:
        low: the lower end in thresholds, in [0, 1]; in `clip_by`, or a schedule.
        least: the smallest factor, in [0, 1].
        most: the largest factor, ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> norms = jnp.array([8.0, 1.5, 0.5])
        >>> norms * clipjax.responses.Band(low=0.5)(norms, jnp.array(2.0))
        Array([2. , 1.5, 1. ], dtype=float32)
    """

    low: Number | Schedule = 0.5
    least: Number = 0.0
    most: Number = float("inf")

    def __post_init__(self):
        """Checks the arguments."""
        check.between(0, 1, low=self.low, least=self.least)
        check.at_least(1, most=self.most)

    def __call__(
        self, norm: Float[Array, "..."], threshold: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the factor."""
        lower = jnp.asarray(self.low, threshold.dtype) * threshold
        factor = scale(norm, threshold) * floor(norm, lower)
        least, most = (jnp.asarray(x, factor.dtype) for x in (self.least, self.most))
        known = jnp.isfinite(norm)
        return jnp.where(known, jnp.clip(factor, least, most), 1)


def propagate(known: Bool[Array, "..."], all_known: Bool[Array, ""]) -> None:
    """Lets what is not finite pass unchanged, for others to see.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.propagate(jnp.array([False]), jnp.array(False)) is None
        True
    """
    del known, all_known


def zero_scope(
    known: Bool[Array, "..."], all_known: Bool[Array, ""]
) -> Bool[Array, "..."]:
    """Makes zero what is measured together with a NaN or an infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.zero_scope(jnp.array([False, True]), jnp.array(False))
        Array([False,  True], dtype=bool)
    """
    del all_known
    return known


def skip(known: Bool[Array, "..."], all_known: Bool[Array, ""]) -> Bool[Array, ""]:
    """Makes the whole update zero if any of it is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.responses.skip(jnp.array([False, True]), jnp.array(False))
        Array(False, dtype=bool)
    """
    del known
    return all_known


def _sane(
    norm: Float[Array, "..."], threshold: Float[Array, "..."]
) -> tuple[Bool[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Returns which norms are finite, and norms and bounds that all are."""
    most = jnp.finfo(norm.dtype).max
    bound = jnp.nan_to_num(threshold.astype(norm.dtype), nan=most, posinf=most)
    bound = jnp.maximum(bound, 0)  # a schedule may have gone below
    known = jnp.isfinite(norm)
    return known, jnp.where(known, norm, 0), bound


def __dir__() -> list[str]:
    return __all__
