"""Skipping a step whose gradient or loss is a spike: nothing moves, nothing learns it.

The statistic is fed on every finite step, skipped or not, and with bounded numbers: so
it can neither be poisoned nor stand still while the training has moved on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .. import norms
from .._core import checks as check, losses, trees
from .._core.eager import compiled
from .._core.steps import step_if
from .._core.types import AxisName, Number, Schedule
from ..thresholds import WindowedQuantile, Winsorized
from . import _record as states
from ._record import ClipState

_USUAL = 0.9  # the quantile of the recent past that spikes are compared with
_GROWTH = 3.0  # a spike is remembered at no more than so many thresholds
_LEAST_SPREAD = 0.01  # of the median loss: about what bfloat16 tells apart
_LEAST_VALUES = 16  # so that the largest of them is above the quantile


class SkipSpikesState(NamedTuple):
    """What `skip_spikes` remembers.

    In `skip`, spikes that were skipped count as clipped.
    """

    skip: ClipState
    skipped_in_row: Int[Array, ""]  # up to now, for whatever reason
    spikes_in_row: Int[Array, ""]  # up to now, whether they were skipped or not
    recent_norms: Float[Array, " window"]  # newest first, -1 where there is none yet
    recent_values: Float[Array, " window"]  # newest first, losses
    known_values: Int[Array, ""]  # how many of them there are
    skip_inner: Any


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    factor: Number | Schedule = 3.0,
    value_factor: Number | Schedule = 5.0,
    window: int = 64,
    max_consecutive: int = 10,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Leaves out the steps whose gradient, or loss, is far above recent ones.

    spike: nₜ > Tₜ = f·Q₀.₉(n̂ₜ₋₁, …, n̂ₜ₋w), nₜ = ‖u‖₂, n̂ₜ = min(nₜ, 3·Tₜ)
    or: Lₜ > Mₜ + k·Sₜ, Mₜ = Q₀.₅(L̂), Sₜ = max(Q₀.₉(L̂) - Mₜ, |Mₜ|/100),
    L̂ₜ = min(Lₜ, Mₜ + 3·k·Sₜ)

    Use it around an optimizer in place of `optax.apply_if_finite`.

    On a skipped step the update is zero and `inner` keeps its state: moments, schedules
    and weight decay stand still.  The norm is that of the incoming update, so put a
    clip inside `inner`: before the wrapper it would hide every spike.  The loss counts
    where `update` gets it as `value=`, as Optax names it; extra arguments are passed
    on.

    One spike neither lifts the thresholds nor hides the next one.  A lasting change of
    level is followed, one of 20x within some 15 steps.  After `max_consecutive` spikes
    in a row every finite step is taken until one is within the thresholds again.  A
    step with a NaN or an infinity, in the update or the loss, is never taken and never
    remembered; it neither ends a row of spikes nor counts as one.

    The first step has nothing to compare with, and passes.  While few norms are known,
    their threshold can rise ninefold a step; losses are compared once 16 are known (or
    w, if that is less).  `clipjax.metrics` counts skipped spikes as clipped.

    Args:
        inner: the optimizer, or whatever should not see a spike.
        factor: f ≥ 1, the multiple of the usual norm from which on a step is skipped; a
            number, a traced value or a schedule.
        value_factor: k > 0, how far a loss may rise above the median, in widths S; a
            number, a traced value or a schedule.
        window: w ≥ 2, the number of steps that are remembered.  Static.
        max_consecutive: the largest number of spikes in a row that are skipped.
            Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            losses that differ over them are averaged.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.skip_spikes(optax.sgd(1.0))
        >>> state = tx.init(jnp.zeros(2))
        >>> for size in [1.0, 2.0, 1000.0, jnp.nan, 5.0]:
        ...     u, state = tx.update(jnp.array([size, 0.0]), state)
        ...     print(u[0])
        -1.0
        -2.0
        0.0
        0.0
        -5.0

    Reference:
        Skipping what spikes is from Aakanksha Chowdhery et al., PaLM: Scaling Language
        Modeling with Pathways, 2022, https://arxiv.org/abs/2204.02311; the thresholds
        are ours.
    """
    check.has_method("update", inner=inner)
    check.at_least(1, factor=factor)
    check.positive(value_factor=value_factor)
    check.whole(2, window=window)
    check.whole(0, max_consecutive=max_consecutive)
    inner = optax.with_extra_args_support(inner)

    def rule_at(step):
        multiple = trees.value_at(factor, step)
        return WindowedQuantile(_USUAL, multiple, Winsorized(_GROWTH), window)

    def init(params):
        def zero(dtype, *shape):
            return jnp.zeros(shape, dtype)

        return SkipSpikesState(
            states.first(),
            zero(jnp.int32),
            zero(jnp.int32),
            rule_at(jnp.int32(0)).empty(zero(jnp.float32)),
            zero(jnp.float32, window),
            zero(jnp.int32),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        recent = jax.ShapeDtypeStruct((window,), jnp.float32)
        check.same_kind("window of norms", "", state.recent_norms, recent)
        step = state.skip.step
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name)
        norm = norm.astype(jnp.float32)
        loss = _loss(extra_args.get("value"), axis_name)
        known = jnp.isfinite(norm) & ~jnp.isinf(loss)
        rule = rule_at(step)
        bound = rule.threshold(state.recent_norms, norm)
        highest, cap = _bounds(state, trees.value_at(value_factor, step))
        spike = known & ((norm > bound) | (loss > highest))
        in_row = state.spikes_in_row + spike.astype(jnp.int32)
        take = known & (~spike | (in_row > max_consecutive))
        outgoing, inner_state = step_if(
            take,
            lambda u, inner_state: inner.update(u, inner_state, params, **extra_args),
            updates,
            state.skip_inner,
        )
        longer = rule.remember(state.recent_norms, norm, bound, norm)
        clip = states.after(
            state.skip,
            norm=jnp.where(known, norm, jnp.nan),
            clipped_norm=jnp.where(take, norm, 0),
            threshold=bound,
            clipped=~take,
        )
        return outgoing, SkipSpikesState(
            clip,
            jnp.where(take, 0, trees.next_step(state.skipped_in_row)),
            jnp.where(known & ~spike, 0, in_row),
            jnp.where(known & (norm > 0), longer, state.recent_norms),
            *_remembered(state, loss, cap, known),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _loss(value: Any, axis_name: AxisName) -> Float[Array, ""]:
    """Returns the loss; NaN where none is given, infinity where it is not finite."""
    if value is None:
        return jnp.asarray(jnp.nan, jnp.float32)
    said = "value must be the loss, a scalar, but has shape"
    loss = losses.scalar(value, said, axis_name)
    return jnp.where(jnp.isfinite(loss), loss, jnp.inf)


def _bounds(
    state: SkipSpikesState, factor: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns up to where a loss is usual, and at what it is remembered at most."""
    values, known = state.recent_values, state.known_values
    last = jnp.maximum(known - 1, 0)
    ordered = jnp.sort(
        jnp.where(jnp.arange(values.size, dtype=jnp.int32) < known, values, jnp.inf)
    )
    middle = ordered[last // 2]
    high = ordered[jnp.ceil(_USUAL * last.astype(jnp.float32)).astype(jnp.int32)]
    spread = jnp.maximum(high - middle, _LEAST_SPREAD * jnp.abs(middle))
    enough = known >= min(_LEAST_VALUES, values.size)
    highest = jnp.where(enough, middle + factor * spread, jnp.inf)
    # Nothing but zeros so far has no width, and every loss is remembered as it is.
    cap = jnp.where(enough & (spread > 0), middle + _GROWTH * factor * spread, jnp.inf)
    return highest, cap


def _remembered(
    state: SkipSpikesState,
    loss: Float[Array, ""],
    cap: Float[Array, ""],
    known: Bool[Array, ""],
) -> tuple[Float[Array, " window"], Int[Array, ""]]:
    """Returns the losses and their number after one more, if there is one."""
    values, count = state.recent_values, state.known_values
    usable = known & jnp.isfinite(loss)
    longer = jnp.concatenate([jnp.minimum(loss, cap)[None], values[:-1]])
    more = jnp.minimum(count + 1, values.size)
    return jnp.where(usable, longer, values), jnp.where(usable, more, count)
