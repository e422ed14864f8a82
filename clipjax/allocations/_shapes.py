"""Allocations that shapes alone decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .._core.types import Number
from ..selection import _counts as counts
from ._budget import Scores, check_numbers, exactly, kept_of, sizes_of


def uniform(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    *,
    floor: int = 1,
) -> Int[Array, " arrays"]:
    """Gives every array the same sparsity.

    kᵢ = max(nᵢ - ⌈s·nᵢ⌉, min(floor, nᵢ))

    Args:
        paths: of the arrays; not read.
        shapes: of the arrays.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        scores: of the arrays; not read.
        floor: entries that every array keeps.

    Example:
        >>> import clipjax
        >>> clipjax.allocations.uniform(["a", "b"], [(10, 10), (4,)], 0.9)
        Array([10,  1], dtype=int32)
    """
    del paths, scores
    check_numbers(sparsity, floor)
    sizes = sizes_of(shapes)
    return kept_of(sparsity, sizes, [min(floor, n) for n in sizes]).to_integer()


def square_root(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    *,
    floor: int = 1,
) -> Int[Array, " arrays"]:
    """Gives larger arrays a higher sparsity: what stays goes by the root of the size.

    kᵢ = min(nᵢ, ε·√nᵢ), for nᵢ entries, with ε such that Σᵢ kᵢ = N - ⌈s·N⌉

    Use it where nothing is known: it keeps small layers alive, as `erdos_renyi_kernel`
    does, and reads sizes alone, so a leaf may be split in any way.  Where every step of
    a search may compare all arrays, `normalized(0.5)` and `global_` are a little better
    still.

    Exactly that many stay, unless the floors ask for more: rounding goes to the largest
    array that has room.

    Args:
        paths: of the arrays; not read.
        shapes: of the arrays.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        scores: of the arrays; not read.
        floor: entries that every array keeps.

    Example:
        >>> import clipjax
        >>> clipjax.allocations.square_root(["a", "b"], [(300, 100), (10, 30)], 0.9)
        Array([2755,  275], dtype=int32)
    """
    del paths, scores
    ratios = [max(math.prod(s), 1) ** -0.5 for s in shapes]
    return _proportional(shapes, np.array(ratios), sparsity, floor)


def erdos_renyi(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    *,
    floor: int = 1,
) -> Int[Array, " arrays"]:
    """Gives larger arrays a higher sparsity, in proportion to inputs and outputs.

    1 - sᵢ = min(1, ε·(in + out)/(in·out)), with ε such that Σᵢ kᵢ = N - ⌈s·N⌉

    The inputs and outputs are the last two axes; a kernel's height and width do not
    count, in which `erdos_renyi_kernel` differs.  Exactly that many stay, unless the
    floors ask for more: rounding goes to the largest array that has room.

    Args:
        paths: of the arrays; not read.
        shapes: of the arrays, such as (height, width, in, out) of a convolution.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        scores: of the arrays; not read.
        floor: entries that every array keeps.

    Example:
        >>> import clipjax
        >>> clipjax.allocations.erdos_renyi(
        ...     ["conv", "dense"], [(3, 3, 10, 10), (100, 10)], 0.9
        ... )
        Array([117,  73], dtype=int32)

    Reference:
        Decebal Constantin Mocanu, Elena Mocanu, Peter Stone, Phuong H. Nguyen,
        Madeleine Gibescu, Antonio Liotta, Scalable Training of Artificial Neural
        Networks with Adaptive Sparse Connectivity inspired by Network Science, 2017,
        https://arxiv.org/abs/1707.04780
    """
    del paths, scores
    ratios = [sum(s[-2:]) / max(math.prod(s[-2:]), 1) for s in shapes]
    return _proportional(shapes, np.array(ratios), sparsity, floor)


def erdos_renyi_kernel(
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    sparsity: Number,
    scores: Sequence[Scores] | None = None,
    *,
    floor: int = 1,
) -> Int[Array, " arrays"]:
    """Gives larger arrays a higher sparsity, in proportion to how wide they are.

    1 - sᵢ = min(1, ε·Σ_d shape_d / Π_d shape_d), with ε such that Σᵢ kᵢ = N - ⌈s·N⌉

    Exactly that many stay, unless the floors ask for more: rounding goes to the largest
    array that has room.

    Args:
        paths: of the arrays; not read.
        shapes: of the arrays, such as (height, width, in, out) of a convolution.
        sparsity: s in [0, 1], read to seven decimals; may be traced.
        scores: of the arrays; not read.
        floor: entries that every array keeps.

    Example:
        >>> import clipjax
        >>> clipjax.allocations.erdos_renyi_kernel(
        ...     ["a", "b"], [(300, 100), (100, 10)], 0.9
        ... )
        Array([2432,  668], dtype=int32)

    Reference:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging
        the Lottery: Making All Tickets Winners, 2020, https://arxiv.org/abs/1911.11134
    """
    del paths, scores
    ratios = [sum(s) / max(math.prod(s), 1) for s in shapes]
    return _proportional(shapes, np.array(ratios), sparsity, floor)


def _proportional(
    shapes: Sequence[tuple[int, ...]],
    ratios: np.ndarray,
    sparsity: Number,
    floor: int,
) -> Int[Array, " arrays"]:
    """Gives every array a density in proportion to its ratio, or all of its entries."""
    check_numbers(sparsity, floor)
    sizes = sizes_of(shapes)
    wanted = kept_of(sparsity, sum(sizes), 0)
    # Arrays saturate in the order of their ratio: try every number of dense ones.
    order = np.argsort(-ratios, kind="stable")
    dense = np.concatenate([[0], np.cumsum(np.array(sizes)[order])])[:-1]
    mass = np.cumsum((np.array(sizes) * ratios)[order][::-1])[::-1]
    scales = (wanted.to_float() - dense.astype(np.float32)) / mass.astype(np.float32)
    fits = scales * ratios[order].astype(np.float32) <= 1
    scale = jnp.where(jnp.any(fits), scales[jnp.argmax(fits)], jnp.inf)
    shares = jnp.minimum(scale * ratios.astype(np.float32), 1)
    kept = counts.floor(shares * np.array(sizes, np.float32))
    floors = counts.of([min(floor, size) for size in sizes])
    return exactly(wanted, kept, sizes, floors).to_integer()
