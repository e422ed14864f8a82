"""Clipping at whichever of some thresholds lowers the loss of the batch most."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .. import norms
from .._clipping import _record as states
from .._clipping._record import ClipState
from .._core import checks as check, losses, trees
from .._core.dtypes import common
from .._core.eager import compiled
from .._core.steps import step_if
from .._core.types import AxisName, Number, Schedule
from ..responses import scale as shrink


class GreedyClipState(NamedTuple):
    """What `greedy_clip` remembers."""

    greedy: ClipState
    winner: Int[Array, ""]  # which threshold was taken last, -1 before the first step
    winner_value: Float[Array, ""]  # the loss after that step
    winless_steps: Int[Array, ""]  # steps on which no threshold gave a finite loss
    greedy_inner: Any


def greedy_clip(
    inner: optax.GradientTransformation,
    thresholds: Sequence[Number | Schedule],
    *,
    relative: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Tries several thresholds in each step, and takes the one of the lowest loss.

    u = u_c*, c* = argmin_c L(θ + u_c), u_c = inner(g · c / max(c, ‖g‖₂))

    Use it where a few more evaluations of the loss are cheap; the loss is that of one
    batch, and the best step for it need not be best for the next.

    It wraps the optimizer, and gets the loss as Optax's line searches do: `update(g,
    state, params, value_fn=loss, x=x, y=y)`.  Extra arguments that `value_fn` names are
    passed to it, and all of them to `inner`.

    The thresholds are tried one after the other, and the winner's step is computed
    anew: k thresholds cost k evaluations of the loss and k + 1 steps of `inner`, but
    memory for only one more network.  Of equal losses the first wins; one that is not
    finite never does.  If none is finite, or the update holds a NaN or an infinity, the
    update is zero, `inner` keeps its state, and the step is counted.

    Args:
        inner: the optimizer.
        thresholds: c ≥ 0, one or more, each a number, a traced value or a schedule;
            `jnp.inf` tries the gradient as it is.
        relative: whether thresholds are shares of the gradient's own norm.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            losses that differ over them are averaged.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.contrib.greedy_clip(optax.sgd(1.0), [1.0, 4.0, 16.0])
        >>> loss = lambda params: jnp.sum(params**2)
        >>> params = jnp.array([3.0, 4.0])  # best is a step of length 5
        >>> state, grads = tx.init(params), jax.grad(loss)(params)
        >>> u, state = tx.update(grads, state, params, value_fn=loss)
        >>> print(u, state.winner, state.winner_value)
        [-2.4 -3.2] 1 0.99...

    Reference:
        The rule is ours; a line search over the threshold in place of the step.
    """
    check.has_method("update", inner=inner)
    check.flag(relative=relative)
    if not len(thresholds):
        raise ValueError("thresholds must not be empty. Give one or more numbers.")
    for threshold in thresholds:
        check.not_negative(thresholds=threshold)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return GreedyClipState(
            states.first(),
            jnp.full([], -1, jnp.int32),
            jnp.zeros([], jnp.float32),
            jnp.zeros([], jnp.int32),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params("greedy_clip", params)
        loss = _loss(extra_args, axis_name)
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name)
        step = state.greedy.step
        bounds = jnp.stack([trees.value_at(c, step) for c in thresholds])
        bounds = bounds.astype(norm.dtype)
        if relative:
            bounds = jnp.where(norm > 0, bounds * norm, bounds)

        def step_of(bound, inner_state):
            clipped = trees.scale_all(updates, shrink(norm, bound))
            return inner.update(clipped, inner_state, params, **extra_args)

        def value_of(bound):
            outgoing, _ = step_of(bound, state.greedy_inner)
            return loss(_moved(params, outgoing))

        values = jax.lax.map(value_of, bounds)
        values = jnp.where(jnp.isfinite(values), values, jnp.inf)
        winner = jnp.argmin(values).astype(jnp.int32)
        value, bound = values[winner], bounds[winner]
        won = jnp.isfinite(norm) & jnp.isfinite(value)
        outgoing, inner_state = step_if(
            won, lambda _, s: step_of(bound, s), updates, state.greedy_inner
        )
        clip = states.after(
            state.greedy,
            norm=norm,
            clipped_norm=jnp.where(won, norm * shrink(norm, bound), 0),
            threshold=bound,
            clipped=~won | (norm > bound),
        )
        return outgoing, GreedyClipState(
            clip,
            jnp.where(won, winner, state.winner),
            jnp.where(won, value, state.winner_value),
            state.winless_steps + (~won).astype(jnp.int32),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _loss(extra_args: dict[str, Any], axis_name: AxisName):
    """Returns `value_fn` as a function of the parameters only, in float32."""
    value_fn = extra_args.get("value_fn")
    if value_fn is None:
        raise TypeError(
            "greedy_clip compares losses, but value_fn is not given. Call"
            " `tx.update(updates, state, params, value_fn=loss, ...)`, with the other"
            " arguments of the loss by name."
        )
    names = inspect.signature(value_fn).parameters
    named = {name: arg for name, arg in extra_args.items() if name in names}

    def loss(params):
        said = "value_fn must return a scalar, but its result has shape"
        return losses.scalar(value_fn(params, **named), said, axis_name)

    return loss


def _moved(params: PyTree, updates: PyTree) -> PyTree:
    """Adds as `optax.apply_updates` does; what has no update stays."""

    def add(p, u):
        if jnp.result_type(u) == jax.dtypes.float0:
            return p
        dtype = common(p, u)
        return (jnp.asarray(p, dtype) + jnp.asarray(u, dtype)).astype(p.dtype)

    return trees.map_by_path(add, params, trees.by_path(updates))
