"""A penalty at the end of a chain: parameters become zero where it is minimal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from . import masks, prox, scopes
from ._core import checks as check, emit, sharding, trees
from ._core.eager import compiled
from ._core.types import AxisName, Number, Schedule, Where
from ._sparsity._store import chosen, shares_of_zeros

_UNITS = scopes.Unit()


class ProximalState(NamedTuple):
    """What `proximal` remembers; the dict is keyed by path."""

    step: Int[Array, ""]  # updates seen
    prox_leaf_sparsity: dict[str, Float[Array, ""]]  # share of zeros in each leaf
    prox_total_sparsity: Float[Array, ""]  # and in all of them

    keeps_zeros = True

    def measured(self) -> Iterator[tuple[str, Array]]:
        """Yields what `metrics` reads."""
        yield "sparsity", self.prox_total_sparsity
        for path, share in self.prox_leaf_sparsity.items():
            yield f"sparsity/{path}", share


def proximal(
    penalty: prox.Penalty,
    learning_rate: Number | Schedule,
    *,
    scope: scopes.Unit | scopes.Layer | scopes.Leaf = _UNITS,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a penalty to the loss by its proximal operator, which gives exact zeros.

    u ← prox_η(θ + u) - θ, prox_η(x) = argmin_z ½·‖z - x‖² + η·penalty(z)

    Use it last in a chain, where you know how strong a penalty should be and not how
    sparse the network should become.

    Where the operator is zero, the update is -θ: `optax.apply_updates` gives 0.0, bit
    for bit, in every dtype.  Where the operator changes nothing, the update passes
    unchanged.  Unlike under a mask, a zero returns as soon as a step leads far enough
    away from it.

    With plain SGD this is proximal gradient descent on loss plus penalty.  With Adam
    and the like the operator still uses the learning rate η for every entry, so λ is
    compared with updates of Adam's size and not with gradients, as in decoupled weight
    decay.

    A NaN or an infinity in θ + u stays, and counts as no zero.  In bfloat16 a parameter
    loses shrinkage below 2⁻⁹ of itself a step: keep parameters in float32.  An update
    that is narrower than its parameter is returned in the parameter's dtype.

    Args:
        penalty: the penalty, from `prox`; its numbers may be schedules.
        learning_rate: η ≥ 0, the learning rate of the optimizer; a number, a traced
            value or a schedule.
        scope: what is one group, for penalties on groups; by default the weights into
            one output of a layer, `scopes.Unit(axis=1)` for those out of one input.
        where: which leaves are penalized, by path and leaf; by default floating leaves
            of rank 2 or more that are no bias, scale or embedding.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; without
            it, a leaf may be split only along the axes of a group.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = optax.chain(
        ...     optax.sgd(0.5), clipjax.proximal(clipjax.prox.L1(1.0), 0.5)
        ... )
        >>> params = {"kernel": jnp.array([[3.0, -0.75], [0.25, 2.0]])}
        >>> grads = {"kernel": jnp.array([[1.0, -1.0], [1.0, -4.0]])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[2. , 0. ],
               [0. , 3.5]], dtype=float32)

    Reference:
        Neal Parikh, Stephen Boyd, Proximal Algorithms, 2014,
        https://doi.org/10.1561/2400000003
    """
    where = masks.weights if where is None else where
    check.has_method("prox", penalty=penalty)
    check.not_negative(learning_rate=learning_rate)
    check.one_of(scopes.Unit, scopes.Layer, scopes.Leaf, scope=scope)
    check.function(where=where)

    def init(params):
        shares = {p: jnp.zeros([], jnp.float32) for p in chosen(params, where)}
        return ProximalState(
            jnp.zeros([], jnp.int32),
            trees.remembered(params, shares),
            jnp.zeros([], jnp.float32),
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("proximal", params)
        everything, moves = trees.floats(params), trees.floats(updates)
        leaves = trees.chosen(trees.float_arrays(params), where)
        check.same_paths("share of zeros", state.prox_leaf_sparsity, leaves)
        leaves = {p: x for p, x in leaves.items() if p in moves}
        eta = trees.bound_at(learning_rate, state.step)
        rule = trees.at_step(penalty, state.step)
        targets, results = {}, {}
        for path, param in leaves.items():
            check.same_shape("proximal", path, moves[path], param)
            axes = scope.part(path, everything).axes
            over = _split_over(path, param, axes, specs, axis_name)
            targets[path] = _sum(param, moves[path])
            results[path] = rule.prox(targets[path], eta, axis=axes, axis_name=over)
        shares, total = _measured(results, state, axis_name)
        new_state = ProximalState(trees.next_step(state.step), shares, total)
        return trees.map_by_path(_step, updates, leaves, targets, results), new_state

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _split_over(
    path: str,
    leaf: Array,
    axes: tuple[int, ...] | None,
    specs: scopes.SpecRule | None,
    axis_name: AxisName,
) -> AxisName:
    """Returns the mesh axes over which the groups of a leaf are split."""
    if specs is None or not axis_name:
        return axis_name
    axes = tuple(range(leaf.ndim)) if axes is None else axes
    return sharding.split_axes(specs(path, leaf), axes)


def _sum(param: Array, update: Array) -> Array:
    """Returns θ + u in float32 or wider."""
    dtype = jnp.promote_types(trees.wide(param).dtype, trees.wide(update).dtype)
    return param.astype(dtype) + update.astype(dtype)


def _step(update: Any, param: Array, target: Array, result: Array) -> Array:
    """Returns the update that takes a parameter to the result, unchanged if it does."""
    stays = (result == target) & (result != 0)
    step = emit.step_to(update, param, result)
    return jnp.where(stays, jnp.asarray(update, step.dtype), step)


def _measured(
    results: dict[str, Array], state: ProximalState, axis_name: AxisName
) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
    """Returns the share of zeros in each leaf and in all that were moved."""
    if not results:
        return state.prox_leaf_sparsity, state.prox_total_sparsity
    kept = {path: masks.nonzero(x) for path, x in results.items()}
    shares, total = shares_of_zeros(kept, axis_name)
    return state.prox_leaf_sparsity | shares, total
