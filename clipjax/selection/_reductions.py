"""Several reductions of large arrays in one pass over memory.

On a CPU, XLA takes a reduction to a single number on one core, and that of a single
integer operand without vector instructions.  By rows and of several operands it is as
fast as the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, UInt

from .._core import sharding

_LEAST, _MOST = 128, 1024  # entries of a row, where we choose
_ROWS = 16  # enough for all cores
_FEW = 1 << 13  # entries, which are reduced in one go as fast as by rows

Merge = Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]]


def reduce(
    operands: Sequence[Array], starts: Sequence[object], merge: Merge
) -> tuple[Array, ...]:
    """Reduces operands of one shape to a number each: by rows, then the rest.

    A small array, and one whose size has no divisor of a row's length, is reduced in
    one go.

    Args:
        operands: what to reduce, computed in the same pass.  Two or more: one by itself
            is slower than two.
        starts: of each operand a value, of its dtype, that changes nothing.
        merge: associative and commutative; of two tuples, one entry an operand.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from clipjax.selection._reductions import reduce
        >>> x = jnp.array([[3, 1], [2, 4]])
        >>> zeros = np.int32(0), np.int32(0)
        >>> reduce((x, x * x), zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]))
        (Array(10, dtype=int32), Array(30, dtype=int32))
    """
    rows = [_in_rows(x) for x in operands]
    parts = tuple(lax.reduce(tuple(x for x, _ in rows), starts, merge, rows[0][1]))
    if not parts[0].ndim:
        return parts
    # Held, or XLA would make one reduction of both.
    parts = lax.optimization_barrier(parts)
    return tuple(lax.reduce(parts, starts, merge, tuple(range(parts[0].ndim))))


def _in_rows(x: Array) -> tuple[Array, tuple[int, ...]]:
    """Returns an array, in another shape if need be, and which of its axes are rows."""
    shape, size = x.shape, x.size
    if size <= _FEW:
        return x, tuple(range(len(shape)))
    for first in range(len(shape) - 1, 0, -1):
        length = math.prod(shape[first:])
        if length >= _LEAST and size >= _ROWS * length:
            return x, tuple(range(first, len(shape)))
    # On a mesh a row would lie on several devices.
    if sharding.is_local(x):
        for length in range(_MOST, _LEAST - 1, -1):
            if size % length == 0:
                return x.reshape(-1, length), (1,)
    return x, tuple(range(len(shape)))


def passing(conditions: Sequence[Bool[Array, "..."]]) -> UInt[Array, " n"]:
    """Counts in one pass over memory how many entries meet each condition.

    On a mesh XLA would gather the partial results of a reduction of several operands;
    there, sums become one all-reduce.
    """
    ones = [condition.astype(jnp.uint32) for condition in conditions]
    if sharding.is_partitioned(ones[0]):
        return jnp.stack([jnp.sum(x, dtype=x.dtype) for x in ones])
    operands = ones if len(ones) > 1 else [*ones, 1 - ones[0]]  # two are faster

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right, strict=True))

    start = (np.uint32(0),) * len(operands)
    return jnp.stack(reduce(operands, start, add)[: len(ones)])
