"""Sparse evolutionary training (SET): the smallest connections move at random."""

from __future__ import annotations

import optax

from .. import allocations, masks
from .._core import checks as check
from .._core.types import AxisName, Number, Schedule, Where
from .._sparsity._engine import masked
from .._sparsity._moving import AtRandom, Moving, RandomKey
from .._sparsity._store import Store, check_storage
from ..allocations import Allocation


def sparse_evolutionary(
    inner: optax.GradientTransformation,
    sparsity: Number | Schedule,
    *,
    key: RandomKey,
    every: Number | Schedule = 100,
    drop_fraction: Number | Schedule = 0.3,
    allocation: Allocation | None = None,
    where: Where | None = None,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from the start; replaces the smallest connections at random (SET).

    Every ΔT steps, in each layer: drop the ⌊ζ·k⌋ of its k connections with the
    smallest |θ|, then grow as many anywhere else, chosen at random.

    Use it where no dense gradient should be read for the masks; else prefer
    `clipjax.rigl`.

    The paper has ζ = 0.3 and ΔT of one epoch, and drops the share ζ of positive and of
    negative weights apart; here signs do not count.  All else is as in `clipjax.rigl`.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        key: the key of the random masks.
        every: ΔT ≥ 1, the number of steps between two moves, rounded down; or a
            schedule of it.
        drop_fraction: ζ in [0, 1], the share of connections that move; or a schedule of
            it.
        allocation: how the leaves share the sparsity, from `allocations`; one that
            reads shapes, since there are no scores yet.
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
        >>> tx = clipjax.contrib.sparse_evolutionary(
        ...     optax.sgd(0.1), 0.5, key=key, every=1
        ... )
        >>> update = jax.jit(tx.update)
        >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> (params["kernel"] != 0).sum()  # of 4, one has gone; the new one is at zero
        Array(3, dtype=int32)

    Reference:
        Decebal Constantin Mocanu, Elena Mocanu, Peter Stone, Phuong H. Nguyen,
        Madeleine Gibescu, Antonio Liotta, Scalable Training of Artificial Neural
        Networks with Adaptive Sparse Connectivity inspired by Network Science, 2018,
        https://arxiv.org/abs/1707.04780
    """
    allocation = allocations.erdos_renyi_kernel if allocation is None else allocation
    where = masks.weights if where is None else where
    check.between(0, 1, drop_fraction=drop_fraction)
    check_storage("sparse_evolutionary", storage)
    start = AtRandom(sparsity, key, allocation, axis_name)
    rule = Moving(start, drop_fraction, by_gradient=False)
    store = Store(every, where, storage, axis_name, sparsity)
    return masked(
        inner, rule, store, name="sparse_evolutionary", elementwise=elementwise
    )
