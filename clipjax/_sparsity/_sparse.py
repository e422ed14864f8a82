"""Sparsity around an optimizer, from which it hides what is pruned."""

from __future__ import annotations

import optax

from .. import allocations, masks, patterns, scores
from .._core.types import AxisName, Number, Schedule, Where
from ._engine import masked
from ._ranked import Ranked, check_sees_gradients
from ._store import Store


def sparse(
    inner: optax.GradientTransformation,
    sparsity: Number | Schedule,
    *,
    score: scores.Score | scores.Tracked | None = None,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation | None = None,
    every: Number | Schedule = 1,
    where: Where | None = None,
    storage: masks.Storage = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the highest-scoring parameters, and hides the rest from the optimizer.

    m = pattern(score(θ, g), s(t)),  u ← inner(m⊙g, m⊙θ),  uᵢ ← -θᵢ where mᵢ = 0

    Use it in place of `sparsify` where scores should see raw gradients, or where pruned
    parameters should leave no trace in moments and norms.  It wraps the optimizer;
    nothing may follow it in the chain.

    `inner` sees zeros where parameters are pruned.  With a new mask, what `inner`
    remembers of entries that this mask or the last one prunes is reset to its state
    after `inner.init`: an entry that returns starts anew.  (So does a kept one that is
    exactly zero.)  Between two masks Adam and momentum leave these memories alone;
    centralized gradients and noise move them.

    The memory of a parameter is found by shape and path: the floating arrays in the
    state of `inner` that have the parameter's shape and whose path ends in the
    parameter's.  Others, such as Adafactor's means of rows and columns or the vector of
    `optax.flatten`, are not reset: they fade, since they too see zeros.

    `elementwise=True` is faster, and gives the same parameters, if each entry of the
    update of `inner` depends on that entry alone and its memory is found as above: SGD,
    Adam, AdamW, Lion.  `inner` then sees everything, and its memory of a pruned entry
    means nothing (it may be NaN) until the entry returns.  Do not use it with a clip by
    norm, `optax.apply_if_finite`, Adafactor, LAMB, Muon or `optax.flatten`.

    Masks, storage, dtypes and due steps are those of `sparsify`, but a step with a NaN
    or an infinity in the gradient of a selected leaf makes no mask; the next one does.
    It still reaches `inner`, in whose moments it may stay for ever, as without masks:
    `clipjax.skip_spikes` or `optax.apply_if_finite`, around all of it, leaves it out.

    Donate the state (`jax.jit(step, donate_argnums=...)`) or step inside a scan, or XLA
    copies the moments in every step.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        score: a function of a parameter and its gradient that returns the score of
            every entry; or one that remembers, such as
            `scores.Movement(gradients=True)`; by default
            `scores.magnitude`.
        pattern: in what shape zeros come, from `patterns`; or a function from path and
            leaf to a pattern: the leaves of each pattern then meet the sparsity by
            themselves.
        allocation: how the leaves share the sparsity, from `allocations`;
            by default `square_root`.
        every: the number of steps between two masks, ≥ 1, rounded down; or a schedule
            of it.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        elementwise: the promise that `inner` treats each entry by itself.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.sparse(optax.sgd(0.5, momentum=0.9), 0.5)
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
        >>> grads = {"kernel": jnp.ones((2, 2))}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 2.5,  0. ],
               [ 0. , -4.5]], dtype=float32)
        >>> optax.tree.get(state, "trace")["kernel"]
        Array([[1., 0.],
               [0., 1.]], dtype=float32)

    Reference:
        Michael Zhu, Suyog Gupta, To Prune, or Not to Prune: Exploring the Efficacy of
        Pruning for Model Compression, 2017, https://arxiv.org/abs/1710.01878
    """
    score = scores.magnitude if score is None else score
    allocation = allocations.square_root if allocation is None else allocation
    where = masks.weights if where is None else where
    check_sees_gradients(score)
    rule = Ranked(sparsity, score, pattern, allocation, axis_name)
    store = Store(every, where, storage, axis_name, sparsity)
    return masked(inner, rule, store, name="sparse", elementwise=elementwise)
