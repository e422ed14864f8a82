"""Marking the k largest, and finding the k-th."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._core import sharding
from .._core.types import AxisName
from . import _counts as counts, _keys as ranking, _search as search
from ._counts import Count
from ._keys import Magnitude, Ranked


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
    scores = [Magnitude(x) for x in jax.tree.leaves(tree)]
    size = sum(ranking.ranked(scores, [0] * len(scores), axis_name).entries)
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
        >>> largest(jnp.array([2.0, -3.0, 2.0, 2.0]), 3)
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
        floors: how many of each array to mark before the groups are compared.
        axis_name: inside `jax.shard_map`, the mesh axes over which arrays are split.

    Example:
        >>> scores = [jnp.array([3.0, 1.0]), jnp.array([2.0, -4.0])]
        >>> select(scores, jnp.array([2]), groups=[0, 0])
        [Array([ True, False], dtype=bool), Array([ True, False], dtype=bool)]
    """
    names = sharding.axis_names(axis_name)
    kept = counts.of(kept)
    groups, floors = tuple(map(int, groups)), tuple(map(int, floors))
    return _selected(list(scores), kept, groups, floors, names)


# Compiled, or an eager call would write every step of a search to memory, and traced
# once for all trees of the same shapes.


@functools.partial(jax.jit, static_argnums=2)
def _value(
    scores: list[Magnitude], kept: Count, axes: tuple[str, ...]
) -> Float[Array, ""]:
    ranked = ranking.ranked(scores, [0] * len(scores), axes)
    bracket = search.search(ranked, kept)
    return ranking.value_of(search.answer(ranked, kept, bracket)[0])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _selected(
    scores: list[Array | Magnitude],
    kept: Count,
    groups: tuple[int, ...],
    floors: tuple[int, ...],
    axes: tuple[str, ...],
) -> list[Bool[Array, "..."]]:
    ranked = ranking.ranked(scores, groups, axes)
    if any(floors):
        own = ranked._replace(groups=tuple(range(len(scores))))
        first = _marks(own, counts.of(floors))
        keys = [
            functools.partial(ranking.ahead, make, mask)
            for make, mask in zip(ranked.keys, first, strict=True)
        ]
        needed = [0] * (max(groups) + 1)
        for floor, group in zip(floors, groups, strict=True):
            needed[group] += floor
        least = counts.of(needed)
        kept = counts.where(kept.at_least(least), kept, least)
        ranked = ranked._replace(keys=keys)
    return _marks(ranked, kept)


def _marks(ranked: Ranked, kept: Count) -> list[Bool[Array, "..."]]:
    """Marks exactly `kept` entries of every group, ties in the order of their place."""
    if not ranked.keys:
        return []
    kept = counts.clip(kept, counts.of(0), ranked.sizes())
    bracket = search.search(ranked, kept)
    lowest, highest = search.exact(kept, bracket)
    group = np.asarray(ranked.groups)
    _, most = ranking.ends(ranked, bracket.low, bracket.high)
    tie = lax.optimization_barrier(jnp.where(highest, most, bracket.low)[group])
    first, ties = ranking.first_places(ranked, tie)
    none = counts.of(jnp.zeros_like(first))
    # The first arrays of a group mark all of the ties that they can.
    wanted = (kept - bracket.reach_high).at(group)
    taken = counts.filled(wanted, ties, groups=ranked.groups)
    taken = counts.where(lowest[group], none, taken)
    ends = jnp.where(taken.equals(counts.of(1)), first + 1, 0)
    ends = lax.cond(
        jnp.any(~counts.of(1).at_least(taken)),
        lambda: _tie_ends(ranked, tie, taken, ties),
        lambda: ends,
    )
    least = jnp.where(lowest, bracket.low, bracket.high)[group]
    # Held back, or XLA would compute all of the above once an entry.
    least, ends = lax.optimization_barrier((least, ends))
    marks = []
    for i, make in enumerate(ranked.keys):
        key = make(least)
        tied = (key == tie[i]) & (ranking.places(key, ranked.axis_name) < ends[i])
        marks.append((key >= least[i]) | tied)
    return marks


def _tie_ends(
    ranked: Ranked,
    tie: Int[Array, " arrays"],
    taken: Count,
    ties: Count,
) -> Int[Array, " arrays"]:
    """Returns before which place a tie counts, by one more search, for the place.

    The first of the ties ranks highest.
    """
    size = jnp.asarray(ranked.entries, jnp.int32)

    def rank(make, i, after):
        key = make(after)
        place = ranking.places(key, ranked.axis_name)
        return jnp.where(key == tie[i], size[i] - 1 - place, -1)

    keys = [functools.partial(rank, make, i) for i, make in enumerate(ranked.keys)]
    each = tuple(range(len(keys)))
    places = ranked._replace(keys=keys, groups=each, dtype=jnp.int32)
    some = ~taken.equals(counts.of(0))
    bracket = search.close_in(places, taken, search.between(size, ties, some))
    return jnp.where(some, size - search.answer(places, taken, bracket), 0)
