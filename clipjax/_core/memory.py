"""Restarting single entries of an optimizer's moments, whatever the optimizer.

An entry is found by the path and the shape of the array that it stands in.
`optax.tree_utils.tree_map_params` would ask the optimizer for a state without arrays,
which flat, masked and flattened states cannot give.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from . import sharding, trees


def restarted(
    inner: optax.GradientTransformation,
    inner_state: PyTree,
    params: PyTree,
    kept: Mapping[str, Bool[Array, "..."]],
) -> PyTree:
    """Returns the state with what is not kept as `inner.init` makes it: mostly zero."""
    fresh, names = trees.by_path(inner.init(params)), trees.by_path(params)

    def one(keys, old):
        path = trees.path(keys)
        mask, new = kept.get(_owner(path, names)), fresh.get(path)
        if mask is None or new is None or not trees.is_float(old):
            return old
        if jnp.shape(old) != mask.shape or jnp.shape(new) != mask.shape:
            return old  # such as the means of rows and columns
        new = sharding.like(jnp.asarray(new, old.dtype), old)
        return jnp.where(sharding.like(mask, old), old, new)

    return jax.tree_util.tree_map_with_path(one, inner_state)


def _owner(path: str, names: Mapping[str, Any]) -> str:
    """Returns the longest of the names that a path ends in."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in names), "")
