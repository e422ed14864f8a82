"""What an optimizer remembers of a parameter, whatever the optimizer.

Found by the path and the shape of the array that it stands in.
`optax.tree_utils.tree_map_params` would ask the optimizer for a state without arrays,
which flat, masked and flattened states cannot give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from . import sharding, trees


def first_state(
    inner: optax.GradientTransformation, params: PyTree, like: PyTree
) -> PyTree:
    """Returns what `inner.init` makes, of the structure of a state that there is.

    That may have been made without numbers that are no arrays, as Equinox does.
    """
    leaves = trees.arrays(params)
    state = inner.init(leaves)
    if jax.tree.structure(state) != jax.tree.structure(like):
        alone = jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, leaves)
        state = inner.init(alone)
    return state


def restarted(
    inner: optax.GradientTransformation,
    inner_state: PyTree,
    params: PyTree,
    kept: Mapping[str, Bool[Array, "..."]],
) -> PyTree:
    """Returns the state with what is not kept as `inner.init` makes it: mostly zero."""
    names = trees.by_path(params)
    fresh = trees.by_path(first_state(inner, params, inner_state))

    def one(keys, old):
        path = trees.path(keys)
        mask, new = kept.get(_param_of(path, names)), fresh.get(path)
        if mask is None or new is None or not trees.is_float(old):
            return old
        if jnp.shape(old) != mask.shape or jnp.shape(new) != mask.shape:
            return old  # such as the means of rows and columns
        new = sharding.like(jnp.asarray(new, old.dtype), old)
        return jnp.where(sharding.like(mask, old), old, new)

    return jax.tree_util.tree_map_with_path(one, inner_state)


def moments(inner: optax.GradientTransformation, params: PyTree) -> set[str]:
    """Returns the paths of what restarts together in the state of an optimizer.

    Arrays whose shapes follow those of the parameters, found by making the state, but
    for its numbers, of parameters twice as large too; and what stands beside them.
    """

    def doubled(param):
        shape = tuple(2 * size for size in jnp.shape(param)) or (2,)
        return jax.ShapeDtypeStruct(shape, jnp.result_type(param))

    params = trees.arrays(params)
    usual = trees.by_path(jax.eval_shape(inner.init, params))
    larger = trees.by_path(jax.eval_shape(inner.init, jax.tree.map(doubled, params)))
    names = trees.by_path(params)
    follow = {p for p in usual if p in larger and usual[p].shape != larger[p].shape}
    owners = {_owner(path, names) for path in follow}
    return follow | {path for path in usual if _parent(path) in owners}


def _owner(path: str, names: Mapping[str, Any]) -> str:
    """Returns the path of the NamedTuple in which a tree of moments is a field."""
    return _parent(path.removesuffix(_param_of(path, names)).rstrip("/"))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _param_of(path: str, names: Mapping[str, Any]) -> str:
    """Returns the longest of the parameters' paths that a path ends in."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((end for end in ends if end in names), "")
