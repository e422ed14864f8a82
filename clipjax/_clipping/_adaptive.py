"""Clipping against the recent past: no threshold to tune."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jaxtyping import Array

from .. import responses, scopes
from .._core import checks as check
from .._core.types import Axes, AxisName, Number, Schedule
from ..thresholds import Relative, WindowedSpread, Winsorized
from ._engine import Bound, clip_by


def adaptive_clip(
    *,
    factor: Number | Schedule = 1.0,
    growth: Number | Schedule = 5.0,
    start: Number | Schedule = 0.01,
    ratio: Number | Schedule | None = None,
    window: int = 128,
    stacked: Axes | Callable[[str, Array], Axes] = (),
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each update to what its recent norms leave likely; needs no argument.

    u ← u · min(1, Tₜ/nₜ), nₜ = ‖u‖₂

    Tₜ = f·max(m·min(r^1.8, (2.1/r)⁶), s), r = Q₀.₉/m, n̂ₜ = min(nₜ, g·Tₜ)

    Here m and Q₀.₉ are the median and the 0.9-quantile of the last w norms, as n̂ₜ₋₁ to
    n̂ₜ₋w remember them, and s is the median of the last 16.

    Use it before an optimizer whose gradients have spikes, where no threshold is known.

    It goes by the gradient's own past, whatever the scale of the loss, the parameters
    and the learning rate.  The more norms scatter, the further above the median the
    threshold stands: of lognormal norms with a deviation up to 0.4 it touches one or
    two in a hundred.  Where they scatter more, from r = 1.8 on, they have a heavy tail,
    which needs a clip: the threshold falls to s, and touches up to half of the steps.
    So it does for some hundred steps after a level has changed, by a little.

    A spike comes out at the threshold and is remembered at no more than g thresholds:
    it neither lifts the threshold nor hides the next spike.  A lasting rise passes once
    it fills half of the last 16 steps: up to g-fold after 8, up to g²-fold after 16.

    The first update has no past, and comes out at no more than a hundredth of its norm
    and T₀ = s₀·max(‖θ‖₂, 10⁻³), with the norm of the parameters θ, if they are given.
    It is remembered at no more than g·max(T₀, n₀/1000).  From there the threshold
    grows: the usual norm passes at once if it is below g·T₀, else after some 20 steps.
    Gradients that explode from the first step on are held back for longer.

    A step with a NaN or an infinity becomes zero, is counted, and is not remembered.

    Args:
        factor: f > 0, by which the threshold is multiplied; a number, a traced value or
            a schedule.
        growth: g ≥ 1, the largest multiple of the threshold at which a norm is
            remembered, with f·g > 1; a number, a traced value or a schedule.
        start: s₀ > 0, the first threshold as a share of the parameters' norm; a number,
            a traced value or a schedule.
        ratio: λ > 0; if finite, every unit is first clipped to λ·max(‖θ‖, 10⁻³) of its
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
        Array([1., 0., 0., 0.], dtype=float32)

    Reference:
        A threshold by a window of norms is from Prem Seetharaman, Gordon Wichern, Bryan
        Pardo, Jonathan Le Roux, AutoClip: Adaptive Gradient Clipping for Source
        Separation Networks, 2020, https://arxiv.org/abs/2007.14469; the rule, the
        bounded memory and the first threshold are ours.
    """
    check.positive(factor=factor, start=start, ratio=1 if ratio is None else ratio)
    check.at_least(1, growth=growth)
    check.rises(factor=factor, growth=growth)
    history = WindowedSpread(factor, feed=Winsorized(growth), window=window)
    bounds = [Bound(history, start=Relative(start), first=0.01)]
    if ratio is not None:
        bounds.insert(0, Bound(Relative(ratio), scopes.Unit(stacked=stacked)))
    return clip_by(*bounds, nonfinite=responses.skip, specs=specs, axis_name=axis_name)
