"""Clipping unit by unit, relative to the parameters."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array

from .. import _checks as check, _trees as trees, norms, scopes
from .._types import Axes, AxisName, Number, Schedule
from . import _state as states
from ._response import exceeds, shrink

AxisRule = Axes | Callable[[str, Array], Axes | None] | None
"""Which axes a unit spans: for all leaves alike, by path, or as Flax lays them out."""


def adaptive_grad_clip(
    clipping: Number | Schedule,
    eps: Number = 1e-3,
    axis: AxisRule = None,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips every unit of the update relative to the norm of its parameters.

    u ← u · T / max(T, ‖u‖₂), T = λ·max(‖θ‖₂, ε), for each unit u and its parameters θ

    Takes the place of `optax.adaptive_grad_clip`.  A unit is what feeds one output of a
    layer; `scopes.unit_axes` finds it for the layers of Flax, where optax goes by rank
    and splits a 1-D convolution or an attention output into ten times as many.  Unit
    norms are computed in float32 or wider.  A unit with a NaN or an infinity passes
    unchanged and the step is counted.  Leaves without an update (`None`) are left out.

    Args:
        clipping: λ ≥ 0, the largest ratio of update to parameter norm; a number, a
            traced value or a schedule.
        eps: ε > 0, the least parameter norm, so that units that start at zero can move.
        axis: the axes that a unit spans, for all leaves; or a function of path and
            leaf that returns them, or `None` for the default.
        axis_name: inside `jax.shard_map`, the mesh axes that split the axes of a unit;
            every leaf that is split has to be split along these.

    Example:
        >>> tx = adaptive_grad_clip(0.1)
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

    def init(params):
        del params
        return states.first()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("adaptive_grad_clip", params)
        ratio = trees.bound_at(clipping, state.step)
        leaves, weights = trees.floats(updates), trees.floats(params)
        for path, leaf in leaves.items():
            check.same_shape("adaptive_grad_clip", path, leaf, weights.get(path))
        axes = {path: _axes(axis, path, weights) for path in leaves}
        own = {path: weights[path] for path in leaves}
        before = norms.unit_norms(leaves, axes, axis_name=axis_name)
        relative = norms.unit_norms(own, axes, axis_name=axis_name)
        bounds = {path: _bound(ratio, size, eps) for path, size in relative.items()}
        factors = {path: shrink(before[path], bounds[path]) for path in leaves}
        after = {path: before[path] * factors[path] for path in leaves}
        above = [exceeds(before[path], bounds[path]) for path in leaves]
        new_state = states.after(
            state,
            norm=norms.global_norm(before, scaled=True),
            clipped_norm=norms.global_norm(after, scaled=True),
            threshold=ratio,
            clipped=jnp.any(jnp.stack(above)) if above else jnp.zeros([], bool),
        )
        return trees.map_by_path(trees.scale, updates, factors), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _bound(ratio: Array, param_norm: Array, eps: Number) -> Array:
    least = jnp.asarray(eps, param_norm.dtype)
    return ratio.astype(param_norm.dtype) * jnp.maximum(param_norm, least)


def _axes(axis: AxisRule, path: str, leaves: dict[str, Array]) -> Axes:
    chosen = axis(path, leaves[path]) if callable(axis) else axis
    if chosen is None:
        bias = scopes.bias_of(path, leaves)
        return scopes.unit_axes(path, leaves[path], bias)
    return chosen
