"""Many masks by one function, which is compiled once for each type of array.

Arrays of one type are taken one after the other, those of different types side by side:
so a loop inside is compiled once for all, and one array of a type is copied at a time.
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
from jaxtyping import Array, Bool, Int, PyTree

from .._core import bits, sharding

Marking = Callable[[list[Any], PyTree, Bool[Array, " types"]], list[Bool[Array, "..."]]]


def in_turns(
    mark: Marking, items: Sequence[PyTree], numbers: PyTree
) -> list[Bool[Array, "..."]]:
    """Returns a mask for each item, of the shape of the item's first array.

    Not for arrays that the compiler may have split: those of one type may lie on a mesh
    in different ways.

    Args:
        mark: from one item of every type, their numbers, and whether each is one to
            be marked (where not, it is not read) to their masks.
        items: trees of arrays.
        numbers: arrays with one row for each item.
    """
    types: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        leaves, structure = jax.tree.flatten(item)
        types.setdefault((structure, *map(jax.typeof, leaves)), []).append(i)
    turns = max(map(len, types.values()))
    order = np.full((turns, len(types)), -1)
    for column, members in enumerate(types.values()):
        order[turns - len(members) :, column] = members
    queues = [[items[i] for i in members] for members in types.values()]

    def take(masks, turn):
        number, rows, active = turn
        now = [_at(number - turns + len(own), own) for own in queues]
        new = [bits.pack(mask) for mask in mark(now, rows, active)]
        # All move up by one: not stacked, since each slice would be compiled by itself.
        return [[*old[1:], last] for old, last in zip(masks, new, strict=True)], None

    rows = jax.tree.map(lambda x: x[np.maximum(order, 0)], numbers)
    start = [[_nothing(jax.tree.leaves(item)[0]) for item in own] for own in queues]
    found, _ = lax.scan(take, start, (jnp.arange(turns), rows, jnp.asarray(order >= 0)))
    chain = itertools.chain.from_iterable
    packed = dict(zip(chain(types.values()), chain(found), strict=True))
    return [
        bits.unpack(packed[i], jax.tree.leaves(item)[0].shape)
        for i, item in enumerate(items)
    ]


def _nothing(x: Array) -> Array:
    """Returns the packed mask that keeps nothing of an array."""
    return sharding.zeros(lambda x: bits.pack(x == x), x)


def _at(place: Int[Array, ""], queue: list[PyTree]) -> PyTree:
    """Returns one of several trees of the same type: the first one before them."""
    if len(queue) == 1:
        return queue[0]
    return lax.switch(place, [functools.partial(lambda item: item, x) for x in queue])
