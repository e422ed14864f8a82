"""Masks that start at random, and then move: some entries are dropped, others grow.

Numbers of entries are exact, and nothing is sorted.  A dropped entry may grow again at
once, as in the published code; it then keeps its value.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from .. import selection
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation
from ..allocations._budget import integers
from ..allocations._compared import numbers
from ..patterns._pattern import whole_shapes
from ..selection import _counts as counts, _keys as ranking
from ..selection._counts import Count
from ..selection._keys import Magnitude
from ._ranked import Now
from ._store import Leaves, Masks

RandomKey = Key[Array, ""] | UInt32[Array, " 2"]

Growth = Callable[[Now], Leaves]
"""From what there is to see to how much each entry should grow."""


def random_growth(now: Now, key: RandomKey, axis_name: AxisName) -> Leaves:
    """Scores every entry at random, by the key, the path of its leaf and its place.

    By a hash: a generator of JAX is a loop for each leaf, and is not fused.
    """
    names = [zlib.crc32(path.encode()) for path in now.params]

    def words(name):
        return jax.random.bits(jax.random.fold_in(key, name), (2,), jnp.uint32)

    seeds = jax.vmap(words)(jnp.asarray(names, jnp.uint32))
    axes = sharding.axis_names(axis_name)
    return {p: _noise(x, seeds[i], axes) for i, (p, x) in enumerate(now.params.items())}


@functools.partial(jax.jit, static_argnums=2)  # traced once for all of one shape
def _noise(
    x: Array, seed: UInt32[Array, " 2"], axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """Returns numbers in [0, 1), in the shape of `x`."""
    place = ranking.places(x, axes).astype(jnp.uint32)
    bits = _mixed(_mixed(place ^ seed[0]) ^ seed[1])
    return (bits >> 8).astype(jnp.float32) * 2**-24


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mixes all bits of an integer: `lowbias32` of nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def gradient_growth(now: Now) -> Leaves:
    """Scores every entry by the magnitude of its raw gradient."""
    return {p: trees.wide(jnp.abs(x)) for p, x in now.updates.items()}


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
        key = jax.random.fold_in(self.key, 0)
        scores = random_growth(now, key, self.axis_name).values()
        groups, kept = range(len(scores)), self.kept(now)
        new = selection.select([*scores], kept, groups, axis_name=self.axis_name)
        return dict(zip(now.params, new, strict=True))

    def grown(self, now: Now, growth: Growth | None) -> Leaves:
        """Scores by growth; the first masks, and where there is none, at random."""
        key = jax.random.fold_in(self.key, now.masks_made)
        noise = random_growth(now, key, self.axis_name)
        if growth is None:
            return noise
        starts, scores = now.masks_made == 0, growth(now)
        return {
            p: jnp.where(starts, noise[p].astype(x.dtype), x) for p, x in scores.items()
        }

    def kept(self, now: Now) -> Int[Array, " arrays"]:
        """Returns how many entries every layer keeps."""
        share = jnp.clip(trees.value_at(self.sparsity, now.step), 0, 1)
        shapes = whole_shapes(now.params.values(), self.axis_name)
        return numbers(self.allocation, list(now.params), shapes, share)


@dataclasses.dataclass(frozen=True)
class Moving:
    """Drops the smallest of what is kept and grows others, as many in every layer."""

    start: AtRandom
    fraction: Number | Schedule
    growth: Growth | None

    def init(self, params: Leaves) -> Leaves:
        """Returns nothing."""
        return self.start.init(params)

    def track(self, now: Now) -> Leaves:
        """Returns nothing."""
        return now.memory

    def masks(self, now: Now, old: Masks) -> Masks:
        """Starts at random, as a move with nothing that could stay, then moves."""
        kept = self.start.kept(now)
        dropped = part_of(counts.of(kept), trees.value_at(self.fraction, now.step))
        return moved(
            {p: mask & (now.masks_made > 0) for p, mask in old.items()},
            now.params,
            self.start.grown(now, self.growth),
            stay=kept - integers(dropped),
            kept=kept,
            axis_name=self.start.axis_name,
        )


def moved(
    old: Masks,
    params: Leaves,
    growth: Leaves,
    *,
    stay: Int[Array, " arrays"],
    kept: Int[Array, " arrays"],
    axis_name: AxisName,
) -> Masks:
    """Returns masks in which so many of the old entries stay and the others are new.

    Those with the largest magnitudes stay, at most; those with the highest growth are
    new, until every array keeps what it should.
    """
    groups = range(len(old))
    # A NaN ranks lowest, below a connection of zero.
    sizes = [Magnitude(jnp.where(m, params[p], jnp.nan)) for p, m in old.items()]
    largest = selection.select(sizes, stay, groups, axis_name=axis_name)
    left = zip(old, old.values(), largest, strict=True)
    order = [Magnitude(jnp.where(m & new, jnp.inf, growth[p])) for p, m, new in left]
    grown = selection.select(order, kept, groups, axis_name=axis_name)
    return dict(zip(old, grown, strict=True))


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
