"""What devices compress of their updates, keep of it, and exchange."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .. import norms
from .._core import checks as check, sharding, trees
from .._core.types import AxisName


def compressible(updates: PyTree, memory: dict[str, Array]) -> dict[str, Array]:
    """Returns by path the updates that are compressed."""
    for path, update in trees.float_arrays(updates).items():
        check.same_kind("memory", path, memory.get(path), update)
    leaves = trees.floats(updates).items()
    return {path: leaf for path, leaf in leaves if leaf.size and path in memory}


def all_finite(
    incoming: dict[str, Array], axis_name: AxisName, mean_over: AxisName
) -> Bool[Array, ""]:
    """Tells whether the updates are finite, on all devices."""
    names = (*sharding.axis_names(axis_name), *sharding.axis_names(mean_over))
    return jnp.isfinite(norms.inf_norm(incoming, axis_name=names))


def wide_sum(leaf: Array, other: Array) -> Array:
    """Adds in float32 or wider; a sum beyond the range stays at its end."""
    leaf = trees.wide(leaf)
    with jax.numpy_dtype_promotion("standard"):  # to the wider of the two
        return _within_range(leaf + other)


def cast(x: Array, dtype: Any) -> Array:
    """Rounds, and leaves a number beyond the range of the dtype at its end."""
    return _within_range(x, jnp.finfo(dtype).max).astype(dtype)


def _within_range(x: Array, most: Any = jnp.inf) -> Array:
    if jnp.iscomplexobj(x):
        return x  # has no order
    most = jnp.minimum(jnp.finfo(x.dtype).max, jnp.asarray(most, x.dtype))
    return jnp.clip(x, -most, most)  # NaN stays


def remembered(memory: PyTree, new: dict[str, Array], known: Bool[Array, ""]) -> PyTree:
    """Returns the memory with what is new, if all that came in was finite."""

    def one(old, new):
        new = cast(new, old.dtype)
        return jnp.where(known & jnp.isfinite(new), new, old)

    return trees.map_by_path(one, memory, new)


def averaged(
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
