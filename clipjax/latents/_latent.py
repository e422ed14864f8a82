"""Dense weights in the optimizer's state, sparse ones in the network."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .. import allocations, masks, norms, patterns, scores
from .._core import checks as check, emit, trees
from .._core.eager import compiled
from .._core.types import AxisName, Number, Schedule, Where
from .._sparsity._ranked import check_memory
from .._sparsity._store import Leaves, SparsifyState, as_kept, check_masks, chosen
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
    score: scores.Score | scores.Tracked | None = None,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation | None = None,
    every: Number | Schedule = 1,
    where: Where | None = None,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights in the optimizer's state, behind sparse parameters.

    zₜ₊₁ = zₜ + inner(∂zₜ; zₜ), θₜ₊₁ = mₜ₊₁ ⊙ ψ(zₜ₊₁)

    Use it where pruned weights should go on learning and return when they are large
    enough: the most accurate way to a high sparsity, at the price of a dense copy.  The
    reparametrization says what ψ is, how a gradient at θ becomes one of z, and how
    masks change.

    It wraps the optimizer, which sees the latent weights z as its parameters: weight
    decay acts on them.  Nothing after it may change the update.  Leaves without a mask
    are stepped by `inner` as usual.  Where ψ learns a number for each leaf, `inner`
    sees a pair: the tree, and these numbers by path.

    `optax.apply_updates` gives exactly 0.0 where θ is zero, in every dtype.  Elsewhere
    it gives θ in the parameter's dtype, apart from the rounding of θₜ + (θₜ₊₁ - θₜ),
    which the next step corrects.

    Masks are made at the end of a step, from the new latent weights: after step t the
    sparsity is s(t).  `init` makes the first mask by magnitude, but cannot change the
    parameters: call `latents.sparse_params(state, params)` before the first step, or
    its gradient is that of the dense network.  `latents.latent_params` returns z.

    A step with a NaN or an infinity in the gradient changes nothing, not even the step
    of the schedule.  A latent weight that would not be finite stays where it is; one
    whose parameter is not finite at the start is zero.

    State beside that of `inner`: a copy of the parameters in float32 or wider, and one
    mask, or two with a backward sparsity.  An update that is narrower than its
    parameter is returned in the parameter's dtype.  Under `jax.vmap` every step makes
    masks.

    Args:
        inner: the optimizer, which sees gradients in the dtype of the latent weights.
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.  `None` where the
            reparametrization has thresholds of its own.
        reparametrization: how weights follow from latent ones, from `latents`.
        score: a function of ψ(z) and its gradient at θ that returns the score of every
            entry; or one that remembers, such as `scores.Movement(gradients=True)`; by
            default `scores.magnitude`.
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
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.latent(optax.sgd(1.0), 0.5)
        >>> params = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}
        >>> state = tx.init(params)
        >>> params = clipjax.latents.sparse_params(state, params)
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
    score = scores.magnitude if score is None else score
    allocation = allocations.square_root if allocation is None else allocation
    where = masks.weights if where is None else where
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
        leaves = chosen(params, where)
        start = stepping.first(params, leaves)
        weights = {p: stepping.weights(start, p) for p in leaves}
        makes = masking.here()
        thresholds = makes.thresholds(weights)
        masked, explored = makes.first(weights, thresholds, start.memory)
        keep = functools.partial(trees.remembered, params)
        return LatentState(
            as_kept(params, masked),
            keep(start.latents),
            start.levels,
            keep(thresholds),
            keep(explored),
            start.inner,
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params("latent", params)
        boxes, state = state, _unboxed(state)
        chosen_now = trees.chosen(trees.float_arrays(params), where)
        _check(state, chosen_now, masking)
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

        outgoing = trees.replaced(updates, others)
        paths = {path: path for path in weights}
        outgoing = trees.map_by_path(emitted, outgoing, leaves, weights, paths)
        after = LatentState(
            masked,
            moved.latents,
            moved.levels,
            state.fixed_thresholds,
            explored,
            (),
        )
        after = trees.boxed_as(after, boxes._replace(latent_inner=()))
        return outgoing, after._replace(latent_inner=moved.inner)

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _check(state: LatentState, leaves: Leaves, masking: Masking) -> None:
    """Raises where a state was made of other parameters, or with other arguments."""
    rule, masked = masking.rule, state.latent_masks
    check_masks(masked, leaves, masking.storage if masking.stores else None)
    check_memory(masking.score, masked.score_memory, leaves)
    has_explored = rule.backward_sparsity is not None
    explored = leaves if has_explored else {}
    check.same_paths("mask of gradients", state.explored_bits, explored)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    for path, x in leaves.items():
        level = None if rule.curve.level is None else number
        threshold = None if rule.threshold is None else number
        for kept, entries, kind in (
            ("latent weight", state.latents, x),
            ("learned level", state.levels, level),
            ("fixed threshold", state.fixed_thresholds, threshold),
        ):
            check.same_kind(kept, path, entries.get(path), kind)


def _unboxed(state: LatentState) -> LatentState:
    """Returns a state with plain arrays in all that is not the optimizer's."""
    own = trees.unboxed(state._replace(latent_inner=()))
    return own._replace(latent_inner=state.latent_inner)
