"""How large a tree is, in float32 or wider whatever the dtype of its leaves.

A sum of squares is kept in float32 across all leaves: in bfloat16 it stands still at
about 22 times one leaf's norm, and in float16 it overflows at 256.  Leaves that hold no
floating-point numbers do not count.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from . import _meshes as meshes, _trees as trees
from ._types import Axes, AxisName

_SAFE = (1e-15, 1e18)  # norms in which no float32 square over- or underflows


def global_norm(
    tree: PyTree, *, scaled: bool = False, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together.

    ‖x‖₂ = √(Σᵢ |xᵢ|²)

    Computed in float32, or in float64 where a leaf is.  A NaN or an infinity comes
    out as such; an empty tree has norm 0; the gradient at zero is zero.

    Args:
        tree: real or complex arrays of any shape; `None` and integers are ignored.
        scaled: right from 1e-38 to 1e38 instead of from 1e-19 to 1e19, where a square
            leaves the range of float32.  Costs two more passes, and only where the
            first came out of range.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> half = {"a": jnp.float16(300), "b": jnp.full(3, 300, jnp.float16)}
        >>> global_norm(half)  # in float16 the squares are infinite
        Array(600., dtype=float32)
        >>> global_norm(jnp.array([3e30, 4e30]), scaled=True)
        Array(5.e+30, dtype=float32)
    """
    leaves = _leaves(tree)
    norm = _root(_sum_of_squares(leaves, axis_name))
    if not scaled or not leaves:
        return norm
    low, high = _SAFE
    in_range = (norm >= low) & (norm <= high)
    return lax.cond(in_range, lambda: norm, lambda: _rescaled(leaves, axis_name))


def rms(tree: PyTree, *, axis_name: AxisName = None) -> Float[Array, ""]:
    """Returns the root mean square of all entries together.

    RMS(x) = ‖x‖₂ / √n, for n entries; 0 for an empty tree.

    Args:
        tree: real or complex arrays of any shape.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> rms([jnp.array([1.0, 7.0]), jnp.array([5.0, 5.0])])
        Array(5., dtype=float32)
    """
    leaves = _leaves(tree)
    entries = sum(x.size * meshes.blocks(x, axis_name) for x in leaves)
    mean = _sum_of_squares(leaves, axis_name) / float(max(entries, 1))
    return _root(mean)


def inf_norm(tree: PyTree, *, axis_name: AxisName = None) -> Float[Array, ""]:
    """Returns the largest magnitude of any entry.

    ‖x‖_∞ = maxᵢ |xᵢ|; 0 for an empty tree; NaN where an entry is.

    Args:
        tree: real or complex arrays of any shape.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> inf_norm({"w": jnp.array([3.0, -4.0]), "b": jnp.float32(1)})
        Array(4., dtype=float32)
    """
    leaves = _leaves(tree)
    peaks = [_over(lax.pmax, jnp.max(jnp.abs(x)), x, axis_name) for x in leaves]
    if not peaks:
        return jnp.zeros([], jnp.float32)
    dtype = _widest(peaks)
    return jnp.max(jnp.stack([peak.astype(dtype) for peak in peaks]))


def leaf_norms(
    tree: PyTree, *, scaled: bool = False, axis_name: AxisName = None
) -> PyTree:
    """Returns the Euclidean norm of every leaf, as a tree of the same structure.

    Args:
        tree: real or complex arrays of any shape; `None` and integers are ignored.
        scaled: right up to 1e38 instead of 1e19, where a square leaves the range of
            float32.  Costs two more passes, and only where a norm came out of range.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.float32(-2)})
        {'b': Array(2., dtype=float32), 'w': Array(5., dtype=float32)}
    """
    plain = jax.tree.map(lambda x: global_norm(x, axis_name=axis_name), tree)
    if not scaled or not jax.tree.leaves(plain):
        return plain

    def rescaled():
        return jax.tree.map(
            lambda x, norm: _rescaled(_leaves(x), axis_name).astype(norm.dtype),
            tree,
            plain,
        )

    in_range = jnp.stack([norm <= _SAFE[1] for norm in jax.tree.leaves(plain)])
    return lax.cond(jnp.all(in_range), lambda: plain, rescaled)


def unit_norm(
    x: Float[Array, "..."], axis: Axes | None, *, axis_name: AxisName = None
) -> Float[Array, "..."]:
    """Returns the Euclidean norm of every unit, the reduced axes kept with length 1.

    A unit is what feeds one output of a layer: a column of a Dense kernel.

    Args:
        x: one leaf.
        axis: the axes that a unit spans; `None` for all of them.  `scopes.unit_axes`
            names them for the layers of Flax.
        axis_name: inside `jax.shard_map`, the mesh axes over which units are split.

    Example:
        >>> unit_norm(jnp.array([[3.0, 1.0], [4.0, 0.0]]), axis=0)
        Array([[5., 1.]], dtype=float32)
    """
    squares = jnp.sum(_square(trees.wide(x)), axis=axis, keepdims=True)
    return _root(_over(lax.psum, squares, x, axis_name))


def _leaves(tree: PyTree) -> list[Array]:
    """Returns what counts: floating leaves that are not empty, wide enough."""
    leaves = [x for x in jax.tree.leaves(tree) if trees.is_float(x)]
    return [trees.wide(x) for x in leaves if math.prod(jnp.shape(x))]


def _square(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def _sum_of_squares(leaves: list[Array], axis_name: AxisName) -> Float[Array, ""]:
    """Sums leaf by leaf, then across; one collective for each set of mesh axes."""
    if not leaves:
        return jnp.zeros([], jnp.float32)
    groups: dict[tuple[str, ...], list[Array]] = {}
    for x in leaves:
        axes = meshes.axes_of(x, axis_name)
        groups.setdefault(axes, []).append(jnp.sum(_square(x)))
    dtype = _widest(x for sums in groups.values() for x in sums)
    totals = []
    for axes, sums in groups.items():
        # Stacked and summed: a running sum over 10,000 leaves would lose digits.
        total = jnp.sum(jnp.stack([x.astype(dtype) for x in sums]))
        totals.append(lax.psum(total, axes) if axes else total)
    return sum(totals[1:], start=totals[0])


def _rescaled(leaves: list[Array], axis_name: AxisName) -> Float[Array, ""]:
    """Returns the norm of leaves whose squares may leave the range of float32."""
    if not leaves:
        return jnp.zeros([], jnp.float32)
    peak = inf_norm(leaves, axis_name=axis_name)
    usable = (peak > 0) & jnp.isfinite(peak)
    exponent = jnp.floor(jnp.log2(jnp.where(usable, peak, jnp.ones_like(peak))))
    # Clamped, so that neither the unit nor its inverse is subnormal.
    unit = jnp.exp2(jnp.clip(exponent, -100, 100))
    shrunk = [x / unit.astype(jnp.finfo(x.dtype).dtype) for x in leaves]
    norm = _root(_sum_of_squares(shrunk, axis_name))
    return unit.astype(norm.dtype) * norm


def _widest(values: Iterable[Array]) -> Any:
    """Returns float64 where a value has it: strict promotion would refuse to choose."""
    is_double = any(x.dtype == jnp.float64 for x in values)
    return jnp.float64 if is_double else jnp.float32


def _over(
    collective: Callable[..., Any], value: Array, x: Array, axis_name: AxisName
) -> Array:
    axes = meshes.axes_of(x, axis_name)
    return collective(value, axes) if axes else value


def _root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """√, with gradient 0 instead of NaN at 0."""
    zero = square == 0
    positive = jnp.where(zero, jnp.ones_like(square), square)
    return jnp.where(zero, jnp.zeros_like(square), jnp.sqrt(positive))
