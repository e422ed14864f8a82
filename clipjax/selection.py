"""The k-th largest of one array or of many, found by counting.

No sort, scatter, gather or concatenation: a pass counts how many entries reach each of
a few thresholds, and the next pass looks between two of them.  So the compiled program
holds one scalar all-reduce a pass when the entries are split over devices, and a k that
is traced compiles once.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from . import (
    _counts as counts,
    _meshes as meshes,
    _ranking as ranking,
    _search as search,
)
from ._counts import Count
from ._ranking import Ranked
from ._types import AxisName


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
        >>> kth_largest([jnp.array([5.0, -7.0]), jnp.array([[1.0], [6.0]])], 2)
        Array(6., dtype=float32)
    """
    leaves = jax.tree.leaves(tree)
    ranked = ranking.ranked(leaves, [0] * len(leaves), ranking.magnitude_key, axis_name)
    size = sum(ranked.entries)
    if not size or (isinstance(k, int) and not 1 <= k <= size):
        raise ValueError(
            f"k must lie between 1 and the number of entries, {size}, but is {k}."
        )
    kept = counts.clip(counts.of(k), counts.of(1), counts.of(size))
    return ranking.value_of(search.search(ranked, counts.stack([kept]))[0])


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
        >>> largest(jnp.array([2.0, -3.0, 2.0, 2.0]), 3)
        Array([ True,  True,  True, False], dtype=bool)
    """
    leaves, structure = jax.tree.flatten(tree)
    kept = counts.stack([counts.of(k)])
    ranked = ranking.ranked(leaves, [0] * len(leaves), ranking.magnitude_key, axis_name)
    return jax.tree.unflatten(structure, _marks(ranked, kept))


def select(
    scores: Sequence[Float[Array, "..."]],
    kept: Int[Array, " groups"] | Count,
    groups: Sequence[int],
    *,
    floors: Sequence[int] = (),
    axis_name: AxisName = None,
) -> list[Bool[Array, "..."]]:
    """Marks the entries with the highest scores, a fixed number in every group.

    Args:
        scores: signed; NaN ranks lowest.  Of equal scores the first is marked first.
        kept: how many to mark in each group; all of it where there are not so many.
        groups: the group of each array of scores, counted from zero.
        floors: how many of each array to mark before the groups are compared.
        axis_name: inside `jax.shard_map`, the mesh axes over which arrays are split.

    Example:
        >>> scores = [jnp.array([3.0, 1.0]), jnp.array([2.0, -4.0])]
        >>> select(scores, jnp.array([2]), groups=[0, 0])
        [Array([ True, False], dtype=bool), Array([ True, False], dtype=bool)]
    """
    kept = counts.of(kept)
    ranked = ranking.ranked(scores, groups, ranking.key_of, axis_name)
    if any(floors):
        own = ranking.ranked(scores, range(len(scores)), ranking.key_of, axis_name)
        first = _marks(own, counts.stack([counts.of(floor) for floor in floors]))
        ranked = ranked._replace(
            keys=[
                functools.partial(ranking.ahead, make, mask)
                for make, mask in zip(ranked.keys, first, strict=True)
            ]
        )
        needed = [0] * (max(groups) + 1)
        for floor, group in zip(floors, groups, strict=True):
            needed[group] += floor
        least = counts.stack([counts.of(number) for number in needed])
        kept = counts.where(kept.at_least(least), kept, least)
    return _marks(ranked, kept)


def _marks(ranked: Ranked, kept: Count) -> list[Bool[Array, "..."]]:
    """Marks exactly `kept` entries of every group, ties in the order of their place."""
    if not ranked.keys:
        return []
    kept = counts.clip(kept, counts.of(0), ranked.sizes())
    answer = search.search(ranked, kept)[np.asarray(ranked.groups)]
    taken, ties = _ties(ranked, kept, answer)
    all_ties = taken.equals(ties)
    some_ties = ~all_ties & ~taken.equals(counts.of(0))

    def whole():
        keys = [make(answer) for make in ranked.keys]
        return [
            (key > least) | ((key == least) & every)
            for key, least, every in zip(keys, answer, all_ties, strict=True)
        ]

    def partly():
        size = jnp.asarray(ranked.entries, jnp.int32)
        ends = _tie_ends(ranked, answer, taken, ties, some_ties)
        ends = jnp.where(some_ties, ends, jnp.where(all_ties, size, 0))
        marks = []
        for make, least, end in zip(ranked.keys, answer, ends, strict=True):
            key = make(least)
            tie = (key == least) & (_places(key, ranked.axis_name) < end)
            marks.append((key > least) | tie)
        return marks

    return lax.cond(jnp.any(some_ties), partly, whole)


def _ties(
    ranked: Ranked, kept: Count, answer: Int[Array, " arrays"]
) -> tuple[Count, Count]:
    """Returns for each array how many keys equal to the answer count, and are there."""
    each = ranked._replace(groups=tuple(range(len(ranked.keys))))
    end = jnp.iinfo(ranked.dtype).max
    thresholds = jnp.stack([jnp.minimum(answer, end - 1) + 1, answer], axis=1)
    reach = ranking.count(each, thresholds)
    above, level = (Count(*(word[:, i] for word in reach)) for i in (0, 1))
    return _share_out(ranked.groups, kept, above, level - above), level - above


def _tie_ends(
    ranked: Ranked,
    answer: Int[Array, " arrays"],
    taken: Count,
    ties: Count,
    some: Bool[Array, " arrays"],
) -> Int[Array, " arrays"]:
    """Returns for each array before which place a key equal to the answer counts.

    One more search, for the place: the first of the ties ranks highest.
    """
    size = jnp.asarray(ranked.entries, jnp.int32)

    def rank(make, i, after):
        key = make(after)
        place = _places(key, ranked.axis_name)
        return jnp.where(key == answer[i], size[i] - 1 - place, -1)

    keys = [functools.partial(rank, make, i) for i, make in enumerate(ranked.keys)]
    places = ranked._replace(keys=keys, groups=tuple(range(len(keys))), dtype=jnp.int32)
    bracket = search.between(size, ties, some)
    return size - search.close_in(places, taken, bracket)


def _share_out(
    groups: tuple[int, ...], kept: Count, above: Count, ties: Count
) -> Count:
    """Returns how many ties each array may mark: the first arrays take all they can."""
    taken: list[Count] = []
    left = [Count(*(word[group] for word in kept)) for group in range(max(groups) + 1)]
    for i, group in enumerate(groups):
        left[group] = left[group] - Count(*(word[i] for word in above))
    for i, group in enumerate(groups):
        own = Count(*(word[i] for word in ties))
        taken.append(counts.clip(left[group], counts.of(0), own))
        left[group] = left[group] - taken[-1]
    return counts.stack(taken)


def _places(x: Array, axis_name: AxisName) -> Int[Array, "..."]:
    """Numbers the entries in the order of their indices, device after device."""
    place = jnp.zeros(x.shape, jnp.int32)
    for axis, length in enumerate(x.shape):
        place = place * length + lax.broadcasted_iota(jnp.int32, x.shape, axis)
    device = jnp.int32(0)
    for name in meshes.axes_of(x, axis_name):
        device = device * lax.axis_size(name) + lax.axis_index(name)
    return meshes.like(place, x) + device * jnp.int32(x.size)
