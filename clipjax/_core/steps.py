"""Taking the step of an inner transform, or none at all.

By `jax.lax.cond`, where the step is all that is done; entry by entry, where XLA should
fuse it with what is done to the same entries around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from . import sharding, trees


def step_if(
    condition: Bool[Array, ""],
    update: Callable[[PyTree, Any], tuple[PyTree, Any]],
    updates: PyTree,
    inner_state: Any,
) -> tuple[PyTree, Any]:
    """Returns what `update` returns if the condition holds, else zeros and the state.

    Zeros are of the dtype that `update` gives, which may not be that of `updates`; what
    is remembered keeps its own, which narrow parameters may have narrowed.
    """
    kinds, states = jax.eval_shape(update, updates, inner_state)

    def take():
        outgoing, after = update(updates, inner_state)
        return outgoing, as_before(after, inner_state)

    def rest():
        def zero(x, kind):
            if kind.dtype == jax.dtypes.float0:  # of an integer parameter
                return x
            return jnp.zeros_like(x, dtype=kind.dtype)

        zeros = jax.tree.map(zero, updates, kinds)
        return zeros, jax.tree.map(_laid_out, inner_state, states)

    return jax.lax.cond(condition, take, rest)


def taken_if(
    condition: Bool[Array, ""], outgoing: PyTree, after: Any, before: Any
) -> tuple[PyTree, Any]:
    """Returns a step and the state after it if the condition holds.

    Else zeros and the state before.  What is remembered keeps its dtypes.
    """

    @functools.cache
    def zero(dtype):  # which it is where it is used; one for all leaves
        return condition.astype(dtype)

    def step(x):
        if not trees.is_float(x):
            return x
        zeros = sharding.like(jnp.broadcast_to(zero(x.dtype), x.shape), x)
        return jax.lax.select_n(condition, zeros, x)

    def state(new, old):
        if not hasattr(old, "dtype"):
            return new
        return jax.lax.select_n(condition, sharding.like(old, new), new)

    after = jax.tree.map(state, as_before(after, before), before)
    return jax.tree.map(step, outgoing), after


def as_before(after: PyTree, before: PyTree) -> PyTree:
    """Gives what is remembered the dtypes that it had.

    Adam of bfloat16 parameters widens its moments if gradients are float32.
    """

    def one(new, old):
        dtype = jnp.result_type(old)
        return new if jnp.result_type(new) == dtype else jnp.asarray(new).astype(dtype)

    return jax.tree.map(one, after, before)


def _laid_out(leaf: Array, kind: jax.ShapeDtypeStruct) -> Array:
    """Returns a leaf as the other branch lays it out, where the mesh is explicit.

    The zeros that an optimizer starts with may not lie there yet.
    """
    layout = kind.sharding
    if layout is None or jax.typeof(leaf).sharding == layout:
        return leaf
    if jax.sharding.AxisType.Explicit not in layout.mesh.axis_types:
        return leaf
    return jax.sharding.reshard(leaf, layout)
