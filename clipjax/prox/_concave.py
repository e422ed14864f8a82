"""Penalties that level off, so that large entries are not shrunk.

With a large step size the objective of the proximal operator has two minima; it takes
the lower one, and so jumps to zero as a hard threshold does.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._core import checks as check
from .._core.trees import like
from .._core.types import Axes, AxisName, Number, Schedule
from ._entries import resized, total


@dataclasses.dataclass(frozen=True)
class MCP:
    """The minimax concave penalty: as `L1` near zero, constant beyond γλ.

    Σᵢ λ|xᵢ| - xᵢ²/(2γ) where |xᵢ| ≤ γλ, else ½γλ²

    Use it where `L1` shrinks large entries too much.  Its operator is the firm
    threshold.

    For γ > η, prox(x) is 0 up to |x| = ηλ, sign(x)·(|x| - ηλ)/(1 - η/γ) up to γλ, and x
    above.  For γ ≤ η it is 0 up to λ√(ηγ), and x above.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.
        gamma: γ > 0, a number, traced value or schedule: the penalty grows up to γλ.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> penalty = clipjax.prox.MCP(1.0, gamma=2.0)
        >>> penalty.prox(jnp.array([0.5, -1.5, 3.0]), step_size=1.0)
        Array([ 0., -1.,  3.], dtype=float32)

    Reference:
        Cun-Hui Zhang, Nearly Unbiased Variable Selection under Minimax Concave Penalty,
        2010, https://arxiv.org/abs/1002.4734
    """

    strength: Number | Schedule
    gamma: Number | Schedule = 3.0

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(strength=self.strength)
        check.positive(gamma=self.gamma)

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
            eta, lam, gamma = (like(v, a) for v in (step_size, *self._numbers()))
            is_convex = gamma > eta
            slope = jnp.where(is_convex, 1 - eta / gamma, 1)
            soft = jnp.minimum(jnp.maximum(a - eta * lam, 0) / slope, a)
            low = jnp.where(is_convex, soft, 0)
            edge = lam * jnp.where(is_convex, gamma, jnp.sqrt(eta * gamma))
            return jnp.where(a <= edge, low, a)

        return resized(x, shrink)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        del axis

        def value(a):
            lam, gamma = (like(v, a) for v in self._numbers())
            near = jnp.minimum(a, gamma * lam)
            return lam * near - jnp.square(near) / (2 * gamma)

        return total(x, value, 1.0)

    def _numbers(self):
        return self.strength, self.gamma


@dataclasses.dataclass(frozen=True)
class SCAD:
    """The smoothly clipped absolute deviation: as `L1` up to λ, constant beyond aλ.

    Its derivative is λ for |x| ≤ λ, falls linearly to 0 at aλ, and stays 0.

    Use it where `L1` shrinks large entries too much.

    For η < a - 1, prox(x) is the soft threshold for |x| ≤ (1 + η)λ,
    ((a - 1)·x - sign(x)·ηaλ) / (a - 1 - η) up to aλ, and x above.  For η ≥ a - 1 it is
    the soft threshold up to λ(a + 1 + η)/2, or up to λ√(η(a + 1)) if η > a + 1, and x
    above.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.
        a: a ≥ 2, a number, traced value or schedule; the paper's 3.7.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> penalty = clipjax.prox.SCAD(1.0, a=3.0)
        >>> penalty.prox(jnp.array([0.5, -1.5, 2.5, 4.0]), step_size=1.0)
        Array([ 0. , -0.5,  2. ,  4. ], dtype=float32)

    Reference:
        Jianqing Fan, Runze Li, Variable Selection via Nonconcave Penalized Likelihood
        and its Oracle Properties, 2001, https://doi.org/10.1198/016214501753382273
    """

    strength: Number | Schedule
    a: Number | Schedule = 3.7

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(strength=self.strength)
        check.at_least(2, a=self.a)

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

        def shrink(r):
            eta, lam, a = (like(v, r) for v in (step_size, *self._numbers()))
            is_convex = eta < a - 1
            soft = jnp.maximum(r - eta * lam, 0)
            rest = jnp.where(is_convex, a - 1 - eta, 1)
            middle = jnp.minimum(((a - 1) * r - eta * a * lam) / rest, r)
            low = jnp.where(is_convex & (r > (1 + eta) * lam), middle, soft)
            jump = jnp.where(eta > a + 1, jnp.sqrt(eta * (a + 1)), (a + 1 + eta) / 2)
            return jnp.where(r <= lam * jnp.where(is_convex, a, jump), low, r)

        return resized(x, shrink)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        del axis

        def value(r):
            lam, a = (like(v, r) for v in self._numbers())
            near = jnp.minimum(r, a * lam)
            bent = jnp.square(jnp.maximum(near - lam, 0)) / (2 * (a - 1))
            return lam * near - bent

        return total(x, value, 1.0)

    def _numbers(self):
        return self.strength, self.a
