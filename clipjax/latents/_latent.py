"""Dense weights in the optimizer's state, sparse ones in the network."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .. import allocations, masks, norms, patterns, scores
from .._core import checks as check, emit, trees
from .._core.eager import compiled
from .._core.types import AxisName, Number, Schedule, Where
from .._sparsity._store import SparsifyState
from ._masks import Masking, kept_of
from ._reparametrizations import Reparametrization, straight_through
from ._step import Step


class LatentState(NamedTuple):
    """What `latent` remembers; the dicts are keyed by path."""

    latent_masks: SparsifyState  # without bits, if only the curve makes zeros
    latents: dict[str, Array]  # like their parameters, float32 or wider
    levels: dict[str, Float[Array, ""]]  # learned; empty if the curve has none
    fixed_thresholds: dict[str, Float[Array, ""]]  # empty if a sparsity is given
    explored_bits: dict[str, Array]  # empty if all entries get a gradient
    latent_inner: Any

    keeps_zeros = True


def latent(
    inner: optax.GradientTransformation,
    sparsity: Number | Schedule | None,
    *,
    reparametrization: Reparametrization = straight_through(),  # noqa: B008 -- frozen
    score: scores.Score | scores.Tracked = scores.magnitude,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation = allocations.uniform,
    every: Number | Schedule = 1,
    where: Where = masks.weights,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes dense weights that only the optimizer knows; the network is sparse.

    zₜ₊₁ = zₜ + inner(∂zₜ; zₜ), θₜ₊₁ = mₜ₊₁ ⊙ ψ(zₜ₊₁)

    What is pruned goes on learning, and returns once it is large enough.  The
    reparametrization says what ψ is, how a gradient at θ becomes one of z, and how
    masks change: straight-through, SR-STE, Top-KAST, dynamic network surgery, soft
    thresholds, power propagation.

    Wraps the optimizer, which sees the latent weights for parameters: weight decay
    draws on them.  Nothing may follow that changes the update.  Parameters without a
    mask are stepped by `inner` as usual.  Where ψ learns a number for each leaf,
    `inner` sees a pair: the tree, and these numbers by path.

    `optax.apply_updates` gives exactly 0.0 where θ is, in every dtype; elsewhere θ as
    the parameter's dtype has it, but for the rounding of θₜ + (θₜ₊₁ - θₜ), which the
    next step makes good.

    Masks are made at the end of a step, from the new latent weights: after step t the
    sparsity is s(t).  `init` makes the first, by magnitude, for the gradient of step 0,
    but cannot change parameters: without `latents.sparse_params(state, params)` that is
    the gradient of a dense network.  `latents.latent_params` returns the dense weights.

    A step with a NaN or an infinity in the gradient is none: all stays as it was, and
    so does the schedule of the sparsity.  A latent weight that would not be finite
    stays where it is, and one whose parameter is not at the start is zero.

    Memory beside `inner`: a copy of the parameters in float32 or wider, and one bit or
    byte a parameter, by `storage`; two with a backward sparsity.  An update narrower
    than its parameter leaves in the parameter's dtype.  Under `jax.vmap` masks are made
    in every step.

    Args:
        inner: the optimizer; sees gradients of the latents' dtype.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule; `None` where the reparametrization
            sets zeros by thresholds of its own.
        reparametrization: from `reparametrizations`.
        score: a function of ψ(z) and its gradient at θ, the highest to keep, or a value
            that remembers, as `scores.Movement(gradients=True)`.
        pattern: in what shape zeros come, from `patterns`.
        allocation: how the leaves share the sparsity, from `allocations`.
        every: steps between two masks, ≥ 1, rounded down; or a schedule of them.
        where: which leaves are made sparse, by path and leaf; floating leaves of rank 2
            or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, and what is explored with it.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation asks for shapes.

    Example:
        >>> from clipjax import latent
        >>> from clipjax.latents import sparse_params
        >>> tx = latent(optax.sgd(1.0), 0.5)
        >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
        >>> state = tx.init(params)
        >>> params = sparse_params(state, params)
        >>> params["kernel"]
        Array([[ 3.,  0.],
               [-2.,  0.]], dtype=float32)
        >>> grads = {"kernel": jnp.array([[0.0, -2.0], [0.0, 0.0]])}
        >>> updates, state = tx.update(grads, state, params)
        >>> optax.apply_updates(params, updates)["kernel"]  # of 3, 3, -2 and 0.5
        Array([[3., 3.],
               [0., 0.]], dtype=float32)

    Reference:
        Dense weights behind sparse ones are from Yiwen Guo, Anbang Yao, Yurong Chen,
        Dynamic Network Surgery for Efficient DNNs, 2016,
        https://arxiv.org/abs/1608.04493; each method names its own.
    """
    check.has_method("update", inner=inner)
    check.one_of(Reparametrization, reparametrization=reparametrization)
    check.function(where=where)
    masking = Masking(
        sparsity,
        reparametrization,
        score,
        pattern,
        allocation,
        every,
        storage,
        axis_name,
    )
    stepping = Step(
        optax.with_extra_args_support(inner), reparametrization, score, axis_name
    )

    def init(params):
        leaves = trees.chosen(params, where)
        start = stepping.first(params, leaves)
        weights = {p: stepping.weights(start, p) for p in leaves}
        makes = masking.here()
        thresholds = makes.thresholds(weights)
        masked, explored = makes.first(weights, thresholds, start.memory)
        return LatentState(
            masked,
            start.latents,
            start.levels,
            thresholds,
            explored,
            start.inner,
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params("latent", params)
        slopes, leaves = trees.floats(updates), trees.floats(params)
        known = jnp.isfinite(norms.inf_norm(updates, axis_name=axis_name))
        moved, others = stepping.take(known, updates, state, params, extra_args)
        weights = {p: stepping.weights(moved, p) for p in state.latents if p in slopes}
        tracked = state.latent_masks._replace(score_memory=moved.memory)
        masked, explored = masking.next(
            known, state._replace(latent_masks=tracked), weights, slopes
        )

        def emitted(update, param, weight, path):
            mask = kept_of(masked, path, weight)
            return emit.step_to(update, param, masks.apply(mask, weight))

        outgoing = trees.map_by_path(lambda _, other: other, updates, others)
        paths = {path: path for path in weights}
        outgoing = trees.map_by_path(emitted, outgoing, leaves, weights, paths)
        new_state = LatentState(
            masked,
            moved.latents,
            moved.levels,
            state.fixed_thresholds,
            explored,
            moved.inner,
        )
        return outgoing, new_state

    return optax.GradientTransformationExtraArgs(init, compiled(update))
