"""Where an array lives: over which mesh axes a sum over it has to go.

Under `jax.jit` the compiler adds the collectives itself.  Inside `jax.shard_map` every
array is a local block: then the axes are named by the caller, and the array's own type
says over which of them it differs (a replicated array is counted once).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .types import AxisName


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """Returns one name or several as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def size(axis_name: AxisName) -> int:
    """Returns over how many devices the named axes go."""
    return math.prod(jax.lax.axis_size(name) for name in axis_names(axis_name))


def axes_of(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """Returns those of the named axes over which the blocks of `x` differ.

    Where JAX does not track that (`check_vma=False`, `jax.vmap`), all of them.
    """
    names = axis_names(axis_name)
    if not names or not all(_varying(jax.lax.axis_index(name)) for name in names):
        return names
    return tuple(name for name in names if name in _varying(x))


def differing_axes(x: Array) -> tuple[str, ...]:
    """Returns the axes over which JAX knows that the blocks of `x` differ.

    None where it does not track that.
    """
    return tuple(sorted(_varying(x)))


def own_key(key: Array, axes: tuple[str, ...]) -> Array:
    """Returns a random key for each block over these axes."""
    for name in axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(name))
    return key


def manual_axes(x: Array) -> tuple[str, ...]:
    """Returns the mesh axes over which `jax.shard_map` runs."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = jax.sharding.AxisType.Manual
    return tuple(name for name, kind in kinds if kind == manual)


def inside_shard_map() -> bool:
    """Tells whether what is traced now is a block of `jax.shard_map`."""
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    return jax.sharding.AxisType.Manual in axis_types


def over(
    collective: Callable[..., Array], value: Array, x: Array, axis_name: AxisName
) -> Array:
    """Returns what a collective makes of values, one of each block of `x`."""
    axes = axes_of(x, axis_name)
    return collective(value, axes) if axes else value


def blocks(x: Array, axis_name: AxisName) -> int:
    """Returns in how many different blocks the whole of `x` lies."""
    return math.prod(jax.lax.axis_size(name) for name in axes_of(x, axis_name))


def split_axes(spec: PartitionSpec, axes: tuple[int, ...]) -> AxisName:
    """Returns the mesh axes that split these axes of an array laid out by a spec.

    Example:
        >>> from clipjax._core.sharding import split_axes
        >>> split_axes(PartitionSpec("data", ("model", "expert")), (1,))
        ('model', 'expert')
    """
    names: list[str] = []
    for axis in axes:
        entry = spec[axis] if axis < len(spec) else None
        names += [entry] if isinstance(entry, str) else list(entry or ())
    return tuple(names)


def matrix_spec(
    specs: Callable[[str, Array], PartitionSpec] | None,
    axis_name: AxisName,
    path: str,
    leaf: Array,
) -> PartitionSpec:
    """Returns how a matrix is split inside `jax.shard_map`."""
    if specs is not None and axis_name:
        return specs(path, leaf)
    names = manual_axes(leaf) if axis_name is None else axis_name
    if leaf.ndim > 1 and (over := axes_of(leaf, names)):
        raise ValueError(
            f"The matrix at {path!r} may be split over the mesh axes {over}, and a"
            " block has other singular values. Give `axis_name`, and as `specs` a"
            " function of path and leaf that returns its `PartitionSpec`;"
            " `axis_name=()` if each device has a matrix of its own."
        )
    return PartitionSpec()


def is_partitioned(x: Array) -> bool:
    """Tells whether the compiler may have split `x` over devices."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    manual = jax.sharding.AxisType.Manual
    return any(size > 1 and kind != manual for size, kind in kinds)


def is_local(x: Array) -> bool:
    """Tells whether no mesh is known that could split `x`: it is whole, or a block."""
    manual = jax.sharding.AxisType.Manual
    return all(kind == manual for kind in jax.typeof(x).sharding.mesh.axis_types)


def like(values: Array, x: Array) -> Array:
    """Lays out `values`, of the shape of `x`, as `x` itself lies on its mesh."""
    if _is_explicit(x):
        return jax.sharding.reshard(values, jax.typeof(x).sharding)
    return values


def laid_out_by_compiler(
    function: Callable[..., Array], x: Array, *rest: Array
) -> Array:
    """Returns `function(x, *rest)`, which lies on the mesh as `x` does.

    Where the mesh is explicit, for a function of more than entries, whose products and
    shapes have no one layout.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = jax.sharding.AxisType.Explicit
    axes = tuple(name for name, kind in kinds if kind == explicit)
    if not axes:
        return function(x, *rest)
    layout = jax.typeof(x).sharding.spec
    free: Any = jax.sharding.auto_axes(function, axes=axes, out_sharding=layout)
    return free(x, *rest)


def has_whole_columns(x: Array, multiple: int) -> bool:
    """Tells whether each device holds a multiple of so many entries of the last axis.

    Known where the mesh has explicit axes; else the compiler sees to it.
    """
    if not x.ndim or not _is_explicit(x):
        return True
    sharding = jax.typeof(x).sharding
    names = sharding.spec[-1]
    names = axis_names(names)
    pieces = math.prod(sharding.mesh.shape[name] for name in names)
    return pieces == 1 or x.shape[-1] // pieces % multiple == 0


def zeros(function: Callable[..., Array], x: Array) -> Array:
    """Returns zeros of the type of `function(x)`, without computing that."""
    kind = jax.eval_shape(function, x)
    result = jnp.zeros(kind.shape, kind.dtype)
    if _is_explicit(x):
        result = jax.sharding.reshard(result, kind.sharding)
    return varying_as(result, kind)


def varying_as(x: Array, kind: Array | jax.ShapeDtypeStruct) -> Array:
    """Returns `x` as of a type that differs over every device axis that `kind` does."""
    for name in sorted(_varying(kind) - _varying(x)):
        x = x + (jax.lax.axis_index(name) * 0).astype(x.dtype)
    return x


def _is_explicit(x: Array) -> bool:
    explicit = jax.sharding.AxisType.Explicit
    return explicit in jax.typeof(x).sharding.mesh.axis_types


def _varying(x: Array | jax.ShapeDtypeStruct) -> frozenset:
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # up to JAX 0.8
        return kind.vma
    return kind.manual_axis_type.varying
