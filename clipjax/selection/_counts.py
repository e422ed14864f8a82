"""Exact numbers of entries, traced, beyond what an int32 holds.

Without 64-bit mode JAX has no int64, and a float32 cannot tell 10⁹ entries from
10⁹ + 1.  Two int32 words, of 31 and 16 bits, hold every count up to 2⁴⁷, and 32,768
devices can add theirs without a carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from .._core.types import Number

_WORD = 1 << 16
_DECIMALS = 10**7  # as fine as float32 is near one


class Count(NamedTuple):
    """The number high·2¹⁶ + low, with low in [0, 2¹⁶)."""

    high: Int[Array, "..."]
    low: Int[Array, "..."]

    def __sub__(self, other: "Count") -> "Count":  # pyright: ignore[reportIncompatibleMethodOverride] -- of tuple
        """Returns the difference, which may be negative."""
        return normal(self.high - other.high, self.low - other.low)

    def at(self, index: Any) -> "Count":
        """Picks from counts in an array."""
        return Count(self.high[index], self.low[index])

    def at_least(self, other: "Count") -> Array:
        """Compares."""
        more = self.high > other.high
        return more | ((self.high == other.high) & (self.low >= other.low))

    def equals(self, other: "Count") -> Array:
        """Compares."""
        return (self.high == other.high) & (self.low == other.low)

    def to_integer(self) -> Int[Array, "..."]:
        """Returns an int32, in which the count of one array fits."""
        return (self.high << 16) + self.low

    def to_float(self, dtype: type = jnp.float32) -> Float[Array, "..."]:
        """Rounds to a float."""
        return self.high.astype(dtype) * dtype(_WORD) + self.low.astype(dtype)


def of(
    number: int | Sequence[int] | Int[Array, "..."] | UInt[Array, "..."] | Count,
) -> Count:
    """Splits integers below 2⁴⁷ into two words."""
    if isinstance(number, Count):
        return number
    if isinstance(number, int | Sequence):
        words = np.divmod(np.asarray(number, np.int64), _WORD)
        if np.any(words[0] >= 1 << 31):
            raise OverflowError(f"A count must be below 2⁴⁷, but is {np.max(number)}.")
        return Count(*(jnp.asarray(word, jnp.int32) for word in words))
    high = (number >> 16).astype(jnp.int32)
    return Count(high, (number & (_WORD - 1)).astype(jnp.int32))


def floor(number: Float[Array, "..."]) -> Count:
    """Rounds a float down."""
    high = jnp.floor(number / _WORD)
    low = jnp.floor(number - high * _WORD)
    return normal(high.astype(jnp.int32), low.astype(jnp.int32))


def normal(high: Int[Array, "..."], low: Int[Array, "..."]) -> Count:
    """Carries what the low word cannot hold."""
    return Count(high + (low >> 16), low & (_WORD - 1))


def where(condition: Array, then: Count, other: Count) -> Count:
    """Chooses elementwise."""
    return Count(
        *(jnp.where(condition, a, b) for a, b in zip(then, other, strict=True))
    )


def clip(count: Count, low: Count, high: Count) -> Count:
    """Brings a count between two others; where they cross, `high` holds."""
    raised = where(count.at_least(low), count, low)
    return where(raised.at_least(high), high, raised)


def stack(counts: list[Count]) -> Count:
    """Stacks along a new first axis."""
    return Count(*(jnp.stack(words) for words in zip(*counts, strict=True)))


def plus(one: Count, other: Count) -> Count:
    """Adds elementwise."""
    return normal(one.high + other.high, one.low + other.low)


def total(counts: Count, axis: int = 0) -> Count:
    """Sums along an axis."""
    return normal(*(jnp.sum(word, axis, dtype=jnp.int32) for word in counts))


def filled(
    amount: Count,
    room: Count,
    *,
    order: Int[np.ndarray, " n"] | Int[Array, " n"] | None = None,
    groups: Sequence[int] = (),
) -> Count:
    """Fills rooms one after the other.

    rᵢ = min(roomᵢ, max(amount - Σⱼ roomⱼ, 0)), over all j before i in its group

    Args:
        amount: to be shared out: a number, or for every room that of its group.
        room: how much each takes at most, [n], of at most 2¹⁵ rooms; not negative.
        order: which to fill first, which then; by default as they stand.
        groups: the group of each, if there are several; not together with `order`.
    """
    if groups:
        if len(set(groups)) == len(groups):
            return clip(amount, of(0), room)
        order = np.argsort(groups, kind="stable")
    queue = room if order is None else room.at(order)
    before = normal(*(jnp.cumsum(word, dtype=jnp.int32) - word for word in queue))
    if groups:  # but for those before the first of the own group
        own = np.sort(groups)
        before = before - before.at(np.searchsorted(own, own))
    if order is not None:
        sort = np.argsort if isinstance(order, np.ndarray) else jnp.argsort
        before = before.at(sort(order))
    return clip(amount - before, of(0), room)


def largest_first(sizes: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Orders arrays by their size, equal ones as they stand."""
    return np.argsort(-np.asarray(sizes), kind="stable")


def zeros_of(
    sparsity: Number | Float[Array, "..."], size: int | Sequence[int]
) -> Count:
    """Returns ⌈sparsity·size⌉ exactly, the sparsity read to seven decimals.

    A float32 0.999 is not 0.999, and of 10⁹ entries it keeps 999,987.  Read as the
    decimal that was meant, it keeps 1,000,000.
    """
    parts = _decimals(jnp.asarray(sparsity).astype(jnp.float32))
    whole, rest = np.divmod(np.asarray(size, np.int64), _DECIMALS)
    # ⌈parts·rest / 10⁷⌉ as a float is off by less than three, which what is left of the
    # product tells; that is small, and so exact although the products overflow.
    ratio = (rest / _DECIMALS).astype(np.float32)
    guess = (parts.astype(jnp.float32) * ratio).astype(jnp.uint32)
    left = parts * rest.astype(np.uint32) - guess * jnp.uint32(_DECIMALS)
    left = lax.bitcast_convert_type(left, jnp.int32)
    above = sum((left > n * _DECIMALS).astype(jnp.int32) for n in (0, 1, 2))
    below = sum((left <= -n * _DECIMALS).astype(jnp.int32) for n in (1, 2))
    result = of(guess)
    # parts·whole: each has up to 24 bits, twelve of which are multiplied at a time.
    first, second = parts >> 12, parts & 4095
    third, fourth = (jnp.asarray(x, jnp.uint32) for x in np.divmod(whole, 4096))
    middle = first * fourth + second * third
    high = (first * third << 8) + (middle >> 4)
    low = ((middle & 15) << 12) + second * fourth
    return normal(
        result.high + high.astype(jnp.int32),
        result.low + low.astype(jnp.int32) + above - below,
    )


def _decimals(share: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Returns share·10⁷, rounded exactly; a NaN is zero.

    A float32 product would itself be rounded, to the wrong side for 1/3.
    """
    share = jnp.where(share > 0, jnp.minimum(share, 1), 0)
    bits = (share * 2**28).astype(jnp.uint32)  # exact
    result = jnp.uint32(0)
    for shift in (0, 7, 14, 21):  # long multiplication, seven bits at a time
        digits = bits >> shift if shift == 21 else (bits >> shift) & 127
        result = (result >> 7) + digits * jnp.uint32(_DECIMALS)
    return (result + 64) >> 7
