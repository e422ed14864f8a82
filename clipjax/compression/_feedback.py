"""Gradient compression without bias: what is not sent now is sent later.

It belongs where gradients are still those of one device, before their mean is taken.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import allocations, norms, patterns, scores
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ._compressors import Compressor

_STAGE = 4  # in every stage of the warm-up a quarter of what the last one sent


class ErrorFeedbackState(NamedTuple):
    """What `error_feedback` remembers."""

    step: Int[Array, ""]
    residual: PyTree  # what was not sent: like the parameters, float32 or wider


class DeepGradientCompressionState(NamedTuple):
    """What `deep_gradient_compression` remembers: float32 or wider, like the params."""

    step: Int[Array, ""]
    local_velocity: PyTree  # u, the momentum of this device
    local_sum: PyTree  # v, the velocities that were not sent


def error_feedback(
    compress: Compressor,
    *,
    decay: Number | Schedule = 1.0,
    mean_over: AxisName = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Compresses updates, and adds to each what the earlier ones left out.

    u′ₜ = C(β·eₜ + uₜ), eₜ₊₁ = β·eₜ + uₜ - u′ₜ, e₁ = 0

    With β = 1 all that went in has come out or is still held: Σu′ + e = Σu, up to
    rounding in float32.  That includes what rounding to a narrow dtype takes off.

    Stands before the optimizer, and is what it says only inside `jax.shard_map`, where
    every device has the gradient of its own examples: with `mean_over` each device
    compresses its own and keeps its own residual, and the mean of what was sent goes
    on.  The arrays that are averaged are dense, whatever is zero in them: what their
    encoding would save is for the network to realise.  Under plain `jax.jit` gradients
    arrive as means: then this compresses the mean, and saves no bytes at all.

    There JAX adds up the gradients of all devices by itself, unless it is given
    `check_vma=False`, or parameters that are made varying before the gradient is taken:
    `jax.lax.pcast(params, axes, to="varying")`.  Outside of `jax.shard_map` the
    residual has an axis more, the devices.

    An update with a NaN or an infinity passes as it is, and no device changes its
    residual.  Sums beyond a dtype's range stay at its end.

    Args:
        compress: from `compressors`, or any function of leaves, step and axis name.
        decay: β in [0, 1], how much of the residual is added; a number, a traced value
            or a schedule.
        mean_over: the mesh axes whose devices have gradients of their own; `None` if
            there are none, or the mean is taken elsewhere.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> from clipjax import compression as compressors
        >>> tx = error_feedback(compressors.top_k(0.5))
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(3):
        ...     u, state = tx.update(jnp.array([3.0, 2.0]), state)
        ...     print(u, state.residual)
        [3. 0.] [0. 2.]
        [0. 4.] [3. 0.]
        [6. 0.] [0. 2.]

    Reference:
        Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian U. Stich, Martin Jaggi,
        Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019,
        https://arxiv.org/abs/1901.09847
    """
    check.function(compress=compress)
    check.between(0, 1, decay=decay)

    def init(params):
        return ErrorFeedbackState(
            jnp.zeros([], jnp.int32), trees.zeros_of_floats(params)
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        share = trees.value_at(decay, state.step)
        residual = trees.by_path(state.residual)
        moves = _filled(updates, residual)
        known = _all_finite(moves, axis_name, mean_over)
        total = {p: _sum(u, trees.scale(residual[p], share)) for p, u in moves.items()}
        finite = [jnp.where(known, x, jnp.zeros_like(x)) for x in total.values()]
        sent = compress(finite, state.step, axis_name) if finite else []
        sent = {p: _cast(x, moves[p].dtype) for p, x in zip(total, sent, strict=True)}
        rest = {p: _less(total[p], sent[p]) for p in total}
        outgoing = _outgoing(updates, sent, known, mean_over)
        residual = _updated(state.residual, rest, known)
        return outgoing, ErrorFeedbackState(trees.next_step(state.step), residual)

    return optax.GradientTransformationExtraArgs(init, update)


def deep_gradient_compression(
    sparsity: Number | Schedule = 0.999,
    *,
    momentum: Number | Schedule = 0.9,
    max_norm: Number | Schedule | None = None,
    stage_steps: int = 0,
    allocation: allocations.Allocation = allocations.uniform,
    mean_over: AxisName = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Sends the largest thousandth of a momentum that each device gathers by itself.

    u ← μ·u + g, v ← v + u, u′ᵢ = vᵢ where |vᵢ| is among the k largest, and there
    uᵢ ← 0, vᵢ ← 0

    The momentum is taken before the compression, so `optax.sgd(learning_rate)` without
    one comes after it.  Where an entry is sent its momentum starts anew, lest it push
    on in a direction that is out of date.

    With `max_norm` each of N devices clips its gradient before it is added: its share
    g/N of the mean to c/√N, as long as what N independent ones of that length add up
    to is c.  The sparsity rises in stages of E steps, if asked: 75, 93.75, 98.4, 99.6,
    99.9 %, that is sₜ = min(s, 1 - 4^-(1 + ⌊t/E⌋)).

    Where gradients have to come from, what is exchanged and what plain `jax.jit` makes
    of it: see `error_feedback`.  Under it N is 1.

    An update with a NaN or an infinity passes as it is, and no device changes its
    state.  Sums beyond a dtype's range stay at its end.

    Args:
        sparsity: s in [0, 1], the share of zeros in what is sent; this and the next two
            are numbers, traced values or schedules.
        momentum: μ in [0, 1).
        max_norm: c > 0, to which the norm of the mean gradient would be clipped, or
            `None`.
        stage_steps: E, steps in a stage of the warm-up, in the paper those of an epoch;
            0 for none; a static integer.
        allocation: how leaves share the sparsity, from `allocations`.
        mean_over: the mesh axes whose devices have gradients of their own.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = deep_gradient_compression(0.5, momentum=0.5)
        >>> state = tx.init(jnp.zeros(2))
        >>> for _ in range(3):
        ...     u, state = tx.update(jnp.array([4.0, 3.0]), state)
        ...     print(u, state.local_velocity, state.local_sum)
        [4. 0.] [0. 3.] [0. 3.]
        [0.  7.5] [4. 0.] [4. 0.]
        [10.  0.] [0. 3.] [0. 3.]

    Reference:
        Yujun Lin, Song Han, Huizi Mao, Yu Wang, William J. Dally, Deep Gradient
        Compression: Reducing the Communication Bandwidth for Distributed Training,
        2018, https://arxiv.org/abs/1712.01887
    """
    check.between(0, 1, sparsity=sparsity)
    check.below_one(momentum=momentum)
    if max_norm is not None:
        check.positive(max_norm=max_norm)
    check.whole(0, stage_steps=stage_steps)
    check.function(allocation=allocation)

    def share_at(step):
        share = jnp.clip(trees.value_at(sparsity, step), 0, 1)
        if not stage_steps:
            return share
        stage = 1 + (step // jnp.int32(stage_steps)).astype(jnp.float32)
        return jnp.minimum(share, 1 - jnp.float32(_STAGE) ** -stage)

    def clipped(moves, step):
        if max_norm is None:
            return moves
        norm = norms.global_norm(moves, scaled=True, axis_name=axis_name)
        bound = trees.bound_at(max_norm, step).astype(norm.dtype)
        bound *= math.sqrt(sharding.size(mean_over))
        factor = jnp.where(norm > bound, bound / norm, 1)
        return {p: trees.scale(trees.wide(u), factor) for p, u in moves.items()}

    def init(params):
        return DeepGradientCompressionState(
            jnp.zeros([], jnp.int32),
            trees.zeros_of_floats(params),
            trees.zeros_of_floats(params),  # no array twice: the state may be donated
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        velocity = trees.by_path(state.local_velocity)
        gathered = trees.by_path(state.local_sum)
        moves = _filled(updates, velocity)
        known = _all_finite(moves, axis_name, mean_over)
        decay, grads = trees.value_at(momentum, state.step), clipped(moves, state.step)
        pushed = {p: _sum(g, trees.scale(velocity[p], decay)) for p, g in grads.items()}
        total = {p: _sum(u, gathered[p]) for p, u in pushed.items()}
        share = share_at(state.step)
        marks = _largest(total, share, allocation, axis_name)
        sent = {
            p: _cast(jnp.where(marks[p], x, jnp.zeros_like(x)), moves[p].dtype)
            for p, x in total.items()
        }
        rest = {p: _less(total[p], sent[p]) for p in total}
        held = {p: jnp.where(marks[p], 0, u) for p, u in pushed.items()}
        new_state = DeepGradientCompressionState(
            trees.next_step(state.step),
            _updated(state.local_velocity, held, known),
            _updated(state.local_sum, rest, known),
        )
        return _outgoing(updates, sent, known, mean_over), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _largest(
    total: dict[str, Array],
    share: Float[Array, ""],
    allocation: allocations.Allocation,
    axis_name: AxisName,
) -> dict[str, Bool[Array, "..."]]:
    if not total:
        return {}
    allocation = allocations.at_paths(allocation, list(total))
    scored = [scores.Magnitude(x) for x in total.values()]
    marks = patterns.Unstructured().masks(
        scored, share, allocation=allocation, axis_name=axis_name
    )
    return dict(zip(total, marks, strict=True))


def _filled(updates: PyTree, memory: dict[str, Array]) -> dict[str, Array]:
    """Returns by path the updates that are compressed."""
    leaves = trees.floats(updates).items()
    return {path: leaf for path, leaf in leaves if leaf.size and path in memory}


def _all_finite(
    moves: dict[str, Array], axis_name: AxisName, mean_over: AxisName
) -> Bool[Array, ""]:
    """Tells whether the updates are finite, on all devices."""
    names = (*sharding.axis_names(axis_name), *sharding.axis_names(mean_over))
    return jnp.isfinite(norms.inf_norm(moves, axis_name=names))


def _sum(leaf: Array, other: Array) -> Array:
    leaf = trees.wide(leaf)
    with jax.numpy_dtype_promotion("standard"):  # to the wider of the two
        return _within_range(leaf + other)


def _less(total: Array, sent: Array) -> Array:
    return total - sent.astype(total.dtype)


def _cast(x: Array, dtype: Any) -> Array:
    """Rounds, and leaves a number beyond the range of the dtype at its end."""
    return _within_range(x, jnp.finfo(dtype).max).astype(dtype)


def _within_range(x: Array, most: Any = jnp.inf) -> Array:
    if jnp.iscomplexobj(x):
        return x  # has no order
    most = jnp.minimum(jnp.finfo(x.dtype).max, jnp.asarray(most, x.dtype))
    return jnp.clip(x, -most, most)  # NaN stays


def _updated(memory: PyTree, new: dict[str, Array], known: Bool[Array, ""]) -> PyTree:
    def one(old, new):
        new = _cast(new, old.dtype)
        return jnp.where(known & jnp.isfinite(new), new, old)

    return trees.map_by_path(one, memory, new)


def _outgoing(
    updates: PyTree, sent: dict[str, Array], known: Bool[Array, ""], axes: AxisName
) -> PyTree:
    """Returns what is sent, or what came in if that is not finite: its mean."""

    def one(update, sent):
        result = jnp.where(known, sent, update)
        differing = sharding.axes_of(result, axes)
        if not differing:
            return result
        # Divided before the sum can overflow.
        part = trees.wide(result) / sharding.size(differing)
        return lax.psum(part, differing).astype(result.dtype)

    return trees.map_by_path(one, updates, sent)
