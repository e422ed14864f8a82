"""Sparse from the first step on: masks that start at random, and may move."""

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
    allocation: Allocation = allocations.erdos_renyi_kernel,
    where: Where = masks.weights,
    storage: masks.Storage = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a random part of the network, the same from the first step to the last.

    m = the k highest of random scores;  u ← inner(m⊙g, m⊙θ),  uᵢ ← -θᵢ where mᵢ = 0

    The baseline for `rigl` and the others, and strong with more width.  Masks depend on
    the key and on the paths and shapes of leaves, but not on devices.  What is said of
    `inner` and of exact zeros in `sparse` holds here too.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number or a traced value.
        key: of the random masks.
        allocation: how the leaves share the sparsity, from `allocations`; by shapes,
            since there are no scores yet.
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
        allocation: how the leaves share the sparsity, from `allocations`; by shapes,
            since there are no scores yet.
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
               [ 0.,  0.,  5., -3.]], dtype=float32)

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

    start = AtRandom(sparsity, key, allocation, axis_name)
    rule = Moving(start, annealed(drop_fraction, end), by_gradient=True)
    store = Store(_until(end, every), where, storage, axis_name)
    check.at_least(1, every=every)
    return masked(inner, rule, store, name="rigl", elementwise=elementwise)


def _until(end, every):
    """Returns the steps between two moves, endless from the end on."""

    def value(step):
        goes_on = step.astype(jnp.float32) < end()
        return jnp.where(goes_on, trees.value_at(every, step), jnp.inf)

    return value
