"""Sparse from the first step on: masks that start at random, and may move.

Four published methods.  They differ in whether masks move, in where new connections
grow, and in whether a layer keeps its number of them.
"""

import jax.numpy as jnp
import optax

from .. import allocations, masks
from .._core import checks as check, trees
from .._core.types import AxisName, Number, Schedule, Where
from ..allocations import Allocation
from ._engine import masked
from ._moving import (
    Moving,
    RandomKey,
    Redistributing,
    Start,
    gradient_growth,
    random_growth,
)
from ._store import Store, check_storage


def static_sparse(
    inner: optax.GradientTransformation,
    sparsity: Number,
    *,
    key: RandomKey,
    allocation: Allocation = allocations.erdos_renyi_kernel,
    where: Where = masks.weights,
    storage: masks.Storage = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a random part of the network, the same from the first step to the last.

    m = the k highest of random scores;  u ← inner(m⊙g, m⊙θ),  uᵢ ← -θᵢ where mᵢ = 0

    The baseline for `rigl` and the others, and strong with more width.  Masks do not
    depend on the devices, except inside `jax.shard_map`.  What is said of `inner` and
    of exact zeros in `sparse` holds here too.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.
        key: of the random masks.
        allocation: how the leaves share the sparsity, from `allocations`.
        where: which leaves are made sparse, by path and leaf.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself; see `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax
        >>> tx = static_sparse(optax.sgd(0.1), 0.75, key=jax.random.key(0))
        >>> params = {"kernel": jnp.ones((2, 4))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> (optax.apply_updates(params, updates)["kernel"] == 0).sum()
        Array(6, dtype=int32)

    Reference:
        Shiwei Liu, Tianlong Chen, Xiaohan Chen, Li Shen, Decebal Constantin Mocanu,
        Zhangyang Wang, Mykola Pechenizkiy, The Unreasonable Effectiveness of Random
        Pruning, 2022, https://arxiv.org/abs/2202.02643
    """
    rule = Start(sparsity, key, allocation, axis_name)
    store = Store(jnp.inf, where, storage, axis_name)
    return masked(inner, rule, store, name="static_sparse", elementwise=elementwise)


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
        allocation: how the leaves share the sparsity, from `allocations`.
        where: which leaves are made sparse, by path and leaf.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself; see `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax
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
    start = Start(sparsity, key, allocation, axis_name)
    rule = Moving(start, drop_fraction, random_growth)
    store = Store(every, where, storage, axis_name)
    return masked(
        inner, rule, store, name="sparse_evolutionary", elementwise=elementwise
    )


def rigl(
    inner: optax.GradientTransformation,
    sparsity: Number | Schedule,
    *,
    total_steps: Number,
    key: RandomKey,
    every: Number | Schedule = 100,
    drop_fraction: Number | Schedule = 0.3,
    stop: Number = 0.75,
    allocation: Allocation = allocations.erdos_renyi_kernel,
    where: Where = masks.weights,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Moves connections to where the gradient is large (RigL).

    Every ΔT steps while t < T = stop·total_steps, in each layer with k connections:
    drop the ⌊f·k⌋ with the smallest |θ|, f = α/2·(1 + cos(πt/T)), then grow as many
    elsewhere, those with the largest |g|.

    The first mask is random.  Grown connections start at zero and with the moments that
    `inner.init` gives; those that are dropped and grown at once keep both.  The paper
    gives the step of a move to nothing else; here `inner` takes it too, with the new
    masks, so no batch is lost.  Between two moves gradients of what is pruned are read
    by nobody, and the number of connections of every layer is exact at all times.

    A grown connection is zero until its first step, and so masks are always stored.  A
    step with a NaN or an infinity in the gradients of the selected leaves moves
    nothing; the move stays due, also if a wrapper discards the step.  What is said of
    `inner` and of exact zeros in `sparse` holds here too.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        total_steps: of the whole training.
        key: of the first mask.
        every: ΔT ≥ 1, steps between two moves, rounded down; or a schedule of them.
        drop_fraction: α in [0, 1], or a schedule of it.
        stop: after which share of the training masks stay as they are.
        allocation: how the leaves share the sparsity, from `allocations`.
        where: which leaves are made sparse, by path and leaf; floating leaves of rank 2
            or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself; see `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> tx = rigl(
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
               [ 5.,  0.,  0., -3.]], dtype=float32)

    Reference:
        Utku Evci, Trevor Gale, Jacob Menick, Pablo Samuel Castro, Erich Elsen, Rigging
        the Lottery: Making All Tickets Winners, 2020, https://arxiv.org/abs/1911.11134
    """
    check.number(stop=stop, total_steps=total_steps)
    check.between(0, 1, drop_fraction=drop_fraction, stop=stop)
    check.positive(total_steps=total_steps)
    check_storage("rigl", storage)

    def end():
        return jnp.asarray(stop, jnp.float32) * jnp.asarray(total_steps, jnp.float32)

    start = Start(sparsity, key, allocation, axis_name)
    rule = Moving(start, _annealed(drop_fraction, end), gradient_growth)
    store = Store(_until(end, every), where, storage, axis_name)
    check.at_least(1, every=every)
    return masked(inner, rule, store, name="rigl", elementwise=elementwise)


def sparse_momentum(
    inner: optax.GradientTransformation,
    sparsity: Number,
    *,
    total_steps: Number,
    key: RandomKey,
    every: Number | Schedule = 100,
    drop_fraction: Number | Schedule = 0.5,
    decay: Number | Schedule = 0.9,
    allocation: Allocation = allocations.uniform,
    where: Where = masks.weights,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Moves connections to where gradients agree, also between layers (SNFS).

    M ← d·M + (1 - d)·g at every step.  Every ΔT steps: in each layer drop the ⌊f·kₗ⌋
    connections with the smallest |θ|, f = p/2·(1 + cos(πt/T)), T = total_steps.  Of all
    that was dropped, layer l grows the share M̄ₗ/ΣM̄, where M̄ₗ is the mean |M| of its
    connections; they grow where |M| is largest.

    The number of connections of all layers together is exact and never changes: what a
    full layer cannot take goes to the largest that has room.  A layer keeps one at
    least.  All else is as in `rigl`; published is one epoch for ΔT.

    Memory: M, in float32 or wider, one more copy of the selected leaves; the momentum
    of `inner` does not see gradients of what is pruned.  A gradient with a NaN or an
    infinity does not enter M.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.
        total_steps: of the whole training.
        key: of the first mask.
        every: ΔT ≥ 1, steps between two moves, rounded down; or a schedule of them.
        drop_fraction: p in [0, 1], or a schedule of it.
        decay: d in [0, 1), or a schedule of it.
        allocation: how the leaves share the sparsity at first, from `allocations`.
        where: which leaves are made sparse, by path and leaf.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself; see `sparse`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> tx = sparse_momentum(
        ...     optax.sgd(0.1), 0.5, total_steps=10, key=key, every=1
        ... )
        >>> update = jax.jit(tx.update)
        >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((2, 4))}
        >>> grads = {"a": jnp.ones((2, 4)), "b": jnp.zeros((2, 4))}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     _, state = update(grads, state, params)
        >>> {p: float(share) for p, share in state.sparse.leaf_sparsity.items()}
        {'a': 0.375, 'b': 0.625}

    Reference:
        Tim Dettmers, Luke Zettlemoyer, Sparse Networks from Scratch: Faster Training
        without Losing Performance, 2019, https://arxiv.org/abs/1907.04840
    """
    check.between(0, 1, drop_fraction=drop_fraction)
    check.below_one(decay=decay)
    check.number(total_steps=total_steps)
    check.positive(total_steps=total_steps)
    check_storage("sparse_momentum", storage)
    start = Start(sparsity, key, allocation, axis_name)
    fraction = _annealed(drop_fraction, lambda: jnp.asarray(total_steps, jnp.float32))
    store = Store(every, where, storage, axis_name)
    rule = Redistributing(start, fraction, decay)
    return masked(inner, rule, store, name="sparse_momentum", elementwise=elementwise)


def _annealed(fraction, end):
    """Returns f/2·(1 + cos(πt/T)) as a schedule."""

    def value(step):
        share = jnp.clip(step.astype(jnp.float32) / end(), 0, 1)
        return trees.value_at(fraction, step) / 2 * (1 + jnp.cos(jnp.pi * share))

    return value


def _until(end, every):
    """Returns the steps between two moves, endless from the end on."""

    def value(step):
        goes_on = step.astype(jnp.float32) < end()
        return jnp.where(goes_on, trees.value_at(every, step), jnp.inf)

    return value
