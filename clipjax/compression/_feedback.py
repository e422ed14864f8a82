"""Gradient compression without bias: what is not sent now is sent later.

It belongs where gradients are still those of one device, before their mean is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .._core import checks as check, trees
from .._core.types import AxisName, Number, Schedule
from . import _exchange as exchange
from ._compressors import Compressor


class ErrorFeedbackState(NamedTuple):
    """What `error_feedback` remembers."""

    step: Int[Array, ""]
    residual: PyTree  # what was not sent: like the parameters, float32 or wider


def error_feedback(
    compress: Compressor,
    *,
    decay: Number | Schedule = 1.0,
    mean_over: AxisName = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Compresses updates, and adds to each what the earlier ones left out.

    u′ₜ = C(β·eₜ + uₜ), eₜ₊₁ = β·eₜ + uₜ - u′ₜ, e₁ = 0

    Use it before the optimizer, inside `jax.shard_map`, where each device has the
    gradient of its own examples.  With `mean_over` each device compresses its own
    gradient and keeps its own residual e; the mean of the compressed ones goes on.  The
    arrays that are averaged are dense: to save bytes, the network has to encode zeros.
    Under plain `jax.jit` gradients arrive as means: then this compresses the mean.

    With β = 1 whatever went in has come out or is still held: Σu′ + e = Σu, up to
    rounding in float32.  What rounding to a narrow dtype takes off is held too.

    Inside `jax.shard_map` JAX adds up the gradients of all devices by itself, unless it
    gets `check_vma=False`, or parameters that vary before the gradient is taken:
    `jax.lax.pcast(params, axes, to="varying")`.  Outside of it the residual has one
    more axis, the devices.

    An update with a NaN or an infinity passes unchanged, and no device changes its
    residual.  Sums beyond a dtype's range stay at its end.

    Args:
        compress: the compressor, such as `top_k(0.99)`, or a function of your own as
            `Compressor` describes it.
        decay: β in [0, 1], the share of the residual that is added; a number, a traced
            value or a schedule.
        mean_over: the mesh axes whose devices have gradients of their own; `None` if
            there are none, or if the mean is taken elsewhere.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.compression.error_feedback(clipjax.compression.top_k(0.5))
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
        incoming = exchange.compressible(updates, residual)
        known = exchange.all_finite(incoming, axis_name, mean_over)
        total = {
            p: exchange.wide_sum(u, trees.scale(residual[p], share))
            for p, u in incoming.items()
        }
        finite = {p: jnp.where(known, x, jnp.zeros_like(x)) for p, x in total.items()}
        sent = compress(finite, state.step, axis_name) if finite else {}
        sent = {p: exchange.cast(x, incoming[p].dtype) for p, x in sent.items()}
        rest = {p: total[p] - x.astype(total[p].dtype) for p, x in sent.items()}
        outgoing = exchange.averaged(updates, sent, known, mean_over)
        residual = exchange.remembered(state.residual, rest, known)
        return outgoing, ErrorFeedbackState(trees.next_step(state.step), residual)

    return optax.GradientTransformationExtraArgs(init, update)
