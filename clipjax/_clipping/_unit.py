"""Clipping unit by unit, relative to the parameters."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jaxtyping import Array

from .. import scopes
from .._core import checks as check
from .._core.types import Axes, AxisName, Number, Schedule
from ..thresholds import Relative
from ._engine import Bound, clip_by


def adaptive_grad_clip(
    clipping: Number | Schedule,
    eps: Number = 1e-3,
    axis: scopes.AxisRule = None,
    *,
    stacked: Axes | Callable[[str, Array], Axes] = (),
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips every unit of the update relative to the norm of its parameters.

    u ← u · T / max(T, ‖u‖₂), T = λ·max(‖θ‖₂, ε), for each unit u and its parameters θ

    Use it in place of `optax.adaptive_grad_clip`, above all for networks without
    normalization.

    A unit is what feeds one output of a layer.  `scopes.unit_axes` finds it for the
    layers of Flax; Optax goes by rank, and splits a 1-D convolution or an attention
    output into ten times as many.  Norms are computed in float32 or wider.  A unit with
    a NaN or an infinity passes unchanged, and the step is counted.  Leaves without an
    update (`None`) are left out.

    Args:
        clipping: λ ≥ 0, the largest ratio of update norm to parameter norm; a number, a
            traced value or a schedule.
        eps: ε > 0, the least parameter norm, so that units that start at zero can move.
        axis: the axes that a unit spans, for all leaves; or a function of path and
            leaf that returns them, or `None` for the default.
        stacked: the axes along which `nn.scan` or `nnx.vmap` stacks layers, for all
            leaves; or a function of path and leaf that returns them.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; without
            it, a leaf may be split only along the axes of a unit.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.adaptive_grad_clip(0.1)
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
        >>> updates = {"kernel": jnp.array([[1.0, 0.03], [0.0, 0.04]])}
        >>> tx.update(updates, tx.init(params), params)[0]["kernel"]
        Array([[0.5 , 0.03],
               [0.  , 0.04]], dtype=float32)

    Reference:
        Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan, High-Performance
        Large-Scale Image Recognition Without Normalization, 2021,
        https://arxiv.org/abs/2102.06171
    """
    check.not_negative(clipping=clipping)
    check.positive(eps=eps)

    bound = Bound(Relative(clipping, eps), scopes.Unit(axis, stacked))
    return clip_by(bound, specs=specs, axis_name=axis_name)
