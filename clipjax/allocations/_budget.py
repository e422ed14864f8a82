"""What an allocation is, and the exact numbers that all of ours are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .._core import checks as check
from .._core.types import Number
from ..selection import _counts as counts
from ..selection._counts import Count
from ..selection._keys import Magnitude

Scores = Float[Array, "..."] | Magnitude
"""The scores of one array, the highest to keep."""

Allocation = Callable[..., Any]
"""Called as `allocation(paths, shapes, sparsity, scores)`; returns what arrays keep.

The paths, shapes and scores of the arrays stand in one order; there are no scores,
`None`, where masks start at random.  Returned is one integer for each array: a list, or
a vector that may be traced.  Inside `jax.shard_map` the shapes are those over all
devices, while scores are local blocks: reduce what is read of them over the mesh.
"""

_MOST = 2**31 - 2  # entries of one array that can be ranked


def check_numbers(sparsity: Number, floor: int) -> None:
    """Raises unless both are possible."""
    check.between(0, 1, sparsity=sparsity)
    check.whole(0, floor=floor)


def sizes_of(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the numbers of entries; each fits an int32."""
    sizes = [math.prod(shape) for shape in shapes]
    if max(sizes, default=0) > _MOST:
        raise ValueError(
            f"An array of {max(sizes)} entries is too large to be ranked: at most"
            f" {_MOST}. Split it along its first axis."
        )
    return sizes


def written(scores: Scores) -> Float[Array, "..."]:
    """Returns scores as an array."""
    return jnp.abs(scores.x) if isinstance(scores, Magnitude) else scores


def kept_of(
    sparsity: Number | Float[Array, " n"],
    size: int | Sequence[int],
    floor: int | Sequence[int],
) -> Count:
    """Returns n - ⌈s·n⌉, but the floor at least, for one array or for each."""
    kept = counts.of(size) - counts.zeros_of(sparsity, size)
    return counts.clip(kept, counts.of(floor), counts.of(size))


def exactly(wanted: Count, kept: Count, sizes: Sequence[int], floors: Count) -> Count:
    """Brings numbers into their bounds, and their sum to what is wanted.

    The largest arrays that have room make up for the others.
    """
    most = counts.of(sizes)
    floors = counts.clip(floors, counts.of(0), most)
    kept = counts.clip(kept, floors, most)
    rest = wanted - counts.total(kept)
    order = counts.largest_first(sizes)
    more = counts.filled(rest, most - kept, order=order)
    less = counts.filled(counts.of(0) - rest, kept - floors, order=order)
    return counts.plus(kept, more) - less


def checked(
    kept: Any, paths: Sequence[str], sizes: Sequence[int]
) -> Int[Array, " arrays"]:
    """Returns as int32 what a function of the user's returned, if it can be right."""
    returned = kept
    if isinstance(kept, list | tuple):
        is_traced = any(isinstance(number, Tracer) for number in kept)
        kept = (jnp if is_traced else np).asarray(kept)
    dtype: Any = getattr(kept, "dtype", np.dtype(float))
    if np.shape(kept) != (len(sizes),) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"allocation must return an integer for each of {len(sizes)} arrays, but"
            f" returned {returned!r}. Return a list or a vector in the order of the"
            " paths, and round down."
        )
    if not isinstance(kept, Tracer):
        for path, number, size in zip(paths, kept.tolist(), sizes, strict=True):
            if not 0 <= number <= size:
                raise ValueError(
                    f"allocation must keep between 0 and {size} entries of {path!r},"
                    f" but returned {number}. Bring it into that range."
                )
    most = np.minimum(sizes, np.iinfo(dtype).max).astype(dtype)  # of a narrow integer
    return jnp.clip(jnp.asarray(kept), 0, most).astype(jnp.int32)
