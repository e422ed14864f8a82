"""How many entries each array may keep, so that all together meet one sparsity.

An allocation is a function of shapes and a sparsity; it returns a `Budget`.  Numbers of
entries are exact integers, and the sparsity may be traced.  `floor` entries of every
array always stay, so that no layer dies: where the floors ask for more than the
sparsity leaves, they win.  Set one with `functools.partial(uniform, floor=16)`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import _checks as check, _counts as counts
from ._counts import Count
from ._types import Number


class Budget(NamedTuple):
    """How many entries to keep, and among which arrays they are compared."""

    kept: Count  # for every group, [groups]
    groups: tuple[int, ...]  # the group of each array
    floors: tuple[int, ...]  # how many entries each array keeps in any case


Allocation = Callable[[Sequence[tuple[int, ...]], Number], Budget]
"""From the shapes of the arrays and the sparsity of all of them to a budget."""


def uniform(
    shapes: Sequence[tuple[int, ...]], sparsity: Number, *, floor: int = 1
) -> Budget:
    """Gives every array the same sparsity.

    kᵢ = max(nᵢ - ⌈s·nᵢ⌉, min(floor, nᵢ))

    Args:
        shapes: of the arrays.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        floor: entries that every array keeps.

    Example:
        >>> uniform([(10, 10), (4,)], 0.9).kept.low
        Array([10,  1], dtype=int32)
    """
    _check(sparsity, floor)
    sizes = [math.prod(shape) for shape in shapes]
    kept = [_kept(sparsity, size, min(floor, size)) for size in sizes]
    return Budget(counts.stack(kept), tuple(range(len(sizes))), (0,) * len(sizes))


def global_(
    shapes: Sequence[tuple[int, ...]], sparsity: Number, *, floor: int = 1
) -> Budget:
    """Compares the entries of all arrays with each other.

    k = N - ⌈s·N⌉ for N entries in all

    Args:
        shapes: of the arrays.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        floor: entries that every array keeps.

    Example:
        >>> budget = global_([(10, 10), (4,)], 0.5)
        >>> budget.kept.low, budget.groups
        (Array([52], dtype=int32), (0, 0))
    """
    _check(sparsity, floor)
    sizes = [math.prod(shape) for shape in shapes]
    floors = tuple(min(floor, size) for size in sizes)
    kept = [_kept(sparsity, sum(sizes), sum(floors))]
    return Budget(counts.stack(kept), (0,) * len(sizes), floors)


def erdos_renyi_kernel(
    shapes: Sequence[tuple[int, ...]], sparsity: Number, *, floor: int = 1
) -> Budget:
    """Gives larger arrays a higher sparsity, in proportion to how wide they are.

    1 - sᵢ = min(1, ε·Σ_d shape_d / Π_d shape_d), with ε such that Σᵢ kᵢ = N - ⌈s·N⌉

    Exactly that many stay, unless the floors ask for more: rounding goes to the largest
    array that has room.

    Args:
        shapes: of the arrays, such as (height, width, in, out) of a convolution.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        floor: entries that every array keeps.

    Example:
        >>> erdos_renyi_kernel([(300, 100), (100, 10)], 0.9).kept.low
        Array([2432,  668], dtype=int32)

    Reference:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging
        the Lottery: Making All Tickets Winners, 2020, https://arxiv.org/abs/1911.11134
    """
    _check(sparsity, floor)
    sizes = [math.prod(shape) for shape in shapes]
    wanted = _kept(sparsity, sum(sizes), 0)
    ratios = np.array([sum(s) / max(math.prod(s), 1) for s in shapes])
    # Arrays saturate in the order of their ratio: try every number of dense ones.
    order = np.argsort(-ratios, kind="stable")
    dense = np.concatenate([[0], np.cumsum(np.array(sizes)[order])])[:-1]
    mass = np.cumsum((np.array(sizes) * ratios)[order][::-1])[::-1]
    scales = (wanted.to_float() - dense.astype(np.float32)) / mass.astype(np.float32)
    fits = scales * ratios[order].astype(np.float32) <= 1
    scale = jnp.where(jnp.any(fits), scales[jnp.argmax(fits)], jnp.inf)
    shares = jnp.minimum(scale * ratios.astype(np.float32), 1)
    kept = [_whole(shares[i] * np.float32(size)) for i, size in enumerate(sizes)]
    floors = [min(floor, size) for size in sizes]
    groups = tuple(range(len(sizes)))
    return Budget(_exactly(wanted, kept, sizes, floors), groups, (0,) * len(sizes))


def _check(sparsity: Number, floor: int) -> None:
    check.between(0, 1, sparsity=sparsity)
    check.whole(0, floor=floor)


def _kept(sparsity: Number, size: int, floor: int) -> Count:
    kept = counts.of(size) - counts.zeros_of(sparsity, size)
    return counts.clip(kept, counts.of(floor), counts.of(size))


def _whole(number: Float[Array, ""]) -> Count:
    """Rounds down."""
    high = jnp.floor(number / 2**16)
    low = jnp.floor(number - high * 2**16)
    return counts.normal(high.astype(jnp.int32), low.astype(jnp.int32))


def _exactly(
    wanted: Count, kept: list[Count], sizes: Sequence[int], floors: Sequence[int]
) -> Count:
    """Brings numbers into their bounds, and their sum to what is wanted."""
    bounds = [
        (counts.of(low), counts.of(high))
        for low, high in zip(floors, sizes, strict=True)
    ]
    result = [counts.clip(k, *b) for k, b in zip(kept, bounds, strict=True)]
    rest = wanted - counts.total(counts.stack(result))
    for i in sorted(range(len(kept)), key=lambda i: -sizes[i]):
        moved = result[i] - (counts.of(0) - rest)
        result[i] = counts.clip(moved, *bounds[i])
        rest = moved - result[i]
    return counts.stack(result)
