"""Norms of many arrays at once, side by side in a few small arrays.

So that all but the reading of an array is written once, and not once an array: a
compiler, and whoever reads what it made, meets a leaf three times and not thirty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._core import sharding, trees
from .._core.types import AxisName

Leaves = Mapping[str, Array]
MeasuredAxes = Mapping[str, tuple[int, ...] | None]
"""By path, which axes of a leaf are measured together; `None` for all."""


class Stack(NamedTuple):
    """Norms of leaves of one type: of one shape and dtype, and alike on a mesh."""

    paths: tuple[str, ...]
    values: Float[Array, "paths ..."]


class _Range(NamedTuple):
    """Norms within which no square over- or underflows, and a way out of the others."""

    low: float
    high: float
    scale: float


_ROWS = 32  # read back in one go: time and size grow with the square
_FEW_ROWS = 4
_RANGES = {
    "float32": _Range(1e-15, 1e18, 2.0**80),
    "float64": _Range(1e-140, 1e150, 2.0**560),
}


def stacked(
    norms: Leaves,
    apart: Mapping[str, tuple[str, ...]],
    like: Sequence[Stack] | None = None,
) -> list[Stack]:
    """Stacks norms of one type, but for what is to stay apart; or in a given order."""
    if like is not None:
        return [
            Stack(
                s.paths, jnp.stack([norms[p].astype(s.values.dtype) for p in s.paths])
            )
            for s in like
        ]
    groups: dict[object, list[str]] = {}
    for path, norm in norms.items():
        groups.setdefault((jax.typeof(norm), apart.get(path)), []).append(path)
    return [
        Stack(tuple(paths), jnp.stack([norms[path] for path in paths]))
        for paths in groups.values()
    ]


def euclidean(
    leaves: Leaves,
    axes: MeasuredAxes,
    axis_name: AxisName | Mapping[str, AxisName] = None,
    *,
    repaired: bool = True,
    like: Sequence[Stack] | None = None,
) -> list[Stack]:
    """Returns the Euclidean norms of leaves, or of parts of them, float32 or wider.

    ‖x‖₂ = √(Σᵢ |xᵢ|²) over the measured axes, which stay with length one.

    Repaired, they are right from the least normal number to the largest: where one came
    out too large, or all came out too small, squares are added once more, of entries
    times a power of two.  A norm that is tiny beside larger ones may still be zero.
    Stacked like others, which they are to be compared with, they are not repaired.
    """
    over = _over(leaves, axis_name) if axis_name else {}

    def squares(scales=None, order=like):
        each = {}
        for path, leaf in leaves.items():
            x = trees.wide(leaf)
            if scales is not None:
                x = x * scales[str(jnp.finfo(x.dtype).dtype)].astype(x.dtype)
            x = jnp.real(x * jnp.conj(x))
            each[path] = jnp.sum(x, axes[path], keepdims=axes[path] is not None)
        result = stacked(each, over, order)
        if over:
            pairs = ((s, over[s.paths[0]]) for s in result)
            result = [
                Stack(s.paths, lax.psum(s.values, n) if n else s.values)
                for s, n in pairs
            ]
        return result

    sums = squares()
    values, split = [stack.values for stack in sums], list
    if len(values) > 1:
        values, split = merged(values)
    values = [root(x) for x in values]
    if values and repaired and like is None:
        names = tuple(dict.fromkeys(name for own in over.values() for name in own))
        again = functools.partial(squares, order=sums)  # alike, whatever the branch
        values = _repaired(values, again, names)
    pairs = zip(sums, split(values), strict=True)
    return [Stack(stack.paths, x) for stack, x in pairs]


def _repaired(
    plain: list[Array],
    squares: Callable[[dict[str, Array]], list[Stack]],
    names: tuple[str, ...],
) -> list[Array]:
    """Replaces the norms whose squares left the range, if there are any."""
    ranges = [_RANGES[str(norm.dtype)] for norm in plain]
    peaks = [jnp.max(norm, initial=0) for norm in plain]
    is_high = [~(peak <= own.high) for peak, own in zip(peaks, ranges, strict=True)]
    is_seen = [peak >= own.low for peak, own in zip(peaks, ranges, strict=True)]
    flags = jnp.stack([jnp.any(jnp.stack(flag)) for flag in (is_high, is_seen)])
    if names:  # all devices have to take the same branch: there are sums in it
        flags = sharding.over(lax.pmax, flags.astype(jnp.int32), flags, names) > 0
    too_large, seen = flags
    # In `jax.shard_map` of the type of what comes out of the branch: as the flags.
    plain = [jnp.where(seen, x, x) for x in plain]

    def repair():
        scales = {
            name: jnp.where(too_large, 1 / own.scale, own.scale).astype(name)
            for name, own in _RANGES.items()
            if any(str(norm.dtype) == name for norm in plain)
        }
        again = [stack.values for stack in squares(scales)]
        if len(again) > len(plain):  # joined, as the others are
            again = [jnp.concatenate([x.reshape(-1) for x in again])]
        scaled = [root(x) / scales[str(x.dtype)] for x in again]
        return [
            jnp.where(too_large & (old <= own.high), old, new)
            for old, new, own in zip(plain, scaled, ranges, strict=True)
        ]

    return lax.cond(too_large | ~seen, repair, lambda: plain)


def merged(
    values: list[Array],
) -> tuple[list[Array], Callable[[list[Array]], list[Array]]]:
    """Joins arrays into one, and returns how to split it: one program for all types.

    Not on a mesh, where a part could lie on several devices.
    """
    if len(values) < 2:
        return values, list
    kinds = {(str(x.dtype), sharding.differing_axes(x)) for x in values}
    if len(kinds) > 1 or any(map(sharding.is_partitioned, values)):
        return values, list

    def split(one):
        (vector,) = one
        ends = np.cumsum([x.size for x in values])[:-1]
        pieces = jnp.split(vector, ends)
        return [x.reshape(old.shape) for x, old in zip(pieces, values, strict=True)]

    return [jnp.concatenate([x.reshape(-1) for x in values])], split


def pooled(
    norms: Float[Array, "..."],
    axes: tuple[int, ...] | None = None,
    over: AxisName = None,
    where: Array | bool = True,
) -> Float[Array, "..."]:
    """Returns the Euclidean norm of norms, whose squares may be out of range."""
    over = sharding.axes_of(norms, over) if over else ()
    peak = jnp.max(norms, axes, keepdims=True, initial=0, where=where)
    peak = lax.stop_gradient(peak)  # `pmax` has none, and a unit needs none
    unit = trees.power_of_two(lax.pmax(peak, over) if over else peak)
    squares = jnp.sum(jnp.square(norms / unit), axes, keepdims=True, where=where)
    norm = unit * root(lax.psum(squares, over) if over else squares)
    kept = range(norm.ndim) if axes is None else axes
    return lax.squeeze(norm, tuple(axis % norm.ndim for axis in kept))


def largest(
    norms: Float[Array, "..."],
    axes: tuple[int, ...] | None = None,
    over: AxisName = None,
    where: Array | None = None,
) -> Float[Array, "..."]:
    """Returns the largest of several norms, NaN where one is."""
    over = sharding.axes_of(norms, over) if over else ()
    peak = jnp.max(norms, axes, initial=0, where=where)
    if not over:
        return peak
    unknown = jnp.isnan(peak)  # which `pmax` may lose
    both = jnp.stack([jnp.where(unknown, 0, peak), unknown.astype(peak.dtype)])
    most, any_unknown = lax.pmax(both, over)
    return jnp.where(any_unknown > 0, jnp.nan, most)


def total(stacks: list[Stack]) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together, from those of each."""
    if not stacks:
        return jnp.zeros([], jnp.float32)
    return pooled(joined([stack.values for stack in stacks]))


def joined(vectors: list[Array]) -> Float[Array, " leaves"]:
    """Joins vectors, in float64 if one is: strict promotion would refuse to choose."""
    wide = any(vector.dtype == jnp.float64 for vector in vectors)
    dtype = jnp.float64 if wide else jnp.float32
    return jnp.concatenate([vector.astype(dtype) for vector in vectors])


def rows(stacks: list[Stack]) -> dict[str, Array]:
    """Returns each leaf's row of its stack, by path."""
    result = {}
    for paths, values in stacks:
        result |= dict(zip(paths, unstacked(values), strict=True))
    return result


def unstacked(values: Array) -> list[Array]:
    """Returns the rows of an array, some of them in one go.

    A slice would be compiled once a row, since each has another start, and so would all
    that it is fused into.  A sum of what is zero but for one row picks it, and several
    sums are one program; but on a mesh they might be gathered.
    """
    if len(values) < _FEW_ROWS or sharding.is_partitioned(values):
        return [lax.index_in_dim(values, i, keepdims=False) for i in range(len(values))]
    starts = range(0, len(values), _ROWS)
    parts = [lax.slice_in_dim(values, i, min(i + _ROWS, len(values))) for i in starts]
    return [row for part in parts for row in _picked(part)]


@jax.custom_jvp
def _picked(values: Array) -> tuple[Array, ...]:
    place = lax.broadcasted_iota(
        jnp.int32, (len(values),) + (1,) * (values.ndim - 1), 0
    )
    none = np.zeros([], values.dtype)
    alone = [jnp.where(place == i, values, none) for i in range(len(values))]

    def add(left, right):
        pick = lax.bitwise_or if values.dtype == bool else lax.add
        return tuple(map(pick, left, right))

    return tuple(lax.reduce(alone, [none] * len(values), add, (0,)))


@_picked.defjvp
def _picked_jvp(primals, tangents):
    slopes = (
        lax.index_in_dim(tangents[0], i, keepdims=False)
        for i in range(len(tangents[0]))
    )
    return _picked(*primals), tuple(slopes)


def root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """√, with gradient 0 instead of NaN at 0."""
    zero = square == 0
    positive = jnp.where(zero, jnp.ones_like(square), square)
    return jnp.where(zero, jnp.zeros_like(square), jnp.sqrt(positive))


def num_entries(x: Array, axes: tuple[int, ...] | None, axis_name: AxisName) -> int:
    """Returns how many entries are measured together, on all devices."""
    if axes == ():
        return 1
    lengths = x.shape if axes is None else [x.shape[axis] for axis in axes]
    return math.prod(lengths) * (sharding.blocks(x, axis_name) if axis_name else 1)


def _over(
    leaves: Leaves, axis_name: AxisName | Mapping[str, AxisName]
) -> dict[str, tuple[str, ...]]:
    """Returns by path the mesh axes over which the squares of a leaf are added."""
    named = (
        axis_name
        if isinstance(axis_name, Mapping)
        else dict.fromkeys(leaves, axis_name)
    )
    return {path: sharding.axes_of(x, named[path]) for path, x in leaves.items()}
