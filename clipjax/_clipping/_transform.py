"""What every clip does: measure, compare with a threshold, respond, remember."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import norms, responses, thresholds
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule
from ..responses import Entrywise
from ..scopes import Part
from ..thresholds import History, Relative
from . import _measure as parts_of, _state as states
from ._plan import Plan, Threshold
from ._state import ClipState

_KEEPS_SIZES = (responses.propagate, responses.zero_scope, responses.skip)


class ClipByState(NamedTuple):
    """What a clip remembers: its last step, and the memory of its threshold."""

    clip: ClipState
    threshold_memory: dict[str, PyTree]  # by key of the scope, if there is a history


class _Measured(NamedTuple):
    """An update, part by part."""

    leaves: dict[str, Array]
    parts: dict[str, Part]
    names: parts_of.Names
    over: AxisName  # where the norms of parts still differ
    sizes: dict[str, Array]  # by pool, as it came
    whole: Array
    before: Array  # the factor that brings the whole below the ceiling
    within: dict[str, Array]  # by pool, after that and as the threshold sees it
    relative: dict[str, Array]  # of the parameters, if a threshold goes by them

    @property
    def pools(self) -> dict[str, str]:
        """Where each key is measured."""
        return {part.key: part.pool for part in self.parts.values()}


class _Compared(NamedTuple):
    """Thresholds by key, factors that follow, and what is remembered."""

    bounds: dict[str, Array]
    factors: dict[str, Array]
    memory: dict[str, PyTree]


def transform(plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Returns the clip."""

    def init(params):
        leaves, found = plan.chosen(params), trees.floats(params)
        parts, names = _divided(plan, leaves, found)
        memory = {}
        for path, part in parts.items():
            rule = plan.rule(part.key)
            if isinstance(rule, History) and part.key not in memory:
                blank = parts_of.blank(leaves[path], path, part, plan.kind, names)
                memory[part.key] = rule.empty(blank)
        return ClipByState(states.first(), memory)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        found = _measure(plan, updates, params, state.clip)
        compared = _compare(plan, found, state)
        changed = _respond(plan, updates, found, compared)
        new_state = _after(plan, state, updates, changed, found, compared)
        return changed, ClipByState(new_state, compared.memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _divided(
    plan: Plan, leaves: dict[str, Array], found: dict[str, Array]
) -> tuple[dict[str, Part], parts_of.Names]:
    parts = {path: plan.scope.part(path, found) for path in leaves}
    names = parts_of.names_of(leaves, parts, plan.kind, plan.specs, plan.axis_name)
    return parts, names


def _measure(
    plan: Plan, updates: PyTree, params: PyTree, state: ClipState
) -> _Measured:
    """Measures the update, and the parameters where a threshold goes by them."""
    leaves = plan.chosen(updates)
    own = _own_params(plan, leaves, params)
    # A bias tells the unit of its kernel, even where it has no update.
    found = trees.floats(updates)
    found = found if params is None else trees.floats(params) | found
    parts, names = _divided(plan, leaves, found)
    each = all(part.axes == () for part in parts.values())  # no norm is reduced
    over = plan.axis_name if each or plan.specs else None

    sizes = parts_of.measure(leaves, parts, plan.kind, names)
    whole = parts_of.total(sizes, plan.kind, over)
    before = _factor_before(plan.ceiling, whole, state.step - state.nonfinite_steps)
    within = {pool: _times(size, before) for pool, size in sizes.items()}
    relative = parts_of.measure(own, parts, plan.kind, names) if own else {}
    if plan.norm is norms.rms:
        counted = parts_of.entries(leaves, parts, names)
        within = parts_of.mean(within, counted)
        relative = parts_of.mean(relative, counted)
    return _Measured(leaves, parts, names, over, sizes, whole, before, within, relative)


def _compare(plan: Plan, found: _Measured, state: ClipByState) -> _Compared:
    """Finds each threshold, the factor for its part, and its next memory."""
    step, memory = state.clip.step, dict(state.threshold_memory)
    response = thresholds.at_step(plan.response, step)
    margin = 1 + 2**-20 if plan.strict else 1  # a norm may be so much more than found
    bounds, factors = {}, {}
    for key, pool in found.pools.items():
        rule = thresholds.at_step(plan.rule(key), step)
        size = found.within[pool]
        memory |= {key: _laid_out(memory[key], size)} if key in memory else {}
        relative = found.relative.get(pool)
        bounds[key] = _bound(rule, size, memory.get(key), relative, step)
        factors[key] = response(size * margin, bounds[key])
        if isinstance(rule, History):
            sees = (size, bounds[key], size * factors[key])
            tells = jnp.isfinite(found.whole) & (size > 0)
            memory[key] = _remembered(rule, memory[key], sees, tells, found.over)
    return _Compared(bounds, factors, memory)


def _respond(
    plan: Plan, updates: PyTree, found: _Measured, compared: _Compared
) -> PyTree:
    """Returns the new updates."""

    def respond(leaf, part):
        size = found.within[part.pool]
        if isinstance(plan.response, Entrywise):
            scaled = trees.scale(leaf, found.before)
            out = plan.response.entries(scaled, size, compared.bounds[part.key])
        else:
            rounded = trees.scale_inward if plan.strict else trees.scale
            out = rounded(leaf, _times(compared.factors[part.key], found.before))
        return plan.nonfinite(out, jnp.isfinite(size), jnp.isfinite(found.whole))

    return trees.map_by_path(respond, updates, found.parts)


def _after(
    plan: Plan,
    state: ClipByState,
    updates: PyTree,
    changed: PyTree,
    found: _Measured,
    compared: _Compared,
) -> ClipState:
    """Returns the record of this step, and lets the next transform know the norms."""
    every = {k: _times(f, found.before) for k, f in compared.factors.items()}
    outgoing = {p: x for p, x in trees.floats(changed).items() if p in found.parts}
    touched, changes = [factor != 1 for factor in every.values()], found.over
    if isinstance(plan.response, Entrywise):
        old = trees.floats(updates)
        touched = [old[path] != outgoing[path] for path in found.parts]
        changes = plan.axis_name
    is_shared = len(set(found.pools.values())) < len(found.pools)
    if isinstance(plan.response, Entrywise) or is_shared:
        after = parts_of.measure(outgoing, found.parts, plan.kind, found.names)
    else:
        after = {pool: found.sizes[pool] * every[k] for k, pool in found.pools.items()}
        _tell(plan, outgoing, found, after)
    return states.after(
        state.clip,
        norm=found.whole,
        clipped_norm=parts_of.total(after, plan.kind, found.over),
        threshold=_shown(plan, compared.bounds, state.clip.step, found.over),
        clipped=parts_of.anywhere(touched, changes),
    )


def _tell(
    plan: Plan,
    outgoing: dict[str, Array],
    found: _Measured,
    after: dict[str, Array],
) -> None:
    """Lets the next transform know the norms, where they follow from the factors."""
    if plan.strict or plan.nonfinite not in _KEEPS_SIZES:
        return

    policy = plan.nonfinite  # and not the plan, which may hold traced values

    def make(size, whole):
        return policy(size, jnp.isfinite(size), jnp.isfinite(whole))

    sizes = {pool: (size, found.whole) for pool, size in after.items()}
    parts_of.emitted(outgoing, found.parts, plan.kind, found.names, sizes, make)


def _times(size: Array, factor: Array) -> Array:
    """Multiplies by a scalar, in the dtype of the first."""
    return size * factor.astype(size.dtype)


def _laid_out(memory: PyTree, size: Array) -> PyTree:
    """Lays out as the norms what has one entry for each, on a mesh of explicit axes."""
    return jax.tree.map(
        lambda x: sharding.like(x, size) if x.ndim and x.shape == size.shape else x,
        memory,
    )


def _own_params(
    plan: Plan, leaves: dict[str, Array], params: PyTree
) -> dict[str, Array] | None:
    """Returns the parameters of the leaves, if a threshold is relative to them."""
    if not any(isinstance(rule, Relative) for rule in plan.rules()):
        return None
    check.given_params(plan.name, params)
    weights = trees.floats(params)
    for path, leaf in leaves.items():
        check.same_shape(plan.name, path, leaf, weights.get(path))
    return {path: weights[path] for path in leaves}


def _factor_before(
    ceiling: Number | Schedule | None, norm: Array, step: Array
) -> Array:
    if ceiling is None:
        return jnp.ones([], norm.dtype)
    return responses.scale(norm, trees.bound_at(ceiling, step))


def _bound(
    rule: Threshold, size: Array, memory: PyTree, relative: Array | None, step: Array
) -> Array:
    """Returns the threshold of a part at this step."""
    if isinstance(rule, Relative):
        return rule.of(jnp.zeros_like(size) if relative is None else relative)
    if isinstance(rule, History):
        return rule.threshold(memory, trees.single(size))
    return trees.bound_at(rule, step)


def _remembered(
    rule: History,
    memory: PyTree,
    sees: tuple[Array, Array, Array],
    tells: Array,
    axis_name: AxisName,
) -> PyTree:
    """Returns the memory after a norm, its threshold and the norm that came out."""
    new = rule.remember(memory, *(trees.single(x) for x in sees))

    def keep(new, old):
        if new.ndim < tells.ndim:  # one for all parts of a leaf
            return jnp.where(parts_of.anywhere([tells], axis_name), new, old)
        shape = tells.shape + (1,) * (new.ndim - tells.ndim)
        return jnp.where(tells.reshape(shape), new, old)

    return jax.tree.map(keep, new, memory)


def _shown(
    plan: Plan, bounds: dict[str, Array], step: Array, axis_name: AxisName
) -> Array:
    """Returns the threshold for the record: as it was given, or the largest."""
    if isinstance(plan.threshold, Relative):
        return trees.bound_at(plan.threshold.factor, step)
    if not isinstance(plan.threshold, History | Mapping):
        return trees.bound_at(plan.threshold, step)
    return norms.inf_norm(bounds, axis_name=axis_name)
