"""Gradient compression without bias: what is not sent now is sent later.

It belongs where gradients are still those of one device, before their mean is taken.
"""

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
        compress: such as `top_k(0.99)`, or any function as `Compressor` describes.
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
