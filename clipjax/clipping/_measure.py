"""The norms of all parts of an update, as its scope divides it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import _meshes as meshes, _trees as trees, norms, scopes
from .._types import AxisName
from ..scopes import Part

Leaves = Mapping[str, Array]
Names = AxisName | Mapping[str, AxisName]


def names_of(
    leaves: Leaves,
    parts: Mapping[str, Part],
    specs: scopes.SpecRule | None,
    axis_name: AxisName,
) -> Names:
    """Returns over which mesh axes the parts of each leaf are split."""
    if specs is None or not axis_name:
        return axis_name
    return {
        path: scopes.split_axes(specs(path, leaf), _all_axes(leaf, parts[path].axes))
        for path, leaf in leaves.items()
    }


def measure(
    leaves: Leaves, parts: Mapping[str, Part], norm: Callable[..., Any], names: Names
) -> dict[str, Float[Array, "..."]]:
    """Returns the norm of every part, by pool.

    Of a part that is a leaf or more, a scalar; else an array whose measured axes have
    length one.
    """
    pools: dict[str, dict[str, Array]] = {}
    for path, x in leaves.items():
        if parts[path].axes is None:
            pools.setdefault(parts[path].pool, {})[path] = x
    within = {path: x for path, x in leaves.items() if parts[path].axes is not None}
    return _within(within, parts, norm, names) | _across(pools, norm, names)


def entries(leaves: Leaves, parts: Mapping[str, Part], names: Names) -> dict[str, int]:
    """Returns how many entries are measured together, by pool."""
    result: dict[str, int] = {}
    for path, x in leaves.items():
        axes = _all_axes(x, parts[path].axes)
        own = math.prod(x.shape[axis] for axis in axes)
        own *= meshes.blocks(x, _name(names, path)) if axes else 1
        result[parts[path].pool] = result.get(parts[path].pool, 0) + own
    return result


def mean(sizes: Mapping[str, Array], counted: Mapping[str, int]) -> dict[str, Array]:
    """Turns Euclidean norms into root mean squares, where entries were counted."""
    return {
        pool: size / jnp.sqrt(jnp.asarray(max(counted.get(pool, 1), 1), size.dtype))
        for pool, size in sizes.items()
    }


def total(
    sizes: Mapping[str, Array], norm: Callable[..., Any], axis_name: AxisName
) -> Float[Array, ""]:
    """Returns the norm of the whole tree from those of its parts."""
    if norm is norms.global_norm:
        if len(sizes) == 1:
            (size,) = sizes.values()
            if not size.ndim:
                return size
        return norms.global_norm(dict(sizes), scaled=True, axis_name=axis_name)
    return norms.inf_norm(dict(sizes), axis_name=axis_name)


def blank(
    leaf: Array, path: str, part: Part, norm: Callable[..., Any], names: Names
) -> Array:
    """Returns zeros like the norm of a part, laid out as that will be."""
    if part.axes is None:
        return jnp.zeros([], jnp.float32)

    def one(x):
        return _within({path: x}, {path: part}, norm, names)[path]

    return meshes.zeros(one, leaf).astype(jnp.float32)


def _within(
    leaves: Leaves, parts: Mapping[str, Part], norm: Callable[..., Any], names: Names
) -> dict[str, Array]:
    """Measures parts of a leaf."""
    axes = {path: parts[path].axes or () for path in leaves}
    result = {p: jnp.abs(trees.wide(x)) for p, x in leaves.items() if not axes[p]}
    rest = {path: x for path, x in leaves.items() if axes[path]}
    if norm is norms.global_norm:
        return result | norms.unit_norms(rest, axes, axis_name=names)
    for path, x in rest.items():
        if norm is norms.inf_norm:
            name = _name(names, path)
            result[path] = norms.unit_inf_norm(x, axes[path], axis_name=name)
        else:
            result[path] = norms.spectral_norm(x, axes[path])
    return result


def _across(
    pools: Mapping[str, dict[str, Array]], norm: Callable[..., Any], names: Names
) -> dict[str, Array]:
    """Measures leaves, and what is made of several."""
    if norm is norms.spectral_norm:
        return {
            key: norms.inf_norm([norms.spectral_norm(x) for x in pool.values()])
            for key, pool in pools.items()
        }
    union = {key: _union(names, pool) for key, pool in pools.items()}
    if norm is norms.inf_norm:
        return {k: norms.inf_norm(p, axis_name=union[k]) for k, p in pools.items()}
    is_alike = len(pools) > 1 and all(len(pool) == 1 for pool in pools.values())
    if is_alike and not isinstance(names, Mapping):
        alone = {key: next(iter(pool.values())) for key, pool in pools.items()}
        return norms.leaf_norms(alone, scaled=True, axis_name=names)
    return {
        key: norms.global_norm(pool, scaled=True, axis_name=union[key])
        for key, pool in pools.items()
    }


def _all_axes(leaf: Array, axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return tuple(range(leaf.ndim)) if axes is None else axes


def _name(names: Names, path: str) -> AxisName:
    return names[path] if isinstance(names, Mapping) else names


def _union(names: Names, pool: Leaves) -> AxisName:
    if not isinstance(names, Mapping):
        return names
    every = [_name(names, path) or () for path in pool]
    flat = [n for own in every for n in ((own,) if isinstance(own, str) else own)]
    return tuple(dict.fromkeys(flat))


def anywhere(flags: Sequence[Array], axis_name: AxisName) -> Array:
    """Tells whether any entry of any flag is set, on any device."""
    if not flags:
        return jnp.zeros([], bool)
    every = [jnp.any(flag) for flag in flags]
    axes = [meshes.axes_of(flag, axis_name) for flag in every]
    here = [
        jax.lax.pmax(flag.astype(jnp.int32), a) > 0 if a else flag
        for flag, a in zip(every, axes, strict=True)
    ]
    return jnp.any(jnp.stack(here))
