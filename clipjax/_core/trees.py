"""Trees by path: one spelling of a leaf's place, whatever network it comes from.

NNX shows `init` and `update` different trees of one network, so nothing but a path may
be carried from one to the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .types import Number, Schedule, Where

_SCHEDULES = (Number | Schedule, "Number | Schedule")  # as types, or postponed


def path(keys: tuple[Any, ...]) -> str:
    """Spells a key path as `layers/0/kernel`, without the `.value` of a box."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in the tree's own order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {path(keys): leaf for keys, leaf in pairs}
    if len(leaves) < len(pairs):
        names = [path(keys) for keys, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two leaves share the path {twice!r}. Rename one of them.")
    return leaves


def map_by_path(function: Callable[..., Any], tree: PyTree, *rest: Mapping) -> PyTree:
    """Maps `function(leaf, entry, …)` over a tree, entries by path.

    A leaf that one of the mappings does not name is left alone.
    """

    def one(keys, leaf):
        name = path(keys)
        if any(name not in entries for entries in rest):
            return leaf
        return function(leaf, *(entries[name] for entries in rest))

    return jax.tree_util.tree_map_with_path(one, tree)


def replaced(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Returns a tree with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaves.get(path(keys), leaf), tree
    )


def remembered(params: PyTree, entries: dict[str, Any], *, boxes: bool = True) -> Any:
    """Returns entries by path, of new parameters, as a state keeps them.

    An array of the shape of its parameter comes in the box of that, as flax has them,
    which says how it is split, if boxes are wanted.

    That is one array, where the parameters only stand for others, which
    `optax.tree_map_params` maps over: a dict by path is no tree of parameters.
    """
    if _is_stand_in(params):
        return jnp.zeros([], jnp.float32)
    if not boxes:
        return entries
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    found = {path(keys): node for keys, node in pairs if _is_box(node)}

    def boxed(box, x):
        (param,) = jax.tree.leaves(box)
        is_alike = x.ndim and x.shape == param.shape
        return jax.tree.map(lambda _: x, box) if is_alike else x

    return entries | {
        p: jax.tree.map(functools.partial(boxed, found[p]), entry)
        for p, entry in entries.items()
        if p in found
    }


def unboxed(tree: PyTree) -> PyTree:
    """Returns a tree with the arrays themselves in place of their boxes."""
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if _is_box(node) else node,
        tree,
        is_leaf=_is_box,
    )


def boxed_as(tree: PyTree, like: PyTree) -> PyTree:
    """Returns a tree in the boxes of another, which is the same but for these."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _is_box(node: Any) -> bool:
    """Tells whether a node holds nothing but a leaf that it calls `value`."""
    if isinstance(node, Mapping | list | tuple | None):
        return False
    pairs = jax.tree_util.tree_leaves_with_path(node)
    return len(pairs) == 1 and pairs[0][0] == (jax.tree_util.GetAttrKey("value"),)


def _is_stand_in(params: PyTree) -> bool:
    """Tells whether a tree holds a node that Optax has put in place of parameters."""

    def is_whole(node):
        return not isinstance(node, Mapping | list | tuple | None)

    nodes = jax.tree.leaves(params, is_leaf=is_whole)
    return any(type(node).__module__.startswith("optax.") for node in nodes)


def floats(tree: PyTree) -> dict[str, Any]:
    """Returns by path the leaves that hold floating-point numbers, as JAX arrays.

    For one of which only the shape is given, zeros.
    """
    leaves = by_path(tree).items()
    return {name: as_array(leaf) for name, leaf in leaves if is_float(leaf)}


def float_arrays(tree: PyTree) -> dict[str, Any]:
    """Returns by path the floating leaves that were arrays, and no plain numbers."""
    leaves = by_path(tree).items()
    return {name: x for name, x in leaves if is_float(x) and _has_dtype(x)}


def as_array(leaf: Any) -> Array:
    """Returns a leaf as a JAX array: zeros, where only its shape is given."""
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros_like(leaf) if is_shape else jnp.asarray(leaf)


def chosen(tree: PyTree, where: Where) -> dict[str, Array]:
    """Returns by path the floating leaves with entries that a function chooses."""
    return {p: x for p, x in floats(tree).items() if x.size and where(p, x)}


def is_float(leaf: Any) -> bool:
    """Tells whether a leaf holds real or complex floating-point numbers.

    An Equinox module has leaves that are no arrays, such as functions.
    """
    if not _has_dtype(leaf):
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_number(leaf: Any) -> bool:
    """Tells whether a leaf holds numbers, and neither random keys nor anything else."""
    if not _has_dtype(leaf):
        return isinstance(leaf, int | float | complex)
    return jnp.issubdtype(leaf.dtype, jnp.number)


def arrays(tree: PyTree) -> PyTree:
    """Returns a tree without what no optimizer can remember anything of."""
    return jax.tree.map(
        lambda x: x if _has_dtype(x) or isinstance(x, int | float | complex) else None,
        tree,
    )


def _has_dtype(leaf: Any) -> bool:
    is_class = isinstance(leaf, type)  # such as `np.float32`
    return hasattr(leaf, "dtype") and not is_class


def is_function(value: Any) -> bool:
    """Tells whether a value is to be called: a module that holds arrays is a tree."""
    return callable(value) and jax.tree_util.all_leaves([value])


def wide(leaf: Any) -> Any:
    """Casts a leaf to float32 or wider (complex64 or wider)."""
    dtype = jnp.result_type(leaf)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    if dtype in (jnp.float64, jnp.complex128):
        return leaf
    return jnp.asarray(leaf, jnp.complex64 if is_complex else jnp.float32)


def zeros(leaf: Any, dtype: Any = None) -> Array:
    """Returns zeros, in float32 or wider, that lie on a mesh as a leaf does."""
    leaf = as_array(leaf)
    never = (leaf == leaf) & (leaf != leaf)  # a constant would lose the layout
    return never.astype(dtype or jnp.result_type(wide(leaf)))


def zeros_of_floats(tree: PyTree) -> PyTree:
    """Returns zeros for every leaf, nothing for one that is not floating."""
    return jax.tree.map(lambda x: zeros(x) if is_float(x) else None, tree)


def scale(leaf: Any, factor: Float[Array, "..."]) -> Any:
    """Multiplies in float32 or wider, then rounds once to the leaf's own dtype."""
    x = wide(leaf)
    if jnp.iscomplexobj(x):  # apart: (∞ + 0i) times (1 + 0i) is ∞ + NaN·i
        factor = factor.astype(x.real.dtype)
        x = jax.lax.complex(x.real * factor, x.imag * factor)
    else:
        x = x * factor.astype(x.dtype)
    return x.astype(jnp.result_type(leaf))


def scale_inward(leaf: Any, factor: Float[Array, "..."]) -> Any:
    """Scales as `scale` does, but so that no norm comes out above what was meant.

    Entries are rounded toward zero, and a factor below one is lowered by what a norm
    in float32 may be off.
    """
    lower = jnp.where(factor < 1, factor * (1 - 2**-20), factor)
    product = wide(leaf)
    product = product * lower.astype(product.dtype)
    if product.dtype == jnp.result_type(leaf) or jnp.iscomplexobj(product):
        return product.astype(jnp.result_type(leaf))
    rounded = product.astype(jnp.result_type(leaf))
    held = jax.lax.stop_gradient(rounded)  # `nextafter` has no derivative
    inward = jnp.nextafter(held, jnp.zeros_like(held))
    outside = jnp.abs(rounded.astype(product.dtype)) > jnp.abs(product)
    step = jnp.where(outside, inward - held, 0)
    return rounded + jax.lax.stop_gradient(step)


def scale_all(tree: PyTree, factor: Float[Array, ""]) -> PyTree:
    """Scales every leaf that holds floating-point numbers."""
    return jax.tree.map(lambda x: scale(x, factor) if is_float(x) else x, tree)


def value_at(number: Number | Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns a hyperparameter's value at this step, in float32."""
    value = number(step) if callable(number) else number
    return jnp.asarray(value).astype(jnp.float32)


def bound_at(number: Number | Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns a bound's value at this step, in float64 where it has one."""
    value = jnp.asarray(number(step) if callable(number) else number)
    return value if value.dtype == jnp.float64 else value.astype(jnp.float32)


def single(norm: Float[Array, "..."]) -> Float[Array, "..."]:
    """Casts to float32, in which a float64 may be too large to be finite."""
    most = jnp.asarray(jnp.finfo(jnp.float32).max, norm.dtype)
    return jnp.where(norm < jnp.inf, jnp.minimum(norm, most), norm).astype(jnp.float32)


def at_step(value: Any, step: Int[Array, ""]) -> Any:
    """Returns a frozen value of hyperparameters with its schedules at this step.

    A field is a schedule only if its type says that it may be one: any other function
    is left alone, and so is what is no such value.  One that holds several has a method
    `at_step`.
    """
    if hasattr(value, "at_step"):
        return value.at_step(step)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        is_schedule = field.type in _SCHEDULES and callable(old)
        changes[field.name] = old(step) if is_schedule else at_step(old, step)
    return dataclasses.replace(value, **changes)


def is_scheduled(value: Any) -> bool:
    """Tells whether a frozen value of hyperparameters holds a schedule."""
    if not dataclasses.is_dataclass(value):
        return False
    fields = [f for f in dataclasses.fields(value) if f.type in _SCHEDULES]
    return any(callable(getattr(value, field.name)) for field in fields)


def holds_arrays(value: Any) -> bool:
    """Tells whether a hyperparameter is an array, or holds one."""
    if dataclasses.is_dataclass(value):
        return holds_arrays(list(vars(value).values()))
    if isinstance(value, Mapping):
        return holds_arrays(list(value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_arrays, value))
    return isinstance(value, Array)


def like(number: Any, x: Array) -> Array:
    """Returns a number in the dtype of an array."""
    return jnp.asarray(number).astype(x.dtype)


def next_step(step: Int[Array, ""]) -> Int[Array, ""]:
    """Adds one, and stays at the last int32 rather than turn negative."""
    last = jnp.iinfo(jnp.int32).max
    return jnp.where(step < last, step + 1, step)


def power_of_two(peak: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the power of two below a magnitude: to divide by it is exact."""
    usable = (peak > 0) & jnp.isfinite(peak)
    exponent = jnp.floor(jnp.log2(jnp.where(usable, peak, jnp.ones_like(peak))))
    # Clamped, so that neither the unit nor its inverse is subnormal.
    limit = jnp.finfo(peak.dtype).maxexp - 28
    return jnp.exp2(jnp.clip(exponent, -limit, limit))
