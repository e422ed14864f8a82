"""Sparse from the first step on: masks that start at random, and may move."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from .. import allocations, masks
from .._core import checks as check, trees
from .._core.types import AxisName, Number, Schedule, Where
from ..allocations import Allocation
from ._engine import masked
from ._moving import AtRandom, Moving, RandomKey, annealed
from ._store import Store, check_storage


def static_sparse(
    inner: optax.GradientTransformation,
    sparsity: Number,
    *,
    key: RandomKey,
    allocation: Allocation | None = None,
    where: Where | None = None,
    storage: masks.Storage = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a random part of the parameters, the same part from first step to last.

    m = the k highest of random scores;  u ← inner(m⊙g, m⊙θ),  uᵢ ← -θᵢ where mᵢ = 0

    Use it as the baseline for `rigl`, and for wide networks, where it is strong.

    Masks are the same on every mesh, except inside `jax.shard_map`.  What `sparse` says
    of `inner` and of exact zeros holds here too.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.
        key: the key of the random masks.
        allocation: how the leaves share the sparsity, from `allocations`; one that
            reads shapes, since there are no scores yet.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        elementwise: the promise that `inner` treats each entry by itself, as in
            `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.static_sparse(optax.sgd(0.1), 0.75, key=jax.random.key(0))
        >>> params = {"kernel": jnp.ones((2, 4))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> (optax.apply_updates(params, updates)["kernel"] == 0).sum()
        Array(6, dtype=int32)

    Reference:
        Shiwei Liu, Tianlong Chen, Xiaohan Chen, Li Shen, Decebal Constantin Mocanu,
        Zhangyang Wang, Mykola Pechenizkiy, The Unreasonable Effectiveness of Random
        Pruning, 2022, https://arxiv.org/abs/2202.02643
    """
    allocation = allocations.erdos_renyi_kernel if allocation is None else allocation
    where = masks.weights if where is None else where
    rule = AtRandom(sparsity, key, allocation, axis_name)
    store = Store(jnp.inf, where, storage, axis_name)
    return masked(inner, rule, store, name="static_sparse", elementwise=elementwise)


def rigl(
    inner: optax.GradientTransformation,
    sparsity: Number | Schedule,
    *,
    total_steps: Number,
    key: RandomKey,
    every: Number | Schedule = 100,
    drop_fraction: Number | Schedule = 0.3,
    stop: Number = 0.75,
    allocation: Allocation | None = None,
    where: Where | None = None,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse from the start, and moves connections to large gradients (RigL).

    Every ΔT steps while t < T = stop·total_steps, in each layer with k connections:
    drop the ⌊f·k⌋ with the smallest |θ|, f = α/2·(1 + cos(πt/T)), then grow as many
    elsewhere, those with the largest |g|.

    Use it where no dense network fits: gradients of pruned entries are read only in the
    steps that move connections, and every layer has its exact number at all times.

    The first mask is random.  A grown connection starts at zero, with the moments of
    `inner.init`; one that is dropped and grown at once keeps value and moments.  In the
    paper the step of a move trains nothing; here `inner` takes it too, with the new
    masks.  Masks are always stored, since a grown connection is zero until its first
    step.  A step with a NaN or an infinity in the gradients of the selected leaves
    moves nothing; the move is made up for, also if a wrapper discards the step.  What
    `sparse` says of `inner` and of exact zeros holds here too.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        total_steps: the number of steps of the whole training.
        key: the key of the first mask.
        every: ΔT ≥ 1, the number of steps between two moves, rounded down; or a
            schedule of it.
        drop_fraction: α in [0, 1], the first share of connections that move; or a
            schedule of it.
        stop: the share of the training after which masks stay as they are.
        allocation: how the leaves share the sparsity, from `allocations`; one that
            reads shapes, since there are no scores yet.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        elementwise: the promise that `inner` treats each entry by itself, as in
            `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> key = jax.random.key(0)
        >>> tx = clipjax.rigl(
        ...     optax.sgd(1.0), 0.75, total_steps=99, key=key, every=2, drop_fraction=1
        ... )
        >>> update = jax.jit(tx.update)
        >>> params = {"kernel": jnp.full((2, 4), 8.0)}
        >>> grads = {"kernel": jnp.array([[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0]])}
        >>> state = tx.init(params)
        >>> for _ in range(3):  # two steps, and one after a move of one connection
        ...     updates, state = update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params["kernel"]
        Array([[ 0.,  0.,  0.,  0.],
               [ 0.,  0.,  5., -3.]], dtype=float32)

    Reference:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging
        the Lottery: Making All Tickets Winners, 2020, https://arxiv.org/abs/1911.11134
    """
    allocation = allocations.erdos_renyi_kernel if allocation is None else allocation
    where = masks.weights if where is None else where
    check.number(stop=stop, total_steps=total_steps)
    check.between(0, 1, drop_fraction=drop_fraction, stop=stop)
    check.positive(total_steps=total_steps)
    check_storage("rigl", storage)

    def end():
        return jnp.asarray(stop, jnp.float32) * jnp.asarray(total_steps, jnp.float32)

    start = AtRandom(sparsity, key, allocation, axis_name)
    rule = Moving(start, annealed(drop_fraction, end), by_gradient=True)
    store = Store(_until(end, every), where, storage, axis_name, sparsity)
    check.at_least(1, every=every)
    return masked(inner, rule, store, name="rigl", elementwise=elementwise)


def _until(end, every):
    """Returns the steps between two moves, endless from the end on."""

    def value(step):
        goes_on = step.astype(jnp.float32) < end()
        return jnp.where(goes_on, trees.value_at(every, step), jnp.inf)

    return value
