"""Restarting an optimizer's moments, on a schedule or after a spike.

Nothing is known of the optimizer: which of its arrays are moments is told by their
shapes, which follow those of the parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .. import norms
from .._core import checks as check, trees
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
    """Restarts the moments of an optimizer, lest they remember a spike for long.

    mₜ ← 0, vₜ ← 0, … if s = ΔT or nₜ > Tₜ; u ← u · (1 - 0.99·(1 + cos(πs/N))/2), s < N

    s is the number of steps since the last reset.  Before the step on which s = ΔT, the
    moments become what `inner.init` makes them; the update then grows back to its full
    size over N steps.  A spike, a gradient whose norm nₜ is above the threshold of
    `on_spike`, also resets them, before the step and after it: it meets no old moments,
    moves the parameters by a hundredth of a step, and is not remembered.

    `inner` may be any optimizer: moments are the arrays of its state whose shapes
    follow those of the parameters.  What stands beside moments in one NamedTuple
    restarts with them, as Adam's count for its bias correction has to.  What stands
    apart goes on: a schedule's step, the norms that a clip has seen.  Not only moments
    have such shapes, so keep gradient accumulation, a carry and masks outside.

    A step with a NaN or an infinity becomes zero and leaves `inner` as it is.

    Args:
        inner: the optimizer.
        every: ΔT ≥ 1, or `None` for spikes only.  This and the next one are numbers,
            traced values or schedules.
        warmup: N ≥ 0, over how many steps the update grows back; 0 for none.
        on_spike: which norms are spikes, such as
            `thresholds.WindowedQuantile(factor=3.0)`; `None` for no such resets.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = reset_moments(optax.sgd(1.0, momentum=0.5), every=2, warmup=2)
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
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name).astype(
            jnp.float32
        )
        known = jnp.isfinite(norm)
        rule = trees.at_step(usual, state.step)
        bound = rule.threshold(state.reset_norms, norm)
        spike = known & (norm > bound) & (on_spike is not None)
        due = jnp.zeros([], bool)
        if every is not None:
            period = trees.value_at(every, state.step)
            due = known & (state.since_reset.astype(jnp.float32) >= period)
        reset = due | spike
        age = jnp.where(reset, 0, state.since_reset)
        resets = state.resets + reset.astype(jnp.int32)
        grown = _grown(age, trees.value_at(warmup, state.step))

        def restarted(condition, inner_state):
            return _restarted(condition, inner, inner_state, params)

        def step(updates, inner_state):
            fresh = restarted(reset, inner_state)
            outgoing, after = inner.update(updates, fresh, params, **extra_args)
            outgoing = trees.scale_all(outgoing, jnp.where(resets > 0, grown, 1))
            return outgoing, after if on_spike is None else restarted(spike, after)

        outgoing, inner_state = step_if(known, step, updates, state.reset_inner)
        new_state = ResetMomentsState(
            trees.next_step(state.step),
            resets,
            jnp.where(known, trees.next_step(age), age),
            jax.tree.map(
                lambda new, old: jnp.where(known & (norm > 0), new, old),
                rule.remember(state.reset_norms, norm, bound, jnp.minimum(norm, bound)),
                state.reset_norms,
            ),
            inner_state,
        )
        return outgoing, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _grown(age: Int[Array, ""], warmup: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the share of the full update so many steps after a reset."""
    share = age.astype(jnp.float32) / jnp.maximum(warmup, 1)  # used only where below 1
    wave = _START + (1 - _START) * (1 - jnp.cos(jnp.pi * share)) / 2
    return jnp.where(age.astype(jnp.float32) < warmup, wave, 1)


def _restarted(
    condition: Any, inner: Any, inner_state: PyTree, params: PyTree
) -> PyTree:
    """Returns the state, with the moments of a new one if the condition holds."""
    fresh = inner.init(params)
    moments = _moments(inner, params)

    def one(keys, old, new):
        if trees.path(keys) not in moments:
            return old
        return jnp.where(condition, jnp.asarray(new, old.dtype), old)

    return jax.tree_util.tree_map_with_path(one, inner_state, fresh)


def _moments(inner: Any, params: PyTree) -> set[str]:
    """Returns the paths of what restarts in the state of an optimizer.

    Found by making the state, but for its numbers, of parameters twice as large too.
    """

    def doubled(param):
        shape = tuple(2 * size for size in jnp.shape(param)) or (2,)
        return jax.ShapeDtypeStruct(shape, jnp.result_type(param))

    usual = trees.by_path(jax.eval_shape(inner.init, params))
    larger = trees.by_path(jax.eval_shape(inner.init, jax.tree.map(doubled, params)))
    names = trees.by_path(params)
    moments = {p for p in usual if p in larger and usual[p].shape != larger[p].shape}
    owners = {_owner(moment, names) for moment in moments}
    return moments | {p for p in usual if _parent(p) in owners}


def _owner(moment: str, names: Any) -> str:
    """Returns the path of the NamedTuple in which a tree of moments is a field."""
    ends = [name for name in names if f"/{moment}".endswith(f"/{name}")]
    name = max(ends, key=len, default="")
    field = moment[: -len(name)].rstrip("/") if name else moment
    return _parent(field)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
