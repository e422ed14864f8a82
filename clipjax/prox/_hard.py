"""The number of entries that are not zero."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._core import checks as check
from .._core.trees import like
from .._core.types import Axes, AxisName, Number, Schedule
from ._entries import resized, total


@dataclasses.dataclass(frozen=True)
class L0:
    """The number of entries that are not zero; its operator is the hard threshold.

    λ·‖x‖₀; prox(x) = x where |x| > √(2ηλ), else 0

    Use it where entries that stay must not shrink at all.

    At the threshold itself, where both values are minimal, the result is zero.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.prox.L0(0.5).prox(jnp.array([1.5, -0.5, 1.0]), step_size=1.0)
        Array([1.5, 0. , 0. ], dtype=float32)

    Reference:
        Thomas Blumensath, Mike E. Davies, Iterative Thresholding for Sparse
        Approximations, 2008, https://doi.org/10.1007/s00041-008-9035-z
    """

    strength: Number | Schedule

    def __post_init__(self):
        """Checks the argument."""
        check.not_negative(strength=self.strength)

    def prox(
        self,
        x: Inexact[Array, "..."],
        step_size: Number,
        *,
        axis: Axes | None = None,
        axis_name: AxisName = None,
    ) -> Inexact[Array, "..."]:
        """Returns argmin_z ½·‖z - x‖² + η·penalty(z); see `Penalty.prox`."""
        del axis, axis_name

        def cut(a):
            bound = jnp.sqrt(2 * like(step_size, a) * like(self.strength, a))
            return jnp.where(a <= bound, 0, a)  # not `a > bound`: NaN stays

        return resized(x, cut)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        del axis
        return total(x, lambda a: (a != 0).astype(a.dtype), self.strength)
