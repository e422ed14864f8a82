"""Sparse evolutionary training (SET): the smallest connections move at random."""

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
    allocation: Allocation = allocations.erdos_renyi_kernel,
    where: Where = masks.weights,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the smallest connections by random ones, again and again (SET).

    Every ΔT steps, in each layer: drop the ⌊ζ·k⌋ of its k connections with the
    smallest |θ|, then grow as many anywhere else, chosen at random.

    Published are ζ = 0.3 and one epoch for ΔT, and the share ζ of the positive and of
    the negative weights apart; here signs do not count.  All else is as in `rigl`; no
    gradient is read for the masks.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        key: of the random masks.
        every: ΔT ≥ 1, steps between two moves, rounded down; or a schedule of them.
        drop_fraction: ζ in [0, 1], or a schedule of it.
        allocation: how the leaves share the sparsity, from `allocations`; by shapes,
            since there are no scores yet.
        where: which leaves are made sparse, by path and leaf.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself; see `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> tx = sparse_evolutionary(optax.sgd(0.1), 0.5, key=key, every=1)
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
    check.between(0, 1, drop_fraction=drop_fraction)
    check_storage("sparse_evolutionary", storage)
    start = AtRandom(sparsity, key, allocation, axis_name)
    rule = Moving(start, drop_fraction, by_gradient=False)
    store = Store(every, where, storage, axis_name)
    return masked(
        inner, rule, store, name="sparse_evolutionary", elementwise=elementwise
    )
