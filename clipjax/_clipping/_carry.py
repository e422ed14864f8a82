"""Error feedback: what a clip cuts off is not lost but comes with the next update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .. import norms
from .._core import checks as check, trees
from .._core.dtypes import common
from .._core.eager import compiled
from .._core.types import AxisName


class CarryClippedState(NamedTuple):
    """What `carry_clipped` remembers."""

    step: Int[Array, ""]
    carry: PyTree  # what was cut off so far: like the parameters, float32 or wider
    carry_inner: Any


def carry_clipped(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Adds what a clip cut off to the next update, so that the clip has no bias.

    uₜ = clip(gₜ + Δₜ), Δₜ₊₁ = gₜ + Δₜ - uₜ, Δ₁ = 0

    Use it around a clip where rare large gradients matter: a clip alone shrinks their
    share of the mean.

    Whatever went in has come out or is still carried: Σuₜ + Δ = Σgₜ, up to float32's
    rounding of Δ.  What rounding to a narrow dtype cuts off is carried too.  `inner`
    sees the sum in float32 or wider; its result is rounded to the update's dtype.  If
    the mean of the gradients is above the threshold, the carry grows without bound.

    An update with a NaN or an infinity, or whose sum with the carry overflows, goes
    through `inner` without the carry, which stays as it is.

    Args:
        inner: the clip, before the optimizer.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.carry_clipped(optax.clip(1.0))
        >>> state = tx.init(jnp.zeros(2))
        >>> for size in [3.0, 0.0, 0.5, 0.0]:
        ...     u, state = tx.update(jnp.array([size, 0.25]), state)
        ...     print(u, state.carry)
        [1.   0.25] [2. 0.]
        [1.   0.25] [1. 0.]
        [1.   0.25] [0.5 0. ]
        [0.5  0.25] [0. 0.]

    Reference:
        Bryn Elesedy, Marcus Hutter, U-Clip: On-Average Unbiased Stochastic Gradient
        Clipping, 2023, https://arxiv.org/abs/2302.02971
    """
    check.has_method("update", inner=inner)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return CarryClippedState(
            jnp.zeros([], jnp.int32),
            trees.zeros_of_floats(params),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        carry = trees.by_path(state.carry)
        for path, update in trees.float_arrays(updates).items():
            check.same_kind("carry", path, carry.get(path), update)
        total = trees.map_by_path(_add, updates, carry)
        fits = jnp.isfinite(norms.inf_norm(total, axis_name=axis_name))

        def chosen(total, update):
            if not trees.is_float(update):
                return update
            return jnp.where(fits, total, jnp.asarray(update, total.dtype))

        def left(carry, total, outgoing):
            rest = (total - jnp.asarray(outgoing, total.dtype)).astype(carry.dtype)
            return jnp.where(fits & jnp.isfinite(rest), rest, carry)

        incoming = jax.tree.map(chosen, total, updates)
        outgoing, inner_state = inner.update(
            incoming, state.carry_inner, params, **extra_args
        )
        outgoing = jax.tree.map(_rounded, outgoing, updates)
        totals, sent = trees.floats(total), trees.floats(outgoing)
        return outgoing, CarryClippedState(
            trees.next_step(state.step),
            trees.map_by_path(left, state.carry, totals, sent),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _add(update: Any, carry: Array) -> Any:
    if not trees.is_float(update):
        return update
    dtype = common(trees.wide(update), carry)
    return jnp.asarray(update, dtype) + carry.astype(dtype)


def _rounded(outgoing: Any, update: Any) -> Any:
    return jnp.asarray(outgoing, update.dtype) if trees.is_float(update) else outgoing
