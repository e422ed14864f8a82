"""Sparse networks from scratch (SNFS): connections move between layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from .. import allocations, masks, norms
from .._core import checks as check, sharding, trees
from .._core.bits import mask_of
from .._core.types import AxisName, Number, Schedule, Where
from .._sparsity._engine import masked
from .._sparsity._moving import AtRandom, RandomKey, annealed, moved, part_of
from .._sparsity._ranked import Now
from .._sparsity._store import Leaves, Masks, Store, check_storage
from ..allocations import Allocation
from ..selection import _counts as counts
from ..selection._counts import Count


def sparse_momentum(
    inner: optax.GradientTransformation,
    sparsity: Number,
    *,
    total_steps: Number,
    key: RandomKey,
    every: Number | Schedule = 100,
    drop_fraction: Number | Schedule = 0.5,
    decay: Number | Schedule = 0.9,
    allocation: Allocation | None = None,
    where: Where | None = None,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from the start; moves connections to where gradients agree (SNFS).

    M ← d·M + (1 - d)·g at every step.  Every ΔT steps: in each layer drop the ⌊f·kₗ⌋
    connections with the smallest |θ|, f = p/2·(1 + cos(πt/T)), T = total_steps.  Of all
    that was dropped, layer l grows the share M̄ₗ/ΣM̄, where M̄ₗ is the mean |M| of its
    connections; they grow where |M| is largest.

    Use it where layers should find their shares of the connections themselves, and one
    more copy of the leaves fits.

    The number of connections of all layers together is exact and never changes: what a
    full layer cannot take goes to the largest one that has room.  Every layer keeps at
    least one.  The paper has ΔT of one epoch.  All else is as in `clipjax.rigl`.

    State: M, in float32 or wider, since the momentum of `inner` does not see gradients
    of pruned entries.  A gradient with a NaN or an infinity does not enter M.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.
        total_steps: the number of steps of the whole training.
        key: the key of the first mask.
        every: ΔT ≥ 1, the number of steps between two moves, rounded down; or a
            schedule of it.
        drop_fraction: p in [0, 1], the first share of connections that move; or a
            schedule of it.
        decay: d in [0, 1), of the mean of the gradients; or a schedule of it.
        allocation: how the leaves share the sparsity at first, from `allocations`; one
            that reads shapes, since there are no scores yet.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        elementwise: the promise that `inner` treats each entry by itself, as in
            `clipjax.sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> key = jax.random.key(0)
        >>> tx = clipjax.contrib.sparse_momentum(
        ...     optax.sgd(0.1), 0.5, total_steps=10, key=key, every=1
        ... )
        >>> update = jax.jit(tx.update)
        >>> params = {"a": jnp.ones((2, 4)), "c": jnp.ones((2, 4))}
        >>> grads = {"a": jnp.ones((2, 4)), "c": jnp.zeros((2, 4))}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     _, state = update(grads, state, params)
        >>> {p: float(share) for p, share in state.sparse.leaf_sparsity.items()}
        {'a': 0.375, 'c': 0.625}

    Reference:
        Tim Dettmers, Luke Zettlemoyer, Sparse Networks from Scratch: Faster Training
        without Losing Performance, 2019, https://arxiv.org/abs/1907.04840
    """
    allocation = allocations.uniform if allocation is None else allocation
    where = masks.weights if where is None else where
    check.between(0, 1, drop_fraction=drop_fraction)
    check.below_one(decay=decay)
    check.number(total_steps=total_steps)
    check.positive(total_steps=total_steps)
    check_storage("sparse_momentum", storage)
    start = AtRandom(sparsity, key, allocation, axis_name)
    fraction = annealed(drop_fraction, lambda: jnp.asarray(total_steps, jnp.float32))
    store = Store(every, where, storage, axis_name)
    rule = _Redistributing(start, fraction, decay)
    return masked(inner, rule, store, name="sparse_momentum", elementwise=elementwise)


@dataclasses.dataclass(frozen=True)
class _Redistributing:
    """Drops the smallest of every layer, and grows where the mean gradient is large."""

    start: AtRandom
    fraction: Schedule
    decay: Number | Schedule

    def init(self, params: Leaves) -> Leaves:
        """Returns means of zero."""
        return {p: trees.zeros(x) for p, x in params.items()}

    def track(self, now: Now) -> Leaves:
        """Takes a finite gradient into the means."""
        if not now.updates:
            return now.memory
        for path, x in now.updates.items():
            check.same_kind("mean gradient", path, now.memory.get(path), x)
        decay = trees.value_at(self.decay, now.step)
        peak = norms.inf_norm(now.updates, axis_name=self.start.axis_name)
        known = jnp.isfinite(peak)

        def one(old, update):
            share = decay.astype(old.dtype)
            new = share * old + (1 - share) * jnp.asarray(update, old.dtype)
            return jnp.where(known, new, old)

        return now.memory | {p: one(now.memory[p], x) for p, x in now.updates.items()}

    def masks(self, now: Now, old: Masks) -> Masks:
        """Starts at random, then moves."""
        means = {p: now.memory[p] for p in now.params}
        full = {p: mask_of(m) for p, m in old.items()}
        stay, added = self._numbers(now, full, means)
        first = self.start.kept(now)
        kept = jnp.where(now.masks_made == 0, first, stay + added)
        return moved(self.start, now, old, means, stay, kept)

    def _numbers(
        self, now: Now, old: Leaves, means: Leaves
    ) -> tuple[Int[Array, " arrays"], Int[Array, " arrays"]]:
        """Returns how many connections every layer keeps, and how many it grows."""
        axis_name = self.start.axis_name
        sizes = [m.size * sharding.blocks(m, axis_name) for m in old.values()]
        number = jnp.stack([masks.count(m, axis_name=axis_name) for m in old.values()])
        dropped = part_of(counts.of(number), trees.value_at(self.fraction, now.step))
        dropped = jnp.minimum(dropped.to_integer(), number - 1)  # one stays in each
        total = counts.total(counts.of(dropped))
        inside = _sums(means, old, axis_name) / jnp.maximum(number, 1).astype(
            jnp.float32
        )
        parts = counts.of(dropped).to_float() / jnp.maximum(total.to_float(), 1)
        shares = jnp.where(jnp.sum(inside) > 0, inside / jnp.sum(inside), parts)
        stay = number - dropped
        added = redistributed(total, shares, counts.of(sizes) - counts.of(stay), sizes)
        return stay, added.to_integer()


def _sums(means: Leaves, kept: Leaves, axis_name: AxisName) -> Float[Array, " arrays"]:
    """Returns of every array the sum of |M| over what the mask keeps, up to one scale.

    The largest of all is one, so that no sum overflows.
    """
    inside = [
        jnp.where(m, jnp.abs(means[p]), 0).astype(jnp.float32) for p, m in kept.items()
    ]
    peak = norms.inf_norm(inside, axis_name=axis_name)
    unit = jnp.where(peak > 0, peak, 1)
    sums = [sharding.over(lax.psum, jnp.sum(x / unit), x, axis_name) for x in inside]
    return jnp.stack(sums)


def redistributed(
    total: Count, shares: Float[Array, " arrays"], room: Count, sizes: Sequence[int]
) -> Count:
    """Splits a number in proportion to shares, exactly, within the room of each array.

    What rounding and full arrays leave over goes to the largest array that has room.
    """
    part = part_of(total, shares)
    parts = counts.filled(total, counts.where(room.at_least(part), part, room))
    rest = total - counts.total(parts)
    more = counts.filled(rest, room - parts, order=counts.largest_first(sizes))
    return counts.plus(parts, more)
