"""The norms: of a tree, of its leaves, of units, of matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Inexact, PyTree

from .._core import sharding, trees
from .._core.types import Axes, AxisName
from ._stacked import euclidean, largest, root, rows, total

Norm = Callable[..., Float[Array, ""]]
"""A norm of a whole tree: `global_norm`, `rms` or `inf_norm`."""


def global_norm(
    tree: PyTree, *, scaled: bool = False, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together.

    ‖x‖₂ = √(Σᵢ |xᵢ|²)

    Computed in float32, or in float64 where a leaf is.  A NaN or an infinity comes
    out as such; an empty tree has norm 0; the gradient at zero is zero.

    Args:
        tree: real or complex arrays of any shape; `None` and integers are ignored.
        scaled: right from 1.2e-38, the least normal float32, to 1e38 instead of from
            1e-19 to 1e19, where a square leaves the range of float32.  Costs
            one more pass, and only where the first came out of range.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> half = {"a": jnp.float16(300), "b": jnp.full(3, 300, jnp.float16)}
        >>> clipjax.norms.global_norm(half)  # in float16 the squares are infinite
        Array(600., dtype=float32)
        >>> clipjax.norms.global_norm(jnp.array([3e30, 4e30]), scaled=True)
        Array(5.e+30, dtype=float32)
    """
    leaves = {str(i): x for i, x in enumerate(_leaves(tree))}
    every = dict.fromkeys(leaves)
    return total(euclidean(leaves, every, axis_name, repaired=scaled))


def rms(tree: PyTree, *, axis_name: AxisName = None) -> Float[Array, ""]:
    """Returns the root mean square of all entries together.

    RMS(x) = ‖x‖₂ / √n, for n entries; 0 for an empty tree.

    Args:
        tree: real or complex arrays of any shape.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.rms([jnp.array([1.0, 7.0]), jnp.array([5.0, 5.0])])
        Array(5., dtype=float32)
    """
    leaves = _leaves(tree)
    entries = sum(x.size * sharding.blocks(x, axis_name) for x in leaves)
    return global_norm(leaves, axis_name=axis_name) / math.sqrt(max(entries, 1))


def inf_norm(tree: PyTree, *, axis_name: AxisName = None) -> Float[Array, ""]:
    """Returns the largest magnitude of any entry.

    ‖x‖_∞ = maxᵢ |xᵢ|; 0 for an empty tree; NaN where an entry is.

    Args:
        tree: real or complex arrays of any shape.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.inf_norm({"w": jnp.array([3.0, -4.0]), "b": jnp.float32(1)})
        Array(4., dtype=float32)
    """
    leaves = _leaves(tree)
    peaks = [largest(jnp.abs(x), None, axis_name) for x in leaves]
    if not peaks:
        return jnp.zeros([], jnp.float32)
    dtype = _widest(peaks)
    return jnp.max(jnp.stack([peak.astype(dtype) for peak in peaks]))


def leaf_norms(
    tree: PyTree,
    norm: Norm | None = None,
    *,
    scaled: bool = False,
    axis_name: AxisName = None,
) -> PyTree:
    """Returns the norm of every leaf by itself, as a tree of the same structure.

    Args:
        tree: real or complex arrays of any shape; `None` and integers are ignored.
        norm: `rms`, `inf_norm` or, if none is given, `global_norm`.
        scaled: Euclidean norms right up to 1e38 instead of 1e19, where a square leaves
            the range of float32, and down to 1e-38 where all are that small.  Costs one
            more pass, and only then.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.float32(-2)})
        {'b': Array(2., dtype=float32), 'w': Array(5., dtype=float32)}
        >>> clipjax.norms.leaf_norms([jnp.array([1.0, 7.0])], clipjax.norms.rms)
        [Array(5., dtype=float32)]
    """
    if norm is not None:
        return jax.tree.map(lambda x: norm(x, axis_name=axis_name), tree)
    leaves = trees.floats(tree)
    stacks = euclidean(leaves, dict.fromkeys(leaves), axis_name, repaired=scaled)
    found = rows(stacks)
    none = jnp.zeros([], jnp.float32)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: found.get(trees.path(keys), none), tree
    )


def unit_norm(
    x: Inexact[Array, "..."], axis: Axes | None, *, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """Returns the Euclidean norm of every unit, the reduced axes kept with length 1.

    A unit is what feeds one output of a layer: a column of a Dense kernel.

    Args:
        x: one leaf, real or complex.
        axis: the axes that a unit spans; `None` for all of them.  `scopes.unit_axes`
            names them for the layers of Flax.
        axis_name: inside `jax.shard_map`, the mesh axes over which units are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.unit_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]]), axis=0)
        Array([[5., 1.]], dtype=float32)
    """
    return root(_squares(x, axis, axis_name))


def unit_rms(
    x: Inexact[Array, "..."], axis: Axes | None, *, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """Returns the root mean square of every unit; arguments as for `unit_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.unit_rms(jnp.array([[1.0, 2.0], [7.0, 2.0]]), axis=0)
        Array([[5., 2.]], dtype=float32)
    """
    squares = _squares(x, axis, axis_name)
    entries = x.size // max(squares.size, 1) * sharding.blocks(x, axis_name)
    return root(squares / float(max(entries, 1)))


def unit_inf_norm(
    x: Inexact[Array, "..."], axis: Axes | None, *, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """Returns the largest magnitude in every unit; arguments as for `unit_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.unit_inf_norm(jnp.array([[3.0, 1.0], [-4.0, 0.0]]), axis=0)
        Array([[4., 1.]], dtype=float32)
    """
    peaks = jnp.max(jnp.abs(trees.wide(x)), axis=axis, keepdims=True, initial=0)
    return largest(peaks, (), axis_name)


def spectral_norm(
    x: Inexact[Array, "..."],
    axis: Axes | None = None,
    *,
    steps: int = 20,
    spec: PartitionSpec | None = None,
) -> Float[Array, "..."]:
    """Returns the largest singular value of a matrix, the reduced axes of length 1.

    σ₁ = max ‖X·v‖₂ over ‖v‖₂ = 1, by so many steps of power iteration, which come from
    below: to 1 % after 20 where σ₂ ≤ 0.9·σ₁.

    A matrix has the last of its axes as columns and all others as rows.  What has one
    axis has its Euclidean norm.  Computed in float32 or wider; NaN where an entry is.

    Args:
        x: one leaf, real or complex.
        axis: the axes of a matrix; `None` for all.
        steps: of the iteration; static.
        spec: inside `jax.shard_map`, how `x` is split; `PartitionSpec()` if each device
            has a matrix of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.spectral_norm(jnp.array([[3.0, 0.0], [0.0, -4.0]]))
        Array([[4.]], dtype=float32)
    """
    axes = tuple(range(x.ndim)) if axis is None else axis
    axes = tuple(a % x.ndim for a in ((axes,) if isinstance(axes, int) else axes))
    if spec is None and len(axes) > 1:
        _refuse_blocks(x)
    split = functools.partial(sharding.split_axes, spec or PartitionSpec())
    # `pmax` has no derivative, and a unit needs none.
    peak = unit_inf_norm(lax.stop_gradient(x), axes, axis_name=split(axes))
    unit = trees.power_of_two(peak)
    matrix = trees.wide(x) / unit.astype(trees.wide(x).dtype)
    if len(axes) < 2 or not x.size:
        return unit * unit_norm(matrix, axes, axis_name=split(axes))
    rows, columns = tuple(sorted(axes)[:-1]), (max(axes),)
    over_rows, over_columns = split(rows), split(columns)

    def times(vector):
        image = jnp.sum(matrix * vector, axis=columns, keepdims=True)
        return sharding.over(lax.psum, image, image, over_columns)

    def step(_, vector):
        back = jnp.sum(jnp.conj(matrix) * times(vector), axis=rows, keepdims=True)
        back = sharding.over(lax.psum, back, back, over_rows)
        size = unit_norm(back, columns, axis_name=over_columns)
        return back / jnp.where(size > 0, size, 1).astype(back.dtype)

    places = jnp.arange(x.shape[columns[0]], dtype=jnp.float32)
    if over_columns:
        first = lax.axis_index(over_columns) * x.shape[columns[0]]
        places += first.astype(jnp.float32)
    shape = [1] * x.ndim
    shape[columns[0]] = -1
    start = jnp.sin(1.0 + places).reshape(shape)  # aligned with nothing
    # The first step gives a vector for each matrix, and lays them out as these are.
    vector = step(0, start.astype(matrix.dtype))
    vector = lax.fori_loop(1, steps, step, vector)
    result = unit * unit_norm(times(vector), rows, axis_name=over_rows)
    return jnp.where(jnp.isfinite(peak), result, peak)


def unit_norms(
    leaves: Mapping[str, Array],
    axes: Mapping[str, Axes | None],
    *,
    axis_name: AxisName | Mapping[str, AxisName] = None,
) -> dict[str, Float[Array, "..."]]:
    """Returns the Euclidean norms of the units of many leaves, right up to 1e38.

    And down to 1e-38 where all are that small.  Costs one more pass, and only where a
    square left the range of float32.

    Args:
        leaves: by path.
        axes: the axes that a unit of each leaf spans.
        axis_name: inside `jax.shard_map`, the mesh axes over which units are split, for
            all leaves or by path.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.norms.unit_norms({"w": jnp.array([[3e30], [4e30]])}, {"w": 0})
        {'w': Array([[5.e+30]], dtype=float32)}
    """
    spans = {path: _counted(x, axes[path]) for path, x in leaves.items()}
    return rows(euclidean(leaves, spans, axis_name))


def _squares(x: Array, axis: Axes | None, axis_name: AxisName) -> Array:
    """Returns the sum of the squares of every unit, on all devices."""
    x = trees.wide(x)
    squares = jnp.sum(jnp.real(x * jnp.conj(x)), axis=axis, keepdims=True)
    return sharding.over(lax.psum, squares, x, axis_name)


def _counted(x: Array, axis: Axes | None) -> tuple[int, ...]:
    """Returns axes counted from the front."""
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % x.ndim for a in axes)


def _leaves(tree: PyTree) -> list[Array]:
    """Returns what counts: floating leaves that are not empty, wide enough."""
    leaves = [x for x in jax.tree.leaves(tree) if trees.is_float(x)]
    return [trees.wide(x) for x in leaves if math.prod(jnp.shape(x))]


def _widest(values: Iterable[Array]) -> Any:
    """Returns float64 where a value has it: strict promotion would refuse to choose."""
    is_double = any(x.dtype == jnp.float64 for x in values)
    return jnp.float64 if is_double else jnp.float32


def _refuse_blocks(x: Array) -> None:
    """Raises where `jax.shard_map` may have split a matrix and no one said how."""
    if over := sharding.axes_of(x, sharding.manual_axes(x)):
        raise ValueError(
            f"A matrix of shape {x.shape} may be split over the mesh axes {over}, and a"
            " block has other singular values. Give `spec`, `PartitionSpec()` if each"
            " device has a matrix of its own."
        )
