"""Sparsity around an optimizer, from which it hides what is pruned."""

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
    score: scores.Score | scores.Tracked = scores.magnitude,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation = allocations.uniform,
    every: Number | Schedule = 1,
    where: Where = masks.weights,
    storage: masks.Storage = masks.Bits(),
    elementwise: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with all but the parameters with the highest scores at zero, exactly.

    m = pattern(score(θ, g), s(t)),  u ← inner(m⊙g, m⊙θ),  uᵢ ← -θᵢ where mᵢ = 0

    `sparsify` around a whole optimizer instead of behind it.  Scores see the raw
    gradient.  `inner` sees zeros where parameters are pruned, and with a new mask it
    forgets what this or the last one hides: that memory is again what `inner.init`
    makes it, so a parameter that returns starts anew.  (So does one that is exactly
    zero.)  Between two masks the memory of what is pruned stays as it is with every
    optimizer that leaves it alone where gradient and parameter are zero, as Adam and
    momentum do, and counts in no norm; centralized gradients and noise do move it.

    Nothing of `inner` is known for that: its memory of a parameter are the floating
    arrays of its state that have the parameter's shape and a path that ends in the
    parameter's.  Other shapes, such as Adafactor's means of rows and columns or the
    vector of `optax.flatten`, are left alone: they fade, since they too see zeros.

    If each entry of `inner`'s update depends on that entry alone, and all that it
    remembers of it lies in such arrays, as with SGD, Adam, AdamW or Lion,
    `elementwise=True` gives the same parameters sooner: `inner` then sees everything,
    and what it remembers of pruned entries means nothing, and is NaN after a NaN there,
    until they return.  Not for a clip of a norm, `optax.apply_if_finite`, Adafactor,
    LAMB or Muon, which would feel what is pruned, nor for `optax.flatten`.

    Donate the state (`jax.jit(step, donate_argnums=...)`) or step inside a scan, or
    XLA copies the moments in every step.

    `optax.apply_updates` then gives exact zeros, so long as nothing follows in the
    chain.  Masks, their storage, dtypes and the step at which they are due are those of
    `sparsify`, with one exception: a step whose gradients of the selected leaves hold a
    NaN or an infinity makes no mask.  The mask stays due.

    Memory beside that of `inner`: one bit a parameter or none, by `storage`.

    Args:
        inner: the optimizer, or any chain with it; extra arguments are passed on.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.
        score: a function of a parameter and its gradient, the highest to keep, or a
            value that remembers, such as `scores.Movement(gradients=True)`.
        pattern: in what shape zeros come, from `patterns`.
        allocation: how the leaves share the sparsity, from `allocations`.
        every: steps between two masks, ≥ 1, rounded down; or a schedule of them.
        where: which leaves are made sparse, by path and leaf; floating leaves of rank 2
            or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps.
        elementwise: the promise that `inner` treats each entry by itself.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sparse(optax.sgd(0.5, momentum=0.9), 0.5)
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
    check_sees_gradients(score)
    rule = Ranked(sparsity, score, pattern, allocation, axis_name)
    store = Store(every, where, storage, axis_name)
    return masked(inner, rule, store, name="sparse", elementwise=elementwise)
