"""Which entries are measured together.

| you want to measure ...                            | use                             |
| -------------------------------------------------- | ------------------------------- |
| the whole update (the default)                     | `Tree`                          |
| leaves that share a label                          | `Group`                         |
| each leaf                                          | `Leaf`                          |
| each layer, where `nn.scan` stacks them in a leaf  | `Layer`                         |
| what feeds one output of a layer                   | `Unit`                          |
| each entry                                         | `Element`                       |

A unit is a column of a Dense kernel, or a filter of a convolution.  The rank of a
kernel does not tell its axes: (3, 64, 32) may be a 1-D convolution with 32 outputs or a
projection to 64 heads of 32.  The bias next to it does: it has the shape of the
outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ._core import checks as check
from ._core.types import Axes

__all__ = [
    "AxisRule",
    "Element",
    "Group",
    "Layer",
    "Leaf",
    "Part",
    "Scope",
    "Shaped",
    "SpecRule",
    "Tree",
    "Unit",
    "bias_of",
    "unit_axes",
]


Shaped = Array | jax.ShapeDtypeStruct
"""An array, or its shape alone."""

_WHOLE = ("bias", "scale")
_INPUT_FIRST = ("query", "key", "value", "qkv")  # kernels of Flax's attention


def unit_axes(path: str, leaf: Shaped, bias: Shaped | None = None) -> tuple[int, ...]:
    """Returns the axes that one unit of a leaf spans, as Flax lays its layers out.

    | leaf                                       | shape              | axes          |
    | ------------------------------------------ | ------------------ | ------------- |
    | scalar, vector, bias, scale                | any                | all           |
    | Embed                                      | (tokens, features) | 1             |
    | Dense                                      | (in, out)          | 0             |
    | Conv, 1-D to 3-D                           | (…, in, out)       | all but last  |
    | ConvTranspose, `transpose_kernel=True`     | (…, out, in)       | all but -2    |
    | DenseGeneral                               | (in…, out…)        | the in…       |
    | attention: query, key, value               | (in, heads, size)  | 0             |
    | attention: out                             | (heads, size, out) | 0, 1          |
    | `weight` of Equinox and PyTorch            | (out, in, …)       | all but first |

    Layers stacked along an axis of their own, as by `nn.scan`, are not told apart: name
    the axes for those.

    Where there is a bias, the outputs are the axes of its shape: of a `weight` sought
    from the front, of a `kernel` from the back, of any other leaf only the last ones.
    Without one, outputs come first in a `weight`; `query`, `key`, `value` and `qkv` in
    the path mean (0,); and else every axis but the last is taken.  Name the axes of a
    transposed convolution without a bias.

    Args:
        path: where the leaf stands, such as `attention/query/kernel`.
        leaf: the parameter.
        bias: of the same layer, if it has one.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.unit_axes(
        ...     "Conv_0/kernel", jnp.ones((3, 64, 32)), bias=jnp.ones(32)
        ... )
        (0, 1)
        >>> clipjax.scopes.unit_axes("attention/query/kernel", jnp.ones((64, 4, 16)))
        (0,)
    """
    *parents, name = path.split("/")
    rank = len(leaf.shape)
    if rank <= 1 or name in _WHOLE:
        return tuple(range(rank))
    if name == "embedding":
        return (rank - 1,)
    outputs = _outputs(leaf.shape, () if bias is None else bias.shape, name)
    if outputs is not None:
        return tuple(axis for axis in range(rank) if axis not in outputs)
    if parents and parents[-1] in _INPUT_FIRST:
        return (0,)
    return tuple(range(rank - 1))


def _outputs(
    shape: tuple[int, ...], bias: tuple[int, ...], name: str
) -> tuple[int, ...] | None:
    """Returns the axes of a kernel's outputs, where bias or name tell them."""
    rank, is_weight = len(shape), "weight" in name
    for known in (bias, tuple(n for n in bias if n > 1)):  # of Equinox: (out, 1, 1)
        size = len(known)
        if 0 < size < rank:
            last = tuple(range(rank - size, rank))
            first, order = tuple(range(size)), (last,)
            if is_weight:
                order = (first, (1,), last)
            elif name == "kernel":
                order = (last, (rank - 2,), first)
            for axes in order:
                if tuple(shape[axis] for axis in axes) == known:
                    return axes
    return (0,) if is_weight else None


def bias_of(path: str, leaves: Mapping[str, Array]) -> Array | None:
    """Returns the bias of the layer that a leaf belongs to, called `bias` or `b`.

    Args:
        path: of the leaf.
        leaves: all leaves by path.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.bias_of("Dense_0/kernel", {"Dense_0/bias": jnp.zeros(2)})
        Array([0., 0.], dtype=float32)
    """
    parent, slash, _ = path.rpartition("/")
    return leaves.get(f"{parent}{slash}bias", leaves.get(f"{parent}{slash}b"))


AxisRule = Axes | Callable[[str, Array], Axes | None] | None
"""Which axes a unit spans: for all leaves alike, by path, or as Flax lays them out."""

SpecRule = Callable[[str, Array], jax.sharding.PartitionSpec]
"""How a leaf, by path, is split over a mesh inside `jax.shard_map`."""


class Part(NamedTuple):
    """What a leaf is measured with, and along which of its axes."""

    label: str  # leaves of one label are measured together, and have one threshold
    axes: tuple[int, ...] | None = None  # of the leaf, measured together; `None`: all
    shared: bool = False  # measured with all leaves, whatever their labels


@runtime_checkable
class Scope(Protocol):
    """The method of a scope."""

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says for the leaf at `path`, one of `leaves`, what it is measured with."""
        ...


@dataclasses.dataclass(frozen=True)
class Tree:
    """All leaves together: one norm.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.Tree().part("w", {"w": jnp.ones(2)})
        Part(label='', axes=None, shared=False)
    """

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        del path, leaves
        return Part("")


@dataclasses.dataclass(frozen=True)
class Group:
    """The leaves that share a label.

    Args:
        label: from path and leaf to the name of the group.
        shared: whether every group is measured by the norm of all leaves together, and
            only has a threshold of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> by_layer = clipjax.scopes.Group(lambda path, leaf: path.split("/")[0])
        >>> by_layer.part("dense/bias", {"dense/bias": jnp.ones(2)}).label
        'dense'
    """

    label: Callable[[str, Array], str]
    shared: bool = False

    def __post_init__(self):
        """Checks the argument."""
        check.function(label=self.label)
        check.flag(shared=self.shared)

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        return Part(self.label(path, leaves[path]), shared=self.shared)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Each leaf by itself.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.Leaf().part("w", {"w": jnp.ones(2)})
        Part(label='w', axes=None, shared=False)
    """

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        del leaves
        return Part(path)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Each layer of a leaf that holds several, stacked by `nn.scan` or `nnx.vmap`.

    Args:
        stacked: the axes along which layers are stacked, for all leaves; or a function
            of path and leaf that returns them, `()` for a leaf of one layer.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.Layer(0).part("kernel", {"kernel": jnp.ones((12, 4, 4))})
        Part(label='kernel', axes=(1, 2), shared=False)
    """

    stacked: Axes | Callable[[str, Array], Axes]

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        leaf = leaves[path]
        kept = _axes_of(self.stacked, path, leaf)
        axes = tuple(i for i in range(leaf.ndim) if i not in kept)
        return Part(path, axes)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Each unit: what feeds one output of a layer.

    Args:
        axis: the axes that a unit spans, for all leaves; or a function of path and leaf
            that returns them, or `None` for what `unit_axes` finds.
        stacked: axes along which layers are stacked, never part of a unit; or a
            function of path and leaf that returns them.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.Unit().part("kernel", {"kernel": jnp.ones((3, 3, 8, 16))})
        Part(label='kernel', axes=(0, 1, 2), shared=False)
        >>> clipjax.scopes.Unit(stacked=0).part(
        ...     "kernel", {"kernel": jnp.ones((12, 8, 16))}
        ... )
        Part(label='kernel', axes=(1,), shared=False)
    """

    axis: AxisRule = None
    stacked: Axes | Callable[[str, Array], Axes] = ()

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        leaf = leaves[path]
        axis = self.axis(path, leaf) if callable(self.axis) else self.axis
        kept = self.stacked_axes(path, leaf)
        if axis is not None:
            named = _axes_of(axis, path, leaf)
            return Part(path, tuple(a for a in named if a not in kept))
        rest = [i for i in range(leaf.ndim) if i not in kept]
        bias: Shaped | None = bias_of(path, leaves)
        if isinstance(bias, Array) and kept:
            stacks = _axes_of(
                self.stacked, "".join(path.rpartition("/")[:2]) + "bias", bias
            )
            bias = _one_layer(bias, stacks)
        own = unit_axes(path, _one_layer(leaf, kept), bias)
        return Part(path, tuple(rest[i] for i in own))

    def stacked_axes(self, path: str, leaf: Array) -> tuple[int, ...]:
        """Returns along which axes of the leaf at `path` layers are stacked."""
        return _axes_of(self.stacked, path, leaf)


@dataclasses.dataclass(frozen=True)
class Element:
    """Each entry by itself.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.scopes.Element().part("w", {"w": jnp.ones((2, 3))})
        Part(label='w', axes=(), shared=False)
    """

    def part(self, path: str, leaves: Mapping[str, Array]) -> Part:
        """Says what the leaf at `path` is measured with."""
        del leaves
        return Part(path, ())


def _axes_of(
    rule: Axes | Callable[[str, Array], Axes], path: str, leaf: Array
) -> tuple[int, ...]:
    """Counts axes from the front, and refuses those that are not there."""
    axes = rule(path, leaf) if callable(rule) else rule
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    rank = jnp.ndim(leaf)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(
            f"The axes {axes} do not fit the leaf at {path!r} of shape {leaf.shape}."
            " Give a function of path and leaf instead."
        )
    return tuple(sorted({axis % rank for axis in axes}))


def _one_layer(leaf: Shaped, stacked: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    shape = tuple(n for i, n in enumerate(leaf.shape) if i not in stacked)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def __dir__() -> list[str]:
    return __all__
