"""The norms of all parts of an update, as its scope divides it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from .. import norms, scopes
from .._core import sharding, trees
from .._core.types import AxisName
from ..scopes import Part
from . import _known as known
from ._known import Kind

Leaves = Mapping[str, Array]
Names = AxisName | Mapping[str, Any]
"""Mesh axes, for all leaves or by path; for spectral norms, `PartitionSpec`s."""


def names_of(
    leaves: Leaves,
    parts: Mapping[str, Part],
    norm: Callable[..., Any],
    specs: scopes.SpecRule | None,
    axis_name: AxisName,
) -> Names:
    """Returns over which mesh axes the parts of each leaf are split.

    For spectral norms, along which of its axes each leaf is.
    """
    if norm is norms.spectral_norm:
        return {p: spec_of(p, x, specs, axis_name) for p, x in leaves.items()}
    if specs is None or not axis_name:
        return axis_name
    return {
        path: sharding.split_axes(specs(path, leaf), _all_axes(leaf, parts[path].axes))
        for path, leaf in leaves.items()
    }


def spec_of(
    path: str, leaf: Array, specs: scopes.SpecRule | None, axis_name: AxisName
) -> PartitionSpec:
    """Returns how a matrix is split inside `jax.shard_map`."""
    if specs is not None and axis_name:
        return specs(path, leaf)
    names = sharding.manual_axes(leaf) if axis_name is None else axis_name
    if leaf.ndim > 1 and (over := sharding.axes_of(leaf, names)):
        raise ValueError(
            f"The matrix at {path!r} may be split over the mesh axes {over}, and a"
            " block has other singular values. Give `axis_name`, and as `specs` a"
            " function of path and leaf that returns its `PartitionSpec`;"
            " `axis_name=()` if each device has a matrix of its own."
        )
    return PartitionSpec()


def whole(updates: PyTree, axis_name: AxisName) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together."""
    leaves, part = trees.floats(updates), scopes.Tree().part("", {})
    parts = dict.fromkeys(leaves, part)
    sizes = measure(leaves, parts, norms.global_norm, axis_name)
    return sizes.get(part.pool, jnp.zeros([], jnp.float32))


def measure(
    leaves: Leaves, parts: Mapping[str, Part], norm: Callable[..., Any], names: Names
) -> dict[str, Float[Array, "..."]]:
    """Returns the norm of every part, by pool.

    Of a part that is a leaf or more, a scalar; else an array whose measured axes have
    length one.  What a transform before has measured is not measured again.
    """
    kinds = list(_kinds(leaves, parts, norm, names))
    sizes: dict[str, Array] = {}
    for pool, members, kind in kinds:
        size = known.recall([leaves[path] for path in members], kind)
        size = _from_parts(leaves, members, kind) if size is None else size
        if size is not None:
            sizes[pool] = size
    left = {p: x for p, x in leaves.items() if parts[p].pool not in sizes}
    within = {p: x for p, x in left.items() if parts[p].axes is not None}
    pools = {
        pool: {path: left[path] for path in members}
        for pool, members, kind in kinds
        if kind.axes is None and pool not in sizes
    }
    new = _within(within, parts, norm, names) | _across(pools, norm, names)
    for pool, members, kind in kinds:
        if pool in new:
            known.remember([leaves[path] for path in members], kind, new[pool])
    return sizes | new


def emitted(
    leaves: Leaves,
    parts: Mapping[str, Part],
    norm: Callable[..., Any],
    names: Names,
    sizes: Mapping[str, tuple[Array, ...]],
    make: Callable[..., Array],
) -> None:
    """Lets the next transform know the norms of what came out, by pool.

    Not of what was rounded to a narrow dtype, which changes its norm.
    """
    for pool, members, kind in _kinds(leaves, parts, norm, names):
        own = [leaves[path] for path in members]
        if pool in sizes and all(x.dtype == trees.wide(x).dtype for x in own):
            known.remember(own, kind, *sizes[pool], make=make)


def entries(leaves: Leaves, parts: Mapping[str, Part], names: Names) -> dict[str, int]:
    """Returns how many entries are measured together, by pool."""
    result: dict[str, int] = {}
    for path, x in leaves.items():
        axes = _all_axes(x, parts[path].axes)
        own = math.prod(x.shape[axis] for axis in axes)
        own *= sharding.blocks(x, _name(names, path)) if axes else 1
        result[parts[path].pool] = result.get(parts[path].pool, 0) + own
    return result


def mean(sizes: Mapping[str, Array], counted: Mapping[str, int]) -> dict[str, Array]:
    """Turns Euclidean norms into root mean squares, where entries were counted."""
    return {
        pool: size / root(counted.get(pool, 1), size) for pool, size in sizes.items()
    }


def root(count: int, like: Array) -> Float[Array, ""]:
    """Returns the norm of so many ones, in the dtype of another norm; never zero."""
    return jnp.sqrt(jnp.asarray(max(count, 1), like.dtype))


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

    return sharding.zeros(one, leaf).astype(jnp.float32)


def anywhere(flags: Sequence[Array], axis_name: AxisName) -> Array:
    """Tells whether any entry of any flag is set, on any device."""
    if not flags:
        return jnp.zeros([], bool)
    every = [jnp.any(flag) for flag in flags]
    axes = [sharding.axes_of(flag, axis_name) for flag in every]
    here = [
        lax.pmax(flag.astype(jnp.int32), a) > 0 if a else flag
        for flag, a in zip(every, axes, strict=True)
    ]
    return jnp.any(jnp.stack(here))


def _kinds(
    leaves: Leaves, parts: Mapping[str, Part], norm: Callable[..., Any], names: Names
) -> Iterator[tuple[str, list[str], Kind]]:
    """Yields what is measured: the pool, its leaves and how they are."""
    pools: dict[str, list[str]] = {}
    for path in leaves:
        pools.setdefault(parts[path].pool, []).append(path)
    for pool, members in pools.items():
        axes = parts[members[0]].axes
        over = _union(names, members)
        yield pool, members, Kind(norm, axes, over, len(leaves))


def _from_parts(leaves: Leaves, members: list[str], kind: Kind) -> Array | None:
    """Returns the norm of a pool from those of its parts, if they are known.

    Not where devices measure together: which of the parts differ there is not known.
    """
    if kind.axes is not None or kind.names or kind.norm is norms.spectral_norm:
        return None
    own = [leaves[path] for path in members]
    sizes = known.recall_parts(own, kind)
    if not sizes:
        return None
    if kind.norm is norms.inf_norm:
        return norms.inf_norm(sizes)
    return norms.global_norm(sizes, scaled=True)


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
        name = _name(names, path)
        if norm is norms.inf_norm:
            result[path] = norms.unit_inf_norm(x, axes[path], axis_name=name)
        else:
            result[path] = norms.spectral_norm(x, axes[path], spec=name)
    return result


def _across(
    pools: Mapping[str, dict[str, Array]], norm: Callable[..., Any], names: Names
) -> dict[str, Array]:
    """Measures leaves, and what is made of several."""
    if norm is norms.spectral_norm:
        return {
            key: norms.inf_norm(
                [norms.spectral_norm(x, spec=_name(names, p)) for p, x in pool.items()]
            )
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


def _name(names: Names, path: str) -> Any:
    return names[path] if isinstance(names, Mapping) else names


def _union(names: Names, paths: Iterable[str]) -> tuple[Any, ...]:
    every = [_name(names, path) or () for path in paths]
    flat = [n for own in every for n in ((own,) if isinstance(own, str) else own)]
    return tuple(dict.fromkeys(flat))
