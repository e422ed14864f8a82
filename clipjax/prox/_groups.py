"""Penalties on groups, which become zero as a whole.

A group spans some axes of a leaf, as in `norms.unit_norm`.  In a Dense kernel, `axis=0`
groups the weights into one neuron, `axis=1` those out of one input feature.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .. import norms
from .._core import checks as check, sharding, trees
from .._core.trees import like
from .._core.types import Axes, AxisName, Number, Schedule
from ._entries import resized, total


@dataclasses.dataclass(frozen=True)
class GroupLasso:
    """The sum of the norms of groups: a group becomes zero, or shrinks, as a whole.

    λ·Σ_g √n·‖x_g‖₂ for groups of n entries; prox(x_g) = x_g·max(1 - ηλ√n/‖x_g‖₂, 0)

    Use it to remove whole neurons, filters or input features.

    A group with a NaN or an infinity, or whose norm overflows, stays as it is.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> x = jnp.array([[3.0, 4.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
        >>> penalty = clipjax.prox.GroupLasso(0.5)
        >>> penalty.prox(x, step_size=1.0, axis=1)  # takes √4 · 0.5 off the norms
        Array([[2.4, 3.2, 0. , 0. ],
               [0. , 0. , 0. , 0. ]], dtype=float32)

    Reference:
        Ming Yuan, Yi Lin, Model Selection and Estimation in Regression with Grouped
        Variables, 2006, https://doi.org/10.1111/j.1467-9868.2005.00532.x
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
        wide = trees.wide(x)
        shrunk = _shrink(wide, (step_size, self.strength), axis, axis_name)
        return shrunk.astype(x.dtype)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        norm = norms.unit_norm(x, axis)
        return total(norm, lambda n: n * _root_of_entries(x, n, None), self.strength)


@dataclasses.dataclass(frozen=True)
class SparseGroupLasso:
    """The norms of groups and the magnitudes of entries: few groups, sparse inside.

    λ·((1 - α)·Σ_g √n·‖x_g‖₂ + α·Σᵢ |xᵢ|); prox is that of the entries, then that of the
    groups

    Use it to remove whole groups and to have zeros in those that stay.

    In a group with a NaN or an infinity only the step on entries is taken.

    Args:
        strength: λ ≥ 0, a number or a traced value; in `proximal`, also a schedule.
        entry_share: α in [0, 1], a number, traced value or schedule; 0 is `GroupLasso`,
            1 is `L1`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> x = jnp.array([[5.0, 1.0, 0.5, -1.0], [1.5, 1.5, 1.5, 1.5]])
        >>> penalty = clipjax.prox.SparseGroupLasso(2.0, entry_share=0.5)
        >>> penalty.prox(x, step_size=1.0, axis=1)
        Array([[2., 0., 0., 0.],
               [0., 0., 0., 0.]], dtype=float32)

    Reference:
        Noah Simon, Jerome Friedman, Trevor Hastie, Robert Tibshirani, A Sparse-Group
        Lasso, 2013, https://doi.org/10.1080/10618600.2012.681250
    """

    strength: Number | Schedule
    entry_share: Number | Schedule = 0.5

    def __post_init__(self):
        """Checks the arguments."""
        check.not_negative(strength=self.strength)
        check.between(0, 1, entry_share=self.entry_share)

    def prox(
        self,
        x: Inexact[Array, "..."],
        step_size: Number,
        *,
        axis: Axes | None = None,
        axis_name: AxisName = None,
    ) -> Inexact[Array, "..."]:
        """Returns argmin_z ½·‖z - x‖² + η·penalty(z); see `Penalty.prox`."""

        def soften(a):
            eta, lam = like(step_size, a), like(self.strength, a)
            return jnp.maximum(a - eta * lam * like(self.entry_share, a), 0)

        entries = resized(trees.wide(x), soften)
        factors = (step_size, self.strength, self._group_share())
        return _shrink(entries, factors, axis, axis_name).astype(x.dtype)

    def penalty(
        self, x: Inexact[Array, "..."], *, axis: Axes | None = None
    ) -> Float[Array, ""]:
        """Returns the penalty, in float32 or wider."""
        entries = total(x, lambda a: a * like(self.entry_share, a), self.strength)
        groups = GroupLasso(self.strength).penalty(x, axis=axis)
        return entries + groups * like(self._group_share(), groups)

    def _group_share(self):
        return 1 - jnp.asarray(self.entry_share)


def _shrink(x: Array, factors: tuple, axis: Axes | None, axis_name: AxisName) -> Array:
    """Takes the product of the factors, times √n, off the norm of every group."""
    norm = norms.unit_norm(x, axis, axis_name=axis_name)
    bound = _root_of_entries(x, norm, axis_name)
    for factor in factors:
        bound *= like(factor, norm)
    larger = norm > bound
    factor = 1 - bound / jnp.where(larger, norm, 1)  # the norm is positive there
    # A bound of 0 changes nothing, not even a group whose norm underflows to 0.
    factor = jnp.where(larger, factor, jnp.where(bound > 0, 0, 1))
    result = x * jnp.where(jnp.isfinite(norm), factor, 1).astype(x.dtype)
    return jnp.where(result == 0, jnp.zeros_like(x), result)  # no -0.0


def _root_of_entries(x: Array, norm: Array, axis_name: AxisName) -> Array:
    """Returns the root of the number of entries in a group."""
    num_entries = x.size // max(norm.size, 1) * sharding.blocks(x, axis_name)
    return jnp.sqrt(like(num_entries, norm))
