"""What is sent of a gradient: compressors, for `error_feedback`.

A compressor is a function of leaves by path, the step and the mesh axes over which the
leaves are split.  What it leaves out it may forget: the feedback keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, Key

from .. import masks, norms
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation, uniform
from ..allocations._budget import Scores
from ..patterns import Unstructured
from ..selection._keys import Magnitude

Leaves = Mapping[str, Array]

Compressor = Callable[[Leaves, Array, AxisName], dict[str, Array]]
"""From leaves by path to what is sent of them: `top_k(0.99)`, `sign`, or your own.

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
            entries of all leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> compress = clipjax.compression.top_k(0.75)
        >>> compress({"w": jnp.array([1.0, -3.0, 2.0, 0.5])}, jnp.int32(0))
        {'w': Array([ 0., -3.,  0.,  0.], dtype=float32)}

    Reference:
        Sebastian U. Stich, Jean-Baptiste Cordonnier, Martin Jaggi, Sparsified SGD with
        Memory, 2018, https://arxiv.org/abs/1809.07599
    """
    check.between(0, 1, sparsity=sparsity)
    check.function(allocation=allocation)

    def compress(leaves, step, axis_name=None):
        scored = {p: Magnitude(x) for p, x in leaves.items()}
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
        allocation: how leaves share the sparsity, from `allocations`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> compress = clipjax.compression.random_k(0.75, jax.random.key(0))
        >>> leaves = {"w": jnp.ones(8)}
        >>> sent = [compress(leaves, jnp.int32(step))["w"] for step in range(2)]
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
        keys = {p: jax.random.fold_in(now, i) for i, p in enumerate(leaves)}
        scored = {p: noise(keys[p], x, axis_name) for p, x in leaves.items()}
        return _marked(leaves, scored, sparsity, step, allocation, axis_name)

    def noise(key, x, axis_name):
        key = sharding.own_key(key, sharding.axes_of(x, axis_name))
        return sharding.like(jax.random.uniform(key, x.shape), x)

    return compress


def sign(
    leaves: Mapping[str, Inexact[Array, "..."]],
    step: Int[Array, ""] | int = 0,
    axis_name: AxisName = None,
) -> dict[str, Array]:
    """Sends of every leaf the signs and one number, the mean magnitude.

    C(x) = ‖x‖₁/n · sign(x) for a leaf of n entries

    An entry that is zero sends zero.

    Args:
        leaves: by path, arrays of any shape, none of them empty.
        step: not used.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.compression.sign({"w": jnp.array([1.0, -2.0, 6.0])})
        {'w': Array([ 3., -3.,  3.], dtype=float32)}

    Reference:
        Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian U. Stich, Martin Jaggi,
        Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019,
        https://arxiv.org/abs/1901.09847
    """
    del step
    return {
        p: jnp.sign(x) * _mean_magnitude(x, axis_name).astype(x.dtype)
        for p, x in leaves.items()
    }


def _marked(
    leaves: Leaves,
    scored: Mapping[str, Scores],
    sparsity: Number | Schedule,
    step: Int[Array, ""],
    allocation: Allocation,
    axis_name: AxisName,
) -> dict[str, Array]:
    """Returns the leaves with zeros wherever the scores are too low."""
    share = jnp.clip(trees.value_at(sparsity, step), 0, 1)
    marks = Unstructured().masks(
        scored, share, allocation=allocation, axis_name=axis_name
    )
    return {p: masks.apply(marks[p], x) for p, x in leaves.items()}


def _mean_magnitude(x: Array, axis_name: AxisName) -> Float[Array, ""]:
    """Returns the mean magnitude of finite entries, in float32 or wider."""
    magnitude = jnp.abs(trees.wide(x))
    unit = trees.power_of_two(norms.inf_norm(magnitude, axis_name=axis_name))
    total = jnp.sum(magnitude / unit)  # of numbers below two: it cannot overflow
    total = sharding.over(lax.psum, total, x, axis_name)
    return total / (x.size * sharding.blocks(x, axis_name)) * unit
