"""Taking the step of an inner transform, or none at all.

By `jax.lax.cond` and not by `jnp.where`, which would need memory for both states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


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
