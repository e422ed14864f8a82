"""Masks that start at random, and then move: some entries are dropped, others grow.

Numbers of entries are exact, and nothing is sorted.  A dropped entry may grow again at
once, as in the published code; it then keeps its value.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from .. import selection
from .._core import checks as check, sharding, trees
from .._core.dtypes import common
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation
from ..allocations._budget import integers
from ..allocations._compared import numbers
from ..patterns._pattern import whole_shapes
from ..selection import _counts as counts
from ..selection._counts import Count
from ..selection._keys import Magnitude
from ._ranked import Now
from ._store import Leaves, Masks

RandomKey = Key[Array, ""] | UInt32[Array, " 2"]

Growth = Callable[[Now], Leaves]
"""From what there is to see to how much each entry should grow."""


def random_growth(now: Now, key: RandomKey) -> Leaves:
    """Scores every entry at random, by the key and the path of its leaf.

    Leaves of one type are drawn together: each loop of a generator is one to compile.
    """
    types: dict[Any, dict[str, Array]] = {}
    for path, x in now.params.items():
        types.setdefault((x.shape, sharding.differing_axes(x)), {})[path] = x
    drawn = {}
    for (shape, axes), same in types.items():
        draw = functools.partial(_drawn, sharding.own_key(key, axes), shape)
        names = jnp.asarray([zlib.crc32(path.encode()) for path in same], jnp.uint32)
        values = jax.vmap(draw)(names)
        for i, (path, x) in enumerate(same.items()):
            drawn[path] = sharding.like(values[i], x)
    return {path: drawn[path] for path in now.params}


def _drawn(key: RandomKey, shape: tuple[int, ...], name: UInt32[Array, ""]) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, name), shape, jnp.float32)


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
        scores = random_growth(now, jax.random.fold_in(self.key, 0)).values()
        groups, kept = range(len(scores)), self.kept(now)
        new = selection.select([*scores], kept, groups, axis_name=self.axis_name)
        return dict(zip(now.params, new, strict=True))

    def grown(self, now: Now, growth: Growth | None) -> Leaves:
        """Scores by growth; the first masks, and where there is none, at random."""
        key = jax.random.fold_in(self.key, now.masks_made)
        if growth is None:
            return random_growth(now, key)
        kinds = jax.eval_shape(growth, now)

        def at_random():
            drawn = random_growth(now, key)
            return {p: x.astype(kinds[p].dtype) for p, x in drawn.items()}

        return jax.lax.cond(now.masks_made == 0, at_random, lambda: growth(now))

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
    new, until every array keeps what it should.  Both are one search in a loop, which
    is traced and compiled once.
    """

    def choose(turn, chosen):
        drops = turn == 0
        scores = [_ranks(drops, m, params[p], growth[p]) for p, m in chosen.items()]
        number, groups = jnp.where(drops, stay, kept), range(len(scores))
        best = selection.select(scores, number, groups, axis_name=axis_name)
        pairs = zip(chosen.items(), best, strict=True)
        return {p: new & (mask | ~drops) for (p, mask), new in pairs}

    return jax.lax.fori_loop(0, 2, choose, old)


def _ranks(
    drops: Bool[Array, ""], mask: Bool[Array, "..."], param: Array, growth: Array
) -> Magnitude:
    """Ranks what the mask marks by magnitude; or before all the rest, by growth."""
    size = jnp.abs(param)
    dtype = common(size, growth)
    inside = jnp.where(drops, size.astype(dtype), jnp.inf)
    outside = jnp.where(drops, jnp.nan, growth.astype(dtype))  # NaN ranks lowest
    return Magnitude(jnp.where(mask, inside, outside))


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
