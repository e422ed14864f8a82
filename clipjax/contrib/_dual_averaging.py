"""Dual averaging: parameters in closed form from the mean of all gradients so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .. import masks, norms, prox
from .._core import checks as check, emit, trees
from .._core.eager import compiled
from .._core.types import AxisName, Number, Schedule, Where


class DualAveragingState(NamedTuple):
    """What `regularized_dual_averaging` remembers; trees are like the parameters."""

    step: Int[Array, ""]  # updates seen
    averaged_steps: Int[Array, ""]  # and those that were finite
    gradient_mean: PyTree  # in float32 or wider
    start: PyTree  # the first parameters, likewise

    keeps_zeros = True


def regularized_dual_averaging(
    learning_rate: Number | Schedule,
    l1: Number | Schedule,
    *,
    where: Where | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with an L1 penalty that dual averaging turns into exact zeros (RDA).

    θₜ₊₁ = argmin_θ ⟨ḡₜ, θ⟩ + λ·‖θ‖₁ + ‖θ - θ₁‖² / (2η√t)
         = soft(θ₁ - η√t·ḡₜ, η√t·λ), soft(x, b) = sign(x)·max(|x| - b, 0)

    Use it in place of an optimizer, last in a chain, where zeros should be many and
    steady: the threshold is compared with the mean ḡₜ of all gradients so far, and not
    with the last step.

    1/η is the paper's γ.  The paper starts from θ₁ = 0, which gives -η√t·soft(ḡₜ, λ); a
    network cannot, and starts from its own parameters, whose pull fades as the
    threshold grows.

    It takes gradients, and its updates take parameters to the formula's θ, exactly 0.0
    in every dtype where that is zero.  It reads only gradients and the start, not what
    became of the parameters meanwhile.  State: twice the parameters, in float32 or
    wider.

    A step with a NaN or an infinity in any gradient moves nothing and is not averaged.

    Args:
        learning_rate: η ≥ 0, a number, a traced value or a schedule; a schedule that
            falls as 1/√t or faster brings the parameters back to their start.
        l1: λ ≥ 0, the magnitude that a mean gradient has to exceed; a number, a traced
            value or a schedule.
        where: which leaves are penalized, by path and leaf; by default floating leaves
            of rank 2 or more that are no bias, scale or embedding.  All are averaged.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.contrib.regularized_dual_averaging(1.0, 0.5)
        >>> params = {"kernel": jnp.array([[2.0, 0.25], [0.0, 0.0]])}
        >>> grads = {"kernel": jnp.array([[-1.0, 0.0], [0.25, 2.0]])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 2.5,  0. ],
               [ 0. , -1.5]], dtype=float32)

    Reference:
        Lin Xiao, Dual Averaging Methods for Regularized Stochastic Learning and Online
        Optimization, 2010, https://www.jmlr.org/papers/v11/xiao10a.html
    """
    where = masks.weights if where is None else where
    check.not_negative(learning_rate=learning_rate, l1=l1)
    check.function(where=where)

    def init(params):
        return DualAveragingState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            trees.zeros_of_floats(params),
            jax.tree.map(_copy, params),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("regularized_dual_averaging", params)
        leaves, gradients = trees.floats(params), trees.floats(updates)
        starts = trees.by_path(state.start)
        for path, x in trees.float_arrays(params).items():
            check.same_kind("start", path, starts.get(path), x)
        finite = jnp.isfinite(norms.inf_norm(updates, axis_name=axis_name))
        new = trees.next_step(state.averaged_steps)
        steps = jnp.where(finite, new, state.averaged_steps)
        eta = trees.bound_at(learning_rate, state.step)
        strength = trees.bound_at(l1, state.step)

        def average(mean, gradient):
            share = 1 / new.astype(mean.dtype)  # one step at least
            # Not mean + (g - mean)·share, whose difference may overflow.
            moved = mean * (1 - share) + gradient.astype(mean.dtype) * share
            return jnp.where(finite, moved, mean)

        means = trees.map_by_path(average, state.gradient_mean, gradients)

        def emitted(gradient, param, path, mean, start):
            far = eta.astype(_real(mean)) * jnp.sqrt(steps.astype(_real(mean)))
            target = start - far.astype(mean.dtype) * mean
            if where(path, param):
                target = prox.L1(strength).prox(target, far)
            step = emit.step_to(gradient, param, target)
            return jnp.where(finite, step, jnp.zeros_like(step))

        paths = {path: path for path in leaves}
        outgoing = trees.map_by_path(
            emitted, updates, leaves, paths, trees.by_path(means), starts
        )
        return outgoing, DualAveragingState(
            trees.next_step(state.step), steps, means, state.start
        )

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _copy(param: Any) -> Array | None:
    """Returns an array of its own, which may be donated beside the parameter."""
    if not trees.is_float(param):
        return None
    wide = trees.wide(trees.as_array(param))
    return jnp.where(jnp.isfinite(wide), wide, jnp.zeros_like(wide))


def _real(x: Array) -> Any:
    return jnp.finfo(x.dtype).dtype
