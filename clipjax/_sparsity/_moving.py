"""Masks that start at random, and then move: some entries are dropped, others grow.

Numbers of entries are exact, and nothing is sorted.  A dropped entry may grow again at
once, as in the published code; it then keeps its value.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from .._core import bits, checks as check, sharding, trees
from .._core.bits import Packed, mask_of
from .._core.dtypes import common
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation
from ..allocations._compared import numbers
from ..patterns._pattern import whole_shapes
from ..selection import _counts as counts, _keys as ranking
from ..selection._counts import Count
from ..selection._keys import Magnitude
from ..selection._select import Marking, apart, in_turns
from ._ranked import Now
from ._store import Leaves, Masks, target

RandomKey = Key[Array, ""] | UInt32[Array, " 2"]


@dataclasses.dataclass(frozen=True)
class AtRandom:
    """Random masks that never move."""

    sparsity: Number | Schedule
    key: RandomKey
    allocation: Allocation
    axis_name: AxisName

    def __post_init__(self) -> None:
        check.between(0, 1, sparsity=self.sparsity)
        check.function(allocation=self.allocation)

    def init(self, params: Leaves) -> Leaves:
        """Returns nothing."""
        del params
        return {}

    def track(self, now: Now) -> Leaves:
        """Returns nothing."""
        return now.memory

    def masks(self, now: Now, old: Masks) -> Masks:
        """Keeps at random what the allocation leaves to every layer."""
        del old
        axes = sharding.axis_names(self.axis_name)

        def mark(params, kept, rows):
            _, seeds = rows
            noise = [_noise(x, seeds[i], axes) for i, x in enumerate(params)]
            return apart(noise, kept, axes)

        return self.marked(now, mark, list(now.params.values()), self.kept(now))

    def marked(
        self, now: Now, mark: Marking, items: list[Any], kept: Array, rows: Any = ()
    ) -> Masks:
        """Returns what `mark` makes of every leaf's item, row and random seed.

        Of one leaf of each type at a time, unless the compiler may have split them.
        """
        rows = (rows, _seeds(self.key, now.masks_made, list(now.params)))
        is_split = any(map(sharding.is_partitioned, now.params.values()))
        if self.axis_name or is_split:
            new = mark(items, kept, rows)
        else:
            new = in_turns(mark, items, kept, rows)
        return dict(zip(now.params, new, strict=True))

    def kept(self, now: Now) -> Int[Array, " arrays"]:
        """Returns how many entries every layer keeps."""
        share = target(self.sparsity, now.step)
        shapes = whole_shapes(now.params.values(), self.axis_name)
        return numbers(self.allocation, list(now.params), shapes, share)


@dataclasses.dataclass(frozen=True)
class Moving:
    """Drops the smallest of what is kept and grows others, as many in every layer."""

    start: AtRandom
    fraction: Number | Schedule
    by_gradient: bool  # else at random

    def init(self, params: Leaves) -> Leaves:
        """Returns nothing."""
        return self.start.init(params)

    def track(self, now: Now) -> Leaves:
        """Returns nothing."""
        return now.memory

    def masks(self, now: Now, old: Masks) -> Masks:
        """Starts at random, then moves."""
        kept = self.start.kept(now)
        dropped = part_of(counts.of(kept), trees.value_at(self.fraction, now.step))
        growth = now.updates if self.by_gradient else None
        return moved(self.start, now, old, growth, kept - dropped.to_integer(), kept)


def moved(
    start: AtRandom,
    now: Now,
    old: Masks,
    growth: Leaves | None,
    stay: Int[Array, " arrays"],
    kept: Int[Array, " arrays"],
) -> Masks:
    """Returns masks in which so many of the old entries stay and the others are new.

    Those with the largest magnitudes stay, at most; those with the largest magnitudes
    of growth are new, until every array keeps what it should.  The first masks are a
    move with nothing that could stay, and grow at random, as all do without growth.
    """
    axes, has_old = sharding.axis_names(start.axis_name), now.masks_made > 0

    def mark(items, kept, rows):
        stay, seeds = rows

        def phase(largest, turn):
            """Marks what stays, then also what grows: one search serves both."""
            # Held, or XLA would write what both read before this loop.
            now, own, turn = jax.lax.optimization_barrier((items, seeds, turn))
            (grows, number), order = turn, []
            for i, (x, old, *source) in enumerate(now):
                has = mask_of(old) & has_old
                score = _noise(x, own[i], axes)
                if source:
                    size = trees.wide(jnp.abs(source[0]))
                    score = jnp.where(has_old, size, score.astype(size.dtype))
                score = jnp.where(has & mask_of(largest[i]), jnp.inf, score)
                # A NaN ranks lowest, below a connection of zero.
                size = trees.wide(jnp.where(has, jnp.abs(x), jnp.nan))
                kind = common(score, size)
                best = jnp.where(grows, score.astype(kind), size.astype(kind))
                order.append(Magnitude(best))
            return [*map(as_stored, apart(order, number, axes), largest)], None

        start = [old for _, old, *_ in items]
        turns = jnp.array([False, True]), jnp.stack([stay, kept])
        return jax.lax.scan(phase, start, turns)[0]

    def as_stored(mask, old):
        return Packed(bits.pack(mask), mask.shape) if isinstance(old, Packed) else mask

    sources = {p: () if growth is None else (growth[p],) for p in old}
    items = [(now.params[p], mask, *sources[p]) for p, mask in old.items()]
    return start.marked(now, mark, items, kept, stay)


def _seeds(
    key: RandomKey, number: Int[Array, ""] | int, paths: list[str]
) -> UInt32[Array, "leaves 2"]:
    """Draws two words for each leaf, by the key, the number of moves and its path."""
    names = jnp.asarray([zlib.crc32(path.encode()) for path in paths], jnp.uint32)

    def words(number, name):
        own = jax.random.fold_in(jax.random.fold_in(key, number), name)
        return jax.random.bits(own, (2,), jnp.uint32)

    # The number once a leaf too: so both folds are nearly the same program.
    return jax.vmap(words)(jnp.full(len(paths), number), names)


def _noise(
    x: Array, seed: UInt32[Array, " 2"], axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """Returns numbers in [0, 1), in the shape of `x`: a hash of every entry's place.

    A generator of JAX is a loop for each leaf, and is not fused.
    """
    place = ranking.places(x, axes, seed[0] != seed[0]).astype(jnp.uint32)
    mixed = _mixed(_mixed(place ^ seed[0]) ^ seed[1])
    return (mixed >> 8).astype(jnp.float32) * 2**-24


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mixes all bits of an integer: `lowbias32` of nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def annealed(
    fraction: Number | Schedule, end: Callable[[], Float[Array, ""]]
) -> Schedule:
    """Returns f/2·(1 + cos(πt/T)) as a schedule."""

    def value(step):
        share = jnp.clip(step.astype(jnp.float32) / end(), 0, 1)
        return trees.value_at(fraction, step) / 2 * (1 + jnp.cos(jnp.pi * share))

    return value


def part_of(number: Count, share: Float[Array, "..."]) -> Count:
    """Returns ⌊share·number⌋."""
    rounded = counts.floor(jnp.clip(share, 0, 1) * number.to_float())
    return counts.where(number.at_least(rounded), rounded, number)
