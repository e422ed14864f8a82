"""Parameters that come out exactly sparse: the projection at the end of a chain."""

from __future__ import annotations

import optax

from .. import allocations, masks, patterns, scores
from .._core import checks as check, emit, trees
from .._core.eager import compiled
from .._core.types import AxisName, Number, Schedule, Where
from ._ranked import Now, Ranked
from ._store import Store, is_due


def sparsify(
    sparsity: Number | Schedule,
    *,
    score: scores.Score | scores.Tracked | None = None,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation | None = None,
    every: Number | Schedule = 1,
    where: Where | None = None,
    storage: masks.Storage = masks.Bits(),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the highest-scoring parameters and sets the rest to exactly zero.

    uᵢ ← -θᵢ where mᵢ = 0, m = pattern(score(θ, u), s(t))

    Use it last in a chain: `optax.apply_updates` then gives θ + (-θ) = 0.0, bit for
    bit, in every dtype.  Anything after it in the chain would move the zeros.

    A mask is made from the parameters at the start of a step, and is used until `every`
    steps are over, or until a schedule of the sparsity comes to rest: after as many
    updates as a ramp has steps its end is met, whatever `every` is.  (Not if
    `optax.inject_hyperparams` evaluates it, which hands on a number.)  If a wrapper
    discards the step that makes a mask, the next step makes it.  With a magnitude score
    a pruned entry stays pruned unless the sparsity falls.  A NaN ranks lowest, but
    NaN + (-NaN) is NaN: it stays NaN.

    An update that is narrower than its parameter is returned in the parameter's dtype,
    since a rounded -θ would not cancel θ.  `optax.apply_if_finite` refuses such a
    change of dtype: cast the gradients before the chain.

    State beside the score's memory: one bit a parameter with `masks.Bits()`, one byte
    with `masks.Booleans()`, nothing with `masks.Zeros()`.  With the last, a kept entry
    that is exactly zero stays zero until the next mask.  On a mesh with explicit axes,
    a leaf whose last axis is split into pieces that are no multiple of eight takes a
    byte an entry; with automatic axes, its bits are gathered.

    Under `jax.vmap` both branches of a condition run, so every step searches for a
    mask: use `jax.lax.map` for a population with a large `every`.

    Args:
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.  At least that share is zero, unless
            the floors of the allocation keep more.
        score: a function of a parameter and its update that returns the score of every
            entry, from `scores`; or one that remembers, such as `scores.Movement()`,
            which sees every step whose update is finite; by default
            `scores.magnitude`.
        pattern: in what shape zeros come, from `patterns`; or a function from path and
            leaf to a pattern: the leaves of each pattern then meet the sparsity by
            themselves.
        allocation: how the leaves share the sparsity, from `allocations`; by default
            `square_root`, which lets larger ones be sparser.
        every: the number of steps between two masks, ≥ 1, rounded down; or a schedule
            of it.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = optax.chain(optax.sgd(0.5), clipjax.sparsify(0.5))
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
        >>> grads = {"kernel": jnp.ones((2, 2))}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 2.5,  0. ],
               [ 0. , -4.5]], dtype=float32)

    Reference:
        Michael Zhu, Suyog Gupta, To Prune, or Not to Prune: Exploring the Efficacy of
        Pruning for Model Compression, 2017, https://arxiv.org/abs/1710.01878
    """
    score = scores.magnitude if score is None else score
    allocation = allocations.square_root if allocation is None else allocation
    where = masks.weights if where is None else where
    rule = Ranked(sparsity, score, pattern, allocation, axis_name)
    store = Store(every, where, storage, axis_name, sparsity)

    def init(params):
        return store.init(params, rule.init(trees.chosen(params, where)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("sparsify", params)
        before, moves = trees.unboxed(state), trees.floats(updates)
        leaves = store.leaves(params, before)
        leaves = {p: x for p, x in leaves.items() if p in moves}
        now = Now(leaves, moves, before.score_memory, before.step)
        now = now._replace(memory=rule.track(now))
        read, after, _, _ = store.change(
            before._replace(score_memory=now.memory),
            leaves,
            is_due(before, store.every, store.sparsity),
            lambda old, _: (rule.masks(now, old), ()),
        )
        outgoing = trees.map_by_path(emit.kept, updates, leaves, read())
        return outgoing, trees.boxed_as(after, state)

    return optax.GradientTransformationExtraArgs(init, compiled(update))
