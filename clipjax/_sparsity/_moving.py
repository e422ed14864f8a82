"""Rules for masks that start at random and then move."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from .. import allocations, masks, norms, patterns
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..allocations import Allocation, Budget
from ..scores._tracked import drawn, leaf_key
from ..selection import _counts as counts
from ..selection._counts import Count
from . import _drop_grow as drop_grow
from ._ranked import Now
from ._store import Masks

RandomKey = Key[Array, ""] | UInt32[Array, " 2"]

Scores = dict[str, Float[Array, "..."]]

Growth = Callable[[Now, RandomKey], Scores]
"""From what there is to see and a fresh key to how much each entry should grow."""


def random_growth(now: Now, key: RandomKey) -> Scores:
    """Scores every entry at random, in the dtype in which gradients are compared."""

    def one(path, x):
        ones = masks.full(x).astype(jnp.float32)
        dtype = trees.wide(jnp.real(now.updates[path])).dtype
        return drawn(leaf_key(key, path), ones).astype(dtype)

    return {p: one(p, x) for p, x in now.params.items()}


def gradient_growth(now: Now, key: RandomKey) -> Scores:
    """Scores every entry by the magnitude of its raw gradient."""
    del key
    return {p: trees.wide(jnp.abs(x)) for p, x in now.updates.items()}


@dataclasses.dataclass(frozen=True)
class Start:
    """Random masks that never move."""

    sparsity: Number | Schedule
    key: RandomKey
    allocation: Allocation
    axis_name: AxisName

    def __post_init__(self) -> None:
        check.between(0, 1, sparsity=self.sparsity)
        check.function(allocation=self.allocation)
        if allocations.weighs(self.allocation):
            raise ValueError(
                "allocation must go by shapes, since the first mask is random, but"
                f" {self.allocation} weighs scores. Use `allocations.uniform`,"
                " `.erdos_renyi_kernel`, `.global_` or `.by_path`."
            )

    def init(self, params: dict[str, Array]) -> dict[str, Array]:
        """Returns nothing."""
        del params
        return {}

    def track(self, now: Now) -> dict[str, Array]:
        """Returns nothing."""
        return now.memory

    def masks(self, now: Now, old: Masks) -> Masks:
        """Keeps at random what the allocation leaves to every layer."""
        del old
        return patterns.marks(
            random_growth(now, jax.random.fold_in(self.key, 0)),
            now.params,
            self.share(now),
            pattern=patterns.Unstructured(),
            allocation=self.allocation,
            axis_name=self.axis_name,
        )

    def share(self, now: Now) -> Float[Array, ""]:
        """Returns the sparsity of this step."""
        return jnp.clip(trees.value_at(self.sparsity, now.step), 0, 1)

    def budget(self, now: Now) -> Budget:
        """Returns how many entries the layers keep."""
        blocks = {p: sharding.blocks(x, self.axis_name) for p, x in now.params.items()}
        shapes = [
            (x.shape[0] * blocks[p], *x.shape[1:]) if x.ndim else ()
            for p, x in now.params.items()
        ]
        allocation = allocations.at_paths(self.allocation, list(now.params))
        return allocation(shapes, self.share(now))


@dataclasses.dataclass(frozen=True)
class Moving:
    """Drops the smallest of what is kept and grows others, as many in every group."""

    start: Start
    fraction: Number | Schedule
    growth: Growth

    def init(self, params: dict[str, Array]) -> dict[str, Array]:
        """Returns nothing."""
        return self.start.init(params)

    def track(self, now: Now) -> dict[str, Array]:
        """Returns nothing."""
        return now.memory

    def masks(self, now: Now, old: Masks) -> Masks:
        """Starts at random, as a move with nothing that could stay, then moves."""
        budget = self.start.budget(now)
        starts = now.masks_made == 0
        dropped = drop_grow.part_of(
            budget.kept, trees.value_at(self.fraction, now.step)
        )
        key = jax.random.fold_in(self.start.key, now.masks_made)
        grown = jax.lax.cond(
            starts,
            lambda: random_growth(now, key),
            lambda: self.growth(now, key),
        )
        new = drop_grow.moved(
            [mask & ~starts for mask in old.values()],
            list(now.params.values()),
            list(grown.values()),
            stay=budget.kept - dropped,
            budget=budget,
            axis_name=self.start.axis_name,
        )
        return dict(zip(old, new, strict=True))


@dataclasses.dataclass(frozen=True)
class Redistributing:
    """Drops the smallest of every layer, and grows where the mean gradient is large."""

    start: Start
    fraction: Number | Schedule
    decay: Number | Schedule

    def init(self, params: dict[str, Array]) -> dict[str, Array]:
        """Returns means of zero."""
        return {p: trees.zeros(x) for p, x in params.items()}

    def track(self, now: Now) -> dict[str, Array]:
        """Takes a finite gradient into the means."""
        decay = trees.value_at(self.decay, now.step)

        moves = now.updates
        if not moves:
            return now.memory
        known = jnp.isfinite(norms.inf_norm(moves, axis_name=self.start.axis_name))

        def one(old, update):
            share = decay.astype(old.dtype)
            new = share * old + (1 - share) * jnp.asarray(update, old.dtype)
            return jnp.where(known, new, old)

        return now.memory | {p: one(now.memory[p], x) for p, x in moves.items()}

    def masks(self, now: Now, old: Masks) -> Masks:
        """Starts at random, then moves."""
        return jax.lax.cond(
            now.masks_made == 0,
            lambda: self.start.masks(now, old),
            lambda: self._moved(now, old),
        )

    def _moved(self, now: Now, old: Masks) -> Masks:
        axis_name, params = self.start.axis_name, list(now.params.values())
        sizes = [x.size * sharding.blocks(x, axis_name) for x in params]
        grown = [jnp.abs(now.memory[p]) for p in now.params]
        number = [masks.count(m, axis_name=axis_name) for m in old.values()]
        number = counts.of(jnp.stack(number))
        dropped = self._dropped(number, now)
        stay, all_dropped = number - dropped, counts.total(dropped)
        means = drop_grow.means(grown, list(old.values()), number, axis_name)
        parts = dropped.to_float() / jnp.maximum(all_dropped.to_float(), 1)
        shares = jnp.where(jnp.sum(means) > 0, means / jnp.sum(means), parts)
        room = counts.of(sizes) - stay
        added = drop_grow.redistributed(all_dropped, shares, room, sizes)
        groups = tuple(range(len(sizes)))
        new = drop_grow.moved(
            list(old.values()),
            params,
            grown,
            stay=stay,
            budget=Budget(counts.plus(stay, added), groups, (0,) * len(sizes)),
            axis_name=axis_name,
        )
        return dict(zip(old, new, strict=True))

    def _dropped(self, number: Count, now: Now) -> Count:
        """Returns how many every layer drops: not the last one."""
        dropped = drop_grow.part_of(number, trees.value_at(self.fraction, now.step))
        one = counts.of(jnp.ones_like(number.low))
        return counts.clip(dropped, counts.of(jnp.zeros_like(number.low)), number - one)
