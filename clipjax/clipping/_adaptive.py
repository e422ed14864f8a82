"""Clipping against the recent past: no threshold to tune."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .. import _checks as check, _trees as trees, norms
from .._types import AxisName, Number, Schedule
from ..thresholds import WindowedQuantile
from . import _state as states
from ._response import exceeds, shrink
from ._state import ClipState

_LEAST_PARAM_NORM = 1e-3  # as in adaptive gradient clipping


class AdaptiveClipState(NamedTuple):
    """What `adaptive_clip` remembers."""

    clip: ClipState
    norm_history: Float[Array, " window"]  # newest first, -1 where there is none yet


def adaptive_clip(
    *,
    quantile: Number | Schedule = 0.9,
    factor: Number | Schedule = 1.05,
    growth: Number | Schedule = 3.0,
    start: Number | Schedule = 0.01,
    window: int = 64,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm to what was usual lately; needs no argument.

    u ← u · Tₜ / max(Tₜ, nₜ), nₜ = ‖u‖₂, Tₜ = f·Q_q(n̂ₜ₋₁, …, n̂ₜ₋w), n̂ₜ = min(nₜ, g·Tₜ)

    The threshold stands a little above the norms that are usual, so ordinary steps pass
    bit for bit.  A spike comes out at the threshold and is remembered at no more than
    g thresholds: it can neither lift the threshold nor hide the next one.  A lasting
    rise passes as soon as it fills a tenth of the window: one of 10x after some 15
    steps, and 15 more for each further factor of ten.  Norms that never stop rising, by
    2 % a step, pass at nine tenths of their size.

    The first step has no past.  Its threshold is T₀ = s·max(‖θ‖₂, 10⁻³), a small share
    of the parameters' own norm, and while the history is short the threshold can grow
    by f·g a step: a bad first step cannot wreck the parameters, and a scale that is
    far off costs a few steps.  Without `params` the first step passes unchanged.

    A step with a NaN or an infinity becomes zero, is counted, and is not remembered.

    Args:
        quantile: q in [0, 1], which of the recent norms is the measure.  This and the
            next three are numbers, traced values or schedules.
        factor: f > 0, how far above it the threshold stands.
        growth: g ≥ 1, how many thresholds a norm is remembered at, at most; f·g > 1.
        start: s > 0, the first threshold relative to the parameters.
        window: w ≥ 2, how many norms are remembered; a static integer.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = adaptive_clip()
        >>> params = {"w": jnp.full(4, 500.0)}  # norm 1000, so T₀ is 10
        >>> state = tx.init(params)
        >>> for size in [1.0, 1.0, 1000.0]:
        ...     updates = {"w": jnp.array([size, 0.0, 0.0, 0.0])}
        ...     updates, state = tx.update(updates, state, params)
        >>> updates["w"]
        Array([1.05, 0.  , 0.  , 0.  ], dtype=float32)

    Reference:
        The windowed quantile is that of Prem Seetharaman, Gordon Wichern, Bryan Pardo,
        Jonathan Le Roux, AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, https://arxiv.org/abs/2007.14469; the bounded memory and the
        first threshold are ours.
    """
    check.between(0, 1, quantile=quantile)
    check.positive(factor=factor, start=start)
    check.at_least(1, growth=growth)
    check.rises(factor=factor, growth=growth)
    check.whole(2, window=window)

    def init(params):
        del params
        history = WindowedQuantile(window=window).empty()
        return AdaptiveClipState(states.first(), history)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        step = state.clip.step
        rule = WindowedQuantile(
            trees.value_at(quantile, step),
            trees.value_at(factor, step),
            trees.value_at(growth, step),
            window,
        )
        first = trees.value_at(start, step)
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name)
        bound = jax.lax.cond(
            state.norm_history[0] < 0,  # nothing is remembered
            lambda: first * _param_norm(params, axis_name),
            lambda: rule.threshold(state.norm_history),
        )
        scale = shrink(norm, bound)
        known = jnp.isfinite(norm)
        new_state = AdaptiveClipState(
            states.after(
                state.clip,
                norm=norm,
                clipped_norm=norm * scale,
                threshold=bound,
                clipped=exceeds(norm, bound),
            ),
            rule.remember(state.norm_history, norm.astype(jnp.float32), bound),
        )
        scaled = trees.scale_all(updates, scale)
        zeroed = jax.tree.map(lambda u: jnp.where(known, u, jnp.zeros_like(u)), scaled)
        return zeroed, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _param_norm(params: PyTree, axis_name: AxisName) -> Float[Array, ""]:
    """Returns the norm of the parameters, infinity where there is none to go by."""
    if params is None:
        return jnp.asarray(jnp.inf, jnp.float32)
    norm = norms.global_norm(params, scaled=True, axis_name=axis_name)
    norm = jnp.where(jnp.isfinite(norm), norm, jnp.inf).astype(jnp.float32)
    return jnp.maximum(norm, _LEAST_PARAM_NORM)
