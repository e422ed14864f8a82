"""What is sent of a gradient: compressors, for `error_feedback`.

A compressor is a function of a tree's leaves, the step and the mesh axes over which the
leaves are split.  What it leaves out it may forget: the feedback keeps it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, Key

from .. import norms
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation, uniform
from ..patterns import Unstructured
from ..selection._keys import Magnitude

Compressor = Callable[[Sequence[Array], Array, AxisName], list[Array]]
"""From a tree's leaves to what is sent of them: `top_k(0.99)`, `sign`, or your own.

Called as `compress(leaves, step, axis_name)`: with leaves that are finite, not empty,
and in float32 or wider; the number of compressions before this one; and the mesh axes
over which leaves are split (not those whose devices have gradients of their own).
"""


def top_k(
    sparsity: Number | Schedule, *, allocation: Allocation = uniform
) -> Compressor:
    """Sends the entries of the largest magnitude, in an exact number, as they are.

    C(x)ᵢ = xᵢ if |xᵢ| is among the k largest, else 0

    Of equal magnitudes the first are sent.  Nothing is sorted.

    Args:
        sparsity: s in [0, 1], the share of zeros in what is sent; a number, a traced
            value or a schedule.
        allocation: how leaves share it, from `allocations`: by default each leaf sends
            its own share, and one entry at least; `allocations.global_` compares the
            entries of all leaves.  Not by path: a compressor sees none.

    Example:
        >>> compress = top_k(0.75)
        >>> compress([jnp.array([1.0, -3.0, 2.0, 0.5])], jnp.int32(0))
        [Array([ 0., -3.,  0.,  0.], dtype=float32)]

    Reference:
        Sebastian U. Stich, Jean-Baptiste Cordonnier, Martin Jaggi, Sparsified SGD with
        Memory, 2018, https://arxiv.org/abs/1809.07599
    """
    check.between(0, 1, sparsity=sparsity)
    check.function(allocation=allocation)

    def compress(leaves, step, axis_name=None):
        scored = [Magnitude(x) for x in leaves]
        return _marked(leaves, scored, sparsity, step, allocation, axis_name)

    return compress


def random_k(
    sparsity: Number | Schedule,
    key: Key[Array, ""],
    *,
    allocation: Allocation = uniform,
) -> Compressor:
    """Sends entries that are drawn anew in every step, in an exact number, as they are.

    Devices that share the key draw the same entries: what they exchange is k numbers
    and no indices.  The numbers are not scaled up, as feedback wants it.

    Args:
        sparsity: s in [0, 1], the share of zeros in what is sent; a number, a traced
            value or a schedule.
        key: of `jax.random.key`.
        allocation: how leaves share the sparsity, from `allocations`; not by path.

    Example:
        >>> compress = random_k(0.75, jax.random.key(0))
        >>> sent = [compress([jnp.ones(8)], jnp.int32(step))[0] for step in range(2)]
        >>> [int(x.sum()) for x in sent], bool((sent[0] == sent[1]).all())
        ([2, 2], False)

    Reference:
        Sebastian U. Stich, Jean-Baptiste Cordonnier, Martin Jaggi, Sparsified SGD with
        Memory, 2018, https://arxiv.org/abs/1809.07599
    """
    check.between(0, 1, sparsity=sparsity)
    check.function(allocation=allocation)

    def compress(leaves, step, axis_name=None):
        now = jax.random.fold_in(key, step)
        keys = [jax.random.fold_in(now, i) for i in range(len(leaves))]
        scored = [noise(k, x, axis_name) for k, x in zip(keys, leaves, strict=True)]
        return _marked(leaves, scored, sparsity, step, allocation, axis_name)

    def noise(key, x, axis_name):
        key = sharding.own_key(key, sharding.axes_of(x, axis_name))
        return sharding.like(jax.random.uniform(key, x.shape), x)

    return compress


def sign(
    leaves: Sequence[Inexact[Array, "..."]],
    step: Int[Array, ""] | int = 0,
    axis_name: AxisName = None,
) -> list[Array]:
    """Sends of every leaf the signs and one number, the mean magnitude.

    C(x) = ‖x‖₁/n · sign(x) for a leaf of n entries

    An entry that is zero sends zero.

    Args:
        leaves: arrays of any shape, none of them empty.
        step: not used.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> sign([jnp.array([1.0, -2.0, 6.0])])
        [Array([ 3., -3.,  3.], dtype=float32)]

    Reference:
        Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian U. Stich, Martin Jaggi,
        Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019,
        https://arxiv.org/abs/1901.09847
    """
    del step
    return [jnp.sign(x) * _mean_magnitude(x, axis_name).astype(x.dtype) for x in leaves]


def _marked(
    leaves: Sequence[Array],
    scored: Sequence[Array | Magnitude],
    sparsity: Number | Schedule,
    step: Int[Array, ""],
    allocation: Allocation,
    axis_name: AxisName,
) -> list[Array]:
    """Returns the leaves with zeros wherever the scores are too low."""
    share = jnp.clip(trees.value_at(sparsity, step), 0, 1)
    marks = Unstructured().masks(
        scored, share, allocation=allocation, axis_name=axis_name
    )
    zeros = map(jnp.zeros_like, leaves)
    return [jnp.where(*parts) for parts in zip(marks, leaves, zeros, strict=True)]


def _mean_magnitude(x: Array, axis_name: AxisName) -> Float[Array, ""]:
    """Returns the mean magnitude of finite entries, in float32 or wider."""
    magnitude = jnp.abs(trees.wide(x))
    unit = trees.power_of_two(norms.inf_norm(magnitude, axis_name=axis_name))
    total = jnp.sum(magnitude / unit)  # of numbers below two: it cannot overflow
    total = sharding.over(lax.psum, total, x, axis_name)
    return total / (x.size * sharding.blocks(x, axis_name)) * unit
