"""Convex penalties on single entries."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._core import checks as check
from .._core.trees import like
from .._core.types import Axes, AxisName, Number, Schedule
from ._entries import resized, total


@dataclasses.dataclass(frozen=True)
class L1:
    """The sum of magnitudes; its operator is the soft threshold.

    λ·Σᵢ |xᵢ|; prox(x) = sign(x)·max(|x| - ηλ, 0)

    Use it first: it has one number to tune and one minimum.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.prox.L1(0.5).prox(jnp.array([3.0, -0.25, -1.0]), step_size=1.0)
        Array([ 2.5,  0. , -0.5], dtype=float32)
        >>> clipjax.prox.L1(0.5).penalty(jnp.array([3.0, -1.0]))
        Array(2., dtype=float32)

    Reference:
        Ingrid Daubechies, Michel Defrise, Christine De Mol, An Iterative Thresholding
        Algorithm for Linear Inverse Problems with a Sparsity Constraint, 2003,
        https://arxiv.org/abs/math/0307152
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
        return resized(
            x, lambda a: jnp.maximum(a - like(step_size, a) * like(self.strength, a), 0)
        )

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        del axis
        return total(x, lambda a: a, self.strength)


@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """The sum of magnitudes and of squares.

    λ·Σᵢ |xᵢ| + ½μ·Σᵢ |xᵢ|²; prox(x) = sign(x)·max(|x| - ηλ, 0) / (1 + ημ)

    Use it where inputs are correlated: the squares share weight among them, where `L1`
    alone keeps one and drops the others.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.
        ridge: μ ≥ 0, a number or a traced value; in `proximal`, also a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> penalty = clipjax.prox.ElasticNet(0.5, ridge=1.0)
        >>> penalty.prox(jnp.array([3.0, -0.25]), step_size=1.0)
        Array([1.25, 0.  ], dtype=float32)

    Reference:
        Hui Zou, Trevor Hastie, Regularization and Variable Selection via the Elastic
        Net, 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
    """

    strength: Number | Schedule
    ridge: Number | Schedule

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(strength=self.strength, ridge=self.ridge)

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

        def shrink(a):
            eta = like(step_size, a)
            left = jnp.maximum(a - eta * like(self.strength, a), 0)
            return left / (1 + eta * like(self.ridge, a))  # divides by 1 or more

        return resized(x, shrink)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        del axis
        squares = total(x, lambda a: jnp.square(a) / 2, self.ridge)
        return total(x, lambda a: a, self.strength) + squares
