"""Restarting an optimizer's moments, on a schedule or after a spike.

Nothing is known of the optimizer: which of its arrays are moments is told by their
shapes, which follow those of the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .. import norms
from .._core import checks as check, memory, trees
from .._core.eager import compiled
from .._core.steps import step_if
from .._core.types import AxisName, Number, Schedule
from ..thresholds import History, WindowedQuantile

_START = 0.01  # of the usual step is the first one after a reset; the paper's 1 - 0.99


class ResetMomentsState(NamedTuple):
    """What `reset_moments` remembers."""

    step: Int[Array, ""]
    resets: Int[Array, ""]
    since_reset: Int[Array, ""]  # finite steps since then, or since the start
    reset_norms: PyTree  # the memory of the rule for spikes
    reset_inner: Any


def reset_moments(
    inner: optax.GradientTransformation,
    *,
    every: Number | Schedule | None = 500,
    warmup: Number | Schedule = 150,
    on_spike: History | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Restarts the moments of an optimizer at intervals, or at spikes.

    mₜ ← 0, vₜ ← 0, … if s = ΔT or nₜ > Tₜ; u ← u · (1 - 0.99·(1 + cos(πs/N))/2), s < N

    Use it where Adam remembers a spike for too long.

    s is the number of steps since the last reset.  Before the step on which s = ΔT, the
    moments become those of `inner.init`; the update then grows back to its full size
    over N steps.  With `on_spike`, a gradient whose norm nₜ is above the threshold
    resets them before the step and after it: it meets no old moments, moves the
    parameters by a hundredth of a step, and is not remembered.

    `inner` may be any optimizer: its moments are the arrays of its state that have the
    shapes of the parameters.  What stands in one NamedTuple with moments restarts with
    them, such as Adam's count.  What stands apart goes on: the step of a schedule, the
    norms that a clip has seen.  Keep gradient accumulation, `carry_clipped` and masks
    outside, since their arrays have these shapes too.

    A step with a NaN or an infinity becomes zero and leaves `inner` as it is.

    Args:
        inner: the optimizer.
        every: ΔT ≥ 1, the number of steps between two resets; a number, a traced value
            or a schedule; `None` for resets at spikes only.
        warmup: N ≥ 0, the number of steps over which the update grows back; a number, a
            traced value or a schedule.
        on_spike: the threshold above which a norm is a spike, such as
            `thresholds.WindowedQuantile(factor=3.0)`; `None` for no such resets.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.reset_moments(optax.sgd(1.0, momentum=0.5), every=2, warmup=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(5):
        ...     u, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        ...     print(u)
        [-1.]
        [-1.5]
        [-0.01]
        [-0.7575]
        [-0.01]

    Reference:
        Tianjin Huang, Ziquan Zhu, Gaojie Jin, Lu Liu, Zhangyang Wang, Shiwei Liu, SPAM:
        Spike-Aware Adam with Momentum Reset for Stable LLM Training, 2025,
        https://arxiv.org/abs/2501.06842; resets at spikes are ours.
    """
    check.has_method("update", inner=inner)
    if every is not None:
        check.at_least(1, every=every)
    check.not_negative(warmup=warmup)
    if on_spike is not None:
        check.has_method("threshold", on_spike=on_spike)
    inner = optax.with_extra_args_support(inner)
    usual = WindowedQuantile(window=2) if on_spike is None else on_spike

    def init(params):
        return ResetMomentsState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            usual.empty(jnp.zeros([], jnp.float32)),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params("reset_moments", params)
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name)
        norm = norm.astype(jnp.float32)
        known = jnp.isfinite(norm)
        first = jax.eval_shape(usual.empty, norm)
        check.same_kind("memory of norms", "", state.reset_norms, first)
        rule = trees.at_step(usual, state.step)
        bound = rule.threshold(state.reset_norms, norm)
        spike = known & (norm > bound) & (on_spike is not None)
        reset = spike | (known & _is_due(every, state))
        age = jnp.where(reset, 0, state.since_reset)
        resets = state.resets + reset.astype(jnp.int32)
        grown = _grown(age, trees.value_at(warmup, state.step))
        factor = jnp.where(resets > 0, grown, 1)

        def step(updates, inner_state):
            restarted = _restart(inner, params, inner_state)
            start = restarted(inner_state, reset)
            outgoing, after = inner.update(updates, start, params, **extra_args)
            after = after if on_spike is None else restarted(after, spike)
            return trees.scale_all(outgoing, factor), after

        outgoing, inner_state = step_if(known, step, updates, state.reset_inner)
        longer = rule.remember(state.reset_norms, norm, bound, jnp.minimum(norm, bound))
        counts = known & (norm > 0)
        return outgoing, ResetMomentsState(
            trees.next_step(state.step),
            resets,
            jnp.where(known, trees.next_step(age), age),
            jax.tree.map(
                lambda new, old: jnp.where(counts, new, old), longer, state.reset_norms
            ),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _is_due(every: Number | Schedule | None, state: ResetMomentsState) -> Any:
    if every is None:
        return False
    period = trees.value_at(every, state.step)
    return state.since_reset.astype(jnp.float32) >= period


def _grown(age: Int[Array, ""], warmup: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the share of the full update so many steps after a reset."""
    share = age.astype(jnp.float32) / jnp.maximum(warmup, 1)  # used only where below 1
    wave = _START + (1 - _START) * (1 - jnp.cos(jnp.pi * share)) / 2
    return jnp.where(age.astype(jnp.float32) < warmup, wave, 1)


def _restart(
    inner: Any, params: PyTree, like: PyTree
) -> Callable[[PyTree, Any], PyTree]:
    """Returns what gives a state the moments of a new one, if a condition holds."""
    fresh = memory.first_state(inner, params, like)
    moments = memory.moments(inner, params)

    def one(keys, old, new, condition):
        if trees.path(keys) not in moments:
            return old
        return jnp.where(condition, jnp.asarray(new, old.dtype), old)

    def restarted(state, condition):
        one_if = functools.partial(one, condition=condition)
        return jax.tree_util.tree_map_with_path(one_if, state, fresh)

    return restarted
