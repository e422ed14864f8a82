"""Marking the k largest, and finding the k-th.

Arrays that nothing can have split are marked in turns: those of one type one after the
other, those of different types side by side.  So the search is compiled once for all,
and one array of a type is copied at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._core import bits, sharding
from .._core.bits import Packed
from .._core.types import AxisName
from . import _counts as counts, _keys as ranking, _search as search
from ._counts import Count
from ._keys import Candidates, Magnitude

Marks = list[Bool[Array, "..."]]
Marking = Callable[[list[Any], Int[Array, " types"], PyTree], Marks]


def kth_largest(
    tree: PyTree, k: int | Int[Array, ""], *, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Returns the k-th largest magnitude of all entries together.

    |x|₍ₖ₎, with |x|₍₁₎ ≥ |x|₍₂₎ ≥ … : the largest t that at least k entries reach.

    Exact, in float32 or, where a leaf is, in float64.  NaN ranks below every number and
    comes out where fewer than k entries are numbers.  Memory beside the tree: none.

    Args:
        tree: floating arrays of any shape, fewer than 2³¹ entries each.
        k: in [1, n], for n entries; may be traced, and is then brought into that range.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.selection.kth_largest(
        ...     [jnp.array([5.0, -7.0]), jnp.array([[1.0], [6.0]])], 2
        ... )
        Array(6., dtype=float32)
    """
    scores = [Magnitude(x) for x in jax.tree.leaves(tree)]
    size = sum(ranking.candidates(scores, axis_name).sizes)
    if not size or (isinstance(k, int) and not 1 <= k <= size):
        raise ValueError(
            f"k must lie between 1 and the number of entries, {size}, but is {k}."
        )
    kept = counts.clip(counts.of(k), counts.of(1), counts.of(size))
    return _value(scores, counts.stack([kept]), sharding.axis_names(axis_name))


def largest(
    tree: PyTree, k: int | Int[Array, ""], *, axis_name: AxisName = None
) -> PyTree:
    """Marks the k largest magnitudes of all entries together: exactly k of them.

    Of equal entries those count first that stand first: in an earlier leaf, or at a
    lower index of the same one.  (Inside `jax.shard_map`, on an earlier device.)

    Args:
        tree: floating arrays of any shape, fewer than 2³¹ entries each.
        k: in [0, n]; may be traced, and is then brought into that range.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.selection.largest(jnp.array([2.0, -3.0, 2.0, 2.0]), 3)
        Array([ True,  True,  True, False], dtype=bool)
    """
    leaves, structure = jax.tree.flatten(tree)
    kept = counts.stack([counts.of(k)])
    scores = [Magnitude(x) for x in leaves]
    marks = select(scores, kept, [0] * len(leaves), axis_name=axis_name)
    return jax.tree.unflatten(structure, marks)


def select(
    scores: Sequence[Float[Array, "..."] | Magnitude],
    kept: Int[Array, " groups"] | Count,
    groups: Sequence[int],
    *,
    floors: Sequence[int] = (),
    axis_name: AxisName = None,
) -> list[Bool[Array, "..."]]:
    """Marks the entries with the highest scores, a fixed number in every group.

    Args:
        scores: signed, or `scores.Magnitude` of any array; NaN ranks lowest.  Of equal
            scores the first is marked first.
        kept: how many to mark in each group; all of it where there are not so many.
        groups: the group of each array of scores, counted from zero.
        floors: how many of each array to mark in any case.
        axis_name: inside `jax.shard_map`, the mesh axes over which arrays are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = [jnp.array([3.0, 1.0]), jnp.array([2.0, -4.0])]
        >>> clipjax.selection.select(scores, jnp.array([2]), groups=[0, 0])
        [Array([ True, False], dtype=bool), Array([ True, False], dtype=bool)]
    """
    found = selected(scores, kept, groups, floors=floors, axis_name=axis_name)
    return [bits.mask_of(mask) for mask in found]


def selected(
    scores: Sequence[Float[Array, "..."] | Magnitude],
    kept: Int[Array, " groups"] | Count,
    groups: Sequence[int],
    *,
    floors: Sequence[int] = (),
    axis_name: AxisName = None,
) -> list[Bool[Array, "..."] | Packed]:
    """Returns what `select` does, as it was made: as bits where nothing is split."""
    if not scores:
        return []
    groups, floors = tuple(map(int, groups)), tuple(map(int, floors))
    axes = sharding.axis_names(axis_name)
    return _selected(list(scores), counts.of(kept), groups, floors, axes)


# Compiled, or an eager call would write every step of a search to memory, and traced
# once for all trees of the same shapes.


@functools.partial(jax.jit, static_argnums=2)
def _value(
    scores: list[Magnitude], kept: Count, axes: tuple[str, ...]
) -> Float[Array, ""]:
    these = ranking.candidates(scores, axes)
    task = _task(these, kept, (0,) * len(scores), ())
    ends = search.search(task._replace(by_place=False))
    return ranking.value_of(jnp.min(ranking.least_from(these, ends.key)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _selected(
    scores: list[Array | Magnitude],
    kept: Count,
    groups: tuple[int, ...],
    floors: tuple[int, ...],
    axes: tuple[str, ...],
) -> list[Bool[Array, "..."]] | list[Packed]:
    these = ranking.candidates(scores, axes)
    task = _task(these, kept, groups, floors)
    if task.competes or these.is_split():
        return _marks(task)

    def mark(scores, kept, _):
        return apart(scores, kept, axes)

    return in_turns(mark, scores, task.kept.to_integer())


def apart(
    scores: Sequence[Array | Magnitude],
    kept: Int[Array, " arrays"],
    axes: tuple[str, ...],
) -> Marks:
    """Marks so many entries of each array, all arrays in one loop."""
    these = ranking.candidates(scores, axes)
    return _marks(_task(these, counts.of(kept), range(len(scores)), ()))


def _task(
    these: Candidates, kept: Count, groups: Sequence[int], floors: Sequence[int]
) -> search.Task:
    """Keeps no fewer of a group than its floors, and no more than there are."""
    floor = np.minimum(floors or (0,) * len(groups), these.sizes).astype(np.int32)
    least, most = ([0] * (max(groups) + 1) for _ in range(2))
    for group, low, size in zip(groups, floor, these.sizes, strict=True):
        least[group] += int(low)
        most[group] += size
    kept = counts.clip(kept, counts.of(least), counts.of(most))
    groups = tuple(groups)
    if groups != tuple(range(len(groups))):
        kept = kept.at(np.asarray(groups))
    return search.Task(these, kept, groups, floor, by_place=True)


def _marks(task: search.Task) -> Marks:
    """Marks what ranks above the end of its array, ties in the order of places."""
    these = task.these
    # Held back, or XLA would compute all of the search once an entry.
    key, place = lax.optimization_barrier(tuple(search.search(task)))
    marks = []
    for i in range(len(these.sizes)):
        keys = these.keys(i, key)
        tied = keys == key[i]
        never = key[i] == jnp.iinfo(keys.dtype).min
        tied &= ranking.places(keys, these.axis_name, never) < place[i]
        marks.append((keys > key[i]) | tied)
    return marks


def in_turns(
    mark: Marking,
    items: Sequence[PyTree],
    kept: Int[Array, " items"],
    numbers: PyTree = (),
) -> list[Packed]:
    """Returns a mask for each item, of the shape of the item's first array.

    Not for arrays that the compiler may have split: those of one type may lie on a mesh
    in different ways.

    Args:
        mark: from one item of every type, how many entries the mask of each keeps, and
            their numbers, to their masks.  Zeros stand where a type has no more items.
        items: trees of arrays.
        kept: how many entries the mask of each keeps.
        numbers: arrays with one row for each item.
    """
    shapes = [jax.tree.leaves(item)[0].shape for item in items]
    items = [_in_rows(item) for item in items]
    types: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        leaves, structure = jax.tree.flatten(item)
        types.setdefault((structure, *map(jax.typeof, leaves)), []).append(i)
    turns = max(map(len, types.values()))
    order = np.full((turns, len(types)), -1)
    for column, members in enumerate(types.values()):
        order[turns - len(members) :, column] = members

    def row_of(x):
        active = (order >= 0).reshape(*order.shape, *[1] * (x.ndim - 1))
        return jnp.where(active, x[np.maximum(order, 0)], 0)

    def take(masks, turn):
        number, each, kept, rows = turn
        now = [
            _at(number - turns + len(members), [items[i] for i in members])
            for members in types.values()
        ]
        marks = mark(now, kept, rows)
        new = [
            (mask.bits if isinstance(mask, Packed) else bits.pack(mask), number)
            for mask, number in zip(marks, each, strict=True)
        ]
        # All move up by one: not stacked, since each slice would be compiled by itself.
        return [[*old[1:], last] for old, last in zip(masks, new, strict=True)], None

    def nothing(item):
        x = jax.tree.leaves(item)[0]
        return sharding.zeros(lambda x: bits.pack(x == x), x), jnp.zeros([], jnp.int32)

    kept, rows = row_of(kept), jax.tree.map(row_of, numbers)
    each = [kept[:, column] for column in range(len(types))]
    start = [[nothing(items[i]) for i in members] for members in types.values()]
    found, _ = lax.scan(take, start, (jnp.arange(turns), each, kept, rows))
    chain = itertools.chain.from_iterable
    results = dict(zip(chain(types.values()), chain(found), strict=True))
    masks = []
    for i, shape in enumerate(shapes):
        packed, number = results[i]
        masks.append(Packed(packed.reshape(bits.packed_shape(shape)), shape, number))
    return masks


def _in_rows(item: PyTree) -> PyTree:
    """Returns arrays of one size in one shape, so that they are of one type.

    But for arrays that may lie on a mesh, and those without whole bytes in a row.
    """
    x = jax.tree.leaves(item)[0]
    lengths = [n for n in range(1024, 127, -bits.BITS) if x.size % n == 0]
    if not lengths or x.shape[-1] % bits.BITS or not sharding.is_local(x):
        return item

    def one(node):
        if not isinstance(node, Packed):
            return node.reshape(-1, lengths[0])
        rows = node.bits.reshape(-1, lengths[0] // bits.BITS)
        return Packed(rows, (x.size // lengths[0], lengths[0]), node.kept)

    return jax.tree.map(one, item, is_leaf=lambda node: isinstance(node, Packed))


def _at(place: Int[Array, ""], queue: list[PyTree]) -> PyTree:
    """Returns one of several trees of the same type: the first one before them."""
    if len(queue) == 1:
        return queue[0]
    return lax.switch(place, [functools.partial(lambda item: item, x) for x in queue])
