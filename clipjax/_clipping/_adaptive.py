"""Clipping against the recent past: no threshold to tune."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jaxtyping import Array

from .. import responses, scopes
from .._core import checks as check
from .._core.types import Axes, AxisName, Number, Schedule
from ..thresholds import Relative, WindowedQuantile, Winsorized
from ._engine import Bound, clip_by


def adaptive_clip(
    *,
    quantile: Number | Schedule = 0.9,
    factor: Number | Schedule = 1.05,
    growth: Number | Schedule = 3.0,
    start: Number | Schedule = 0.01,
    ratio: Number | Schedule | None = None,
    window: int = 64,
    stacked: Axes | Callable[[str, Array], Axes] = (),
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each update to a little more than its recent norms; needs no argument.

    u ← u · Tₜ / max(Tₜ, nₜ), nₜ = ‖u‖₂

    Tₜ = f·Q_q(n̂ₜ₋₁, …, n̂ₜ₋w), n̂ₜ = min(nₜ, g·Tₜ)

    Use it before an optimizer whose gradients have spikes, where no threshold is known.

    With its defaults, about nine of ten ordinary steps pass bit for bit.  A spike comes
    out at the threshold and is remembered at no more than g thresholds: it neither
    lifts the threshold nor hides the next spike.  A lasting rise passes once it fills a
    tenth of the window: one of 10x after some 8 steps, and 15 more for each further
    factor of ten.

    The first step has no past.  Its threshold is T₀ = s·max(‖θ‖₂, 10⁻³), a small share
    of the norm of the parameters θ; without `params` it passes unchanged.  While few
    norms are known the threshold can grow by f·g a step, so a scale that is far off
    costs only a few steps.

    A step with a NaN or an infinity becomes zero, is counted, and is not remembered.

    Args:
        quantile: q in [0, 1], the quantile of the recent norms; a number, a traced
            value or a schedule.
        factor: f > 0, the threshold as a multiple of the quantile; a number, a traced
            value or a schedule.
        growth: g ≥ 1, the largest multiple of the threshold at which a norm is
            remembered, with f·g > 1; a number, a traced value or a schedule.
        start: s > 0, the first threshold as a share of the parameters' norm; a number,
            a traced value or a schedule.
        ratio: λ > 0; if finite, every unit is first clipped to λ·max(‖θ‖₂, 10⁻³) of its
            own parameters, as by `clipjax.adaptive_grad_clip`.
        window: w ≥ 2, the number of norms that are remembered.  Static.
        stacked: with `ratio`, the axes along which `nn.scan` or `nnx.vmap` stacks
            layers, for all leaves; or a function of path and leaf that returns them.
        specs: with `ratio`, inside `jax.shard_map`, how each leaf is split, by path and
            leaf; without it, a leaf may be split only along the axes of a unit.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.adaptive_clip()
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
    check.positive(factor=factor, start=start, ratio=1 if ratio is None else ratio)
    check.at_least(1, growth=growth)
    check.rises(factor=factor, growth=growth)
    history = WindowedQuantile(quantile, factor, Winsorized(growth), window)
    bounds = [Bound(history, start=Relative(start))]
    if ratio is not None:
        bounds.insert(0, Bound(Relative(ratio), scopes.Unit(stacked=stacked)))
    return clip_by(*bounds, nonfinite=responses.skip, specs=specs, axis_name=axis_name)
