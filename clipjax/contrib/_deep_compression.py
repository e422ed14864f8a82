"""Deep gradient compression (DGC): local momentum, sent where it is large."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .. import allocations, masks, norms, patterns, scores
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..compression import _exchange as exchange

_STAGE = 4  # in every stage of the warm-up a quarter of what the last one sent


class DeepGradientCompressionState(NamedTuple):
    """What `deep_gradient_compression` remembers: float32 or wider, like the params."""

    step: Int[Array, ""]
    local_velocity: PyTree  # u, the momentum of this device
    local_sum: PyTree  # v, the velocities that were not sent


def deep_gradient_compression(
    sparsity: Number | Schedule = 0.999,
    *,
    momentum: Number | Schedule = 0.9,
    max_norm: Number | Schedule | None = None,
    stage_steps: int = 0,
    allocation: allocations.Allocation | None = None,
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
        allocation: how leaves share the sparsity, from `allocations`;
            by default `uniform`.
        mean_over: the mesh axes whose devices have gradients of their own.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.deep_gradient_compression(0.5, momentum=0.5)
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
    allocation = allocations.uniform if allocation is None else allocation
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

    def clipped(incoming, step):
        if max_norm is None:
            return incoming
        norm = norms.global_norm(incoming, scaled=True, axis_name=axis_name)
        bound = trees.bound_at(max_norm, step).astype(norm.dtype)
        bound *= math.sqrt(sharding.size(mean_over))
        factor = jnp.where(norm > bound, bound / norm, 1)
        return {p: trees.scale(trees.wide(u), factor) for p, u in incoming.items()}

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
        incoming = exchange.compressible(updates, velocity)
        known = exchange.all_finite(incoming, axis_name, mean_over)
        decay = trees.value_at(momentum, state.step)
        pushed = {
            p: exchange.wide_sum(u, trees.scale(velocity[p], decay))
            for p, u in clipped(incoming, state.step).items()
        }
        total = {p: exchange.wide_sum(u, gathered[p]) for p, u in pushed.items()}
        marks = patterns.Unstructured().masks(
            {p: scores.Magnitude(x) for p, x in total.items()},
            share_at(state.step),
            allocation=allocation,
            axis_name=axis_name,
        )
        sent = {
            p: exchange.cast(masks.apply(marks[p], x), incoming[p].dtype)
            for p, x in total.items()
        }
        rest = {p: total[p] - x.astype(total[p].dtype) for p, x in sent.items()}
        held = {p: jnp.where(marks[p], 0, u) for p, u in pushed.items()}
        new_state = DeepGradientCompressionState(
            trees.next_step(state.step),
            exchange.remembered(state.local_velocity, held, known),
            exchange.remembered(state.local_sum, rest, known),
        )
        return exchange.averaged(updates, sent, known, mean_over), new_state

    return optax.GradientTransformationExtraArgs(init, update)
