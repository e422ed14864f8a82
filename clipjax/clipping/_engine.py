"""The engine of every clip: measure, compare with a threshold, respond, remember."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import (
    _checks as check,
    _meshes as meshes,
    _trees as trees,
    norms,
    responses,
    scopes,
    thresholds,
)
from .._types import AxisName, Number, Schedule, Where
from ..responses import Entrywise, Policy, Response
from ..scopes import Scope
from ..thresholds import History, Relative
from . import _measure as parts_of, _state as states
from ._state import ClipState

Threshold = Number | Schedule | Relative | History
"""A bound: a number, or a rule that finds one."""

_TREE = scopes.Tree()
_NORMS = (norms.global_norm, norms.rms, norms.inf_norm, norms.spectral_norm)


class ClipByState(NamedTuple):
    """What a clip remembers: its last step, and the memory of its threshold."""

    clip: ClipState
    threshold_memory: dict[str, PyTree]  # by key of the scope, if there is a history


def clip_by(
    threshold: Threshold | Mapping[str, Threshold],
    *,
    scope: Scope = _TREE,
    norm: Callable[..., Any] = norms.global_norm,
    response: Response | Entrywise = responses.scale,
    nonfinite: Policy = responses.propagate,
    ceiling: Number | Schedule | None = None,
    strict: bool = False,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips by any norm of any part of the update against any threshold.

    u ← u · r(n, T), for each part u of the scope, with its norm n and its threshold T

    Every clip of this library is a few lines on this one.  What is within its bound
    passes bit for bit, and clipping twice is clipping once, up to rounding.  Norms,
    thresholds and factors are float32 or wider; an entry is rounded once, to its own
    dtype.  Nothing is remembered of a step with a NaN or an infinity anywhere, nor of a
    part whose norm is zero.

    Args:
        threshold: T ≥ 0: a number, a traced value, a schedule; `thresholds.Relative`,
            by the parameters; another rule of `thresholds`, by the norms of the past;
            or a mapping of these from the key of a part, such as the label of a group.
        scope: what is measured together, from `scopes`.
        norm: `norms.global_norm`, `rms`, `inf_norm` or `spectral_norm`; of a single
            entry, each is the absolute value.
        response: what becomes of the update, from `responses`.
        nonfinite: what becomes of one with a NaN or an infinity: `responses.propagate`,
            `zero_scope` or `skip`.
        ceiling: a bound on the Euclidean norm of the whole tree, applied before; with
            `norm=norms.global_norm` only.  A schedule of it counts finite steps.
        strict: whether no norm may exceed its bound even after rounding: entries are
            rounded toward zero, and the bound is lowered by two parts in a million.
        where: which leaves are clipped, by path and leaf; others are neither measured
            nor changed.  All floating leaves, if none is given.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; needed
            where parts of a leaf are measured and axes that are not are split too.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = clip_by(1.0, scope=scopes.Leaf(), norm=norms.inf_norm)
        >>> updates = {"a": jnp.array([2.0, 4.0]), "b": jnp.array([0.5])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.5, 1. ], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    return named(
        "clip_by",
        threshold,
        scope=scope,
        norm=norm,
        response=response,
        nonfinite=nonfinite,
        ceiling=ceiling,
        strict=strict,
        where=where,
        specs=specs,
        axis_name=axis_name,
    )


def named(
    name: str,
    threshold: Threshold | Mapping[str, Threshold],
    *,
    scope: Scope = _TREE,
    norm: Callable[..., Any] = norms.global_norm,
    response: Response | Entrywise = responses.scale,
    nonfinite: Policy = responses.propagate,
    ceiling: Number | Schedule | None = None,
    strict: bool = False,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Is `clip_by`, under the name that its errors give."""
    _check(threshold, scope, norm, response, nonfinite, ceiling)
    kind = norms.global_norm if norm is norms.rms else norm
    margin = 1 + 2**-20 if strict else 1  # a norm may be that much larger than found

    def chosen(tree):
        leaves = trees.floats(tree)
        return {p: x for p, x in leaves.items() if where is None or where(p, x)}

    def init(params):
        leaves, found = chosen(params), trees.floats(params)
        parts = {path: scope.part(path, found) for path in leaves}
        names = parts_of.names_of(leaves, parts, specs, axis_name)
        memory = {}
        for path, part in parts.items():
            rule = _rule(threshold, part.key)
            if isinstance(rule, History) and part.key not in memory:
                blank = parts_of.blank(leaves[path], path, part, kind, names)
                memory[part.key] = rule.empty(blank)
        return ClipByState(states.first(), memory)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        step = state.clip.step
        leaves = chosen(updates)
        own = _own_params(name, threshold, leaves, params)
        # A bias tells the unit of its kernel, even where it has no update.
        found = trees.floats(updates)
        found = found if params is None else trees.floats(params) | found
        parts = {path: scope.part(path, found) for path in leaves}
        names = parts_of.names_of(leaves, parts, specs, axis_name)
        each = all(part.axes == () for part in parts.values())  # no norm is reduced
        over = axis_name if each or specs else None  # where norms still differ

        sizes = parts_of.measure(leaves, parts, kind, names)
        whole = parts_of.total(sizes, kind, over)
        before = _factor_before(ceiling, whole, step - state.clip.nonfinite_steps)
        within = {pool: _times(size, before) for pool, size in sizes.items()}
        relative = parts_of.measure(own, parts, kind, names) if own else {}
        if norm is norms.rms:
            counted = parts_of.entries(leaves, parts, names)
            within = parts_of.mean(within, counted)
            relative = parts_of.mean(relative, counted)

        respond_to = thresholds.at_step(response, step)
        memory, bounds, factors = dict(state.threshold_memory), {}, {}
        pools = {part.key: part.pool for part in parts.values()}
        for key, pool in pools.items():
            rule = thresholds.at_step(_rule(threshold, key), step)
            size = within[pool]
            memory |= {key: _laid_out(memory[key], size)} if key in memory else {}
            bounds[key] = _bound(rule, size, memory.get(key), relative.get(pool), step)
            factors[key] = respond_to(size * margin, bounds[key])
            if isinstance(rule, History):
                sees = (size, bounds[key], size * factors[key])
                tells = jnp.isfinite(whole) & (size > 0)
                memory[key] = _remembered(rule, memory[key], sees, tells, over)

        def respond(leaf, part):
            size = within[part.pool]
            if isinstance(response, Entrywise):
                scaled = trees.scale(leaf, before)
                out = response.entries(scaled, size, bounds[part.key])
            else:
                rounded = trees.scale_inward if strict else trees.scale
                out = rounded(leaf, _times(factors[part.key], before))
            return nonfinite(out, jnp.isfinite(size), jnp.isfinite(whole))

        changed = trees.map_by_path(respond, updates, parts)
        every = {key: _times(factor, before) for key, factor in factors.items()}
        touched, changes = [factor != 1 for factor in every.values()], over
        if isinstance(response, Entrywise):
            old, new = trees.floats(updates), trees.floats(changed)
            touched = [old[path] != new[path] for path in parts]
            changes = axis_name
        if isinstance(response, Entrywise) or len(set(pools.values())) < len(pools):
            outgoing = {p: x for p, x in trees.floats(changed).items() if p in parts}
            after = parts_of.measure(outgoing, parts, kind, names)
        else:
            after = {pool: sizes[pool] * every[key] for key, pool in pools.items()}
        new_state = states.after(
            state.clip,
            norm=whole,
            clipped_norm=parts_of.total(after, kind, over),
            threshold=_shown(threshold, bounds, step, over),
            clipped=parts_of.anywhere(touched, changes),
        )
        return changed, ClipByState(new_state, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _times(size: Array, factor: Array) -> Array:
    """Multiplies by a scalar, in the dtype of the first."""
    return size * factor.astype(size.dtype)


def _laid_out(memory: PyTree, size: Array) -> PyTree:
    """Lays out as the norms what has one entry for each, on a mesh of explicit axes."""
    return jax.tree.map(
        lambda x: meshes.like(x, size) if x.ndim and x.shape == size.shape else x,
        memory,
    )


def _rule(threshold: Threshold | Mapping[str, Threshold], key: str) -> Threshold:
    """Returns the threshold of a part."""
    if not isinstance(threshold, Mapping):
        return threshold
    if key not in threshold:
        raise ValueError(
            f"threshold names {sorted(threshold)}, but there is a part {key!r}. Add one"
            " for it, or leave its leaves out with `where`."
        )
    return threshold[key]


def _rules(threshold: Threshold | Mapping[str, Threshold]) -> list[Threshold]:
    is_mapping = isinstance(threshold, Mapping)
    return list(threshold.values()) if is_mapping else [threshold]


def _own_params(
    name: str,
    threshold: Threshold | Mapping[str, Threshold],
    leaves: dict[str, Array],
    params: PyTree,
) -> dict[str, Array] | None:
    """Returns the parameters of the leaves, if a threshold is relative to them."""
    if not any(isinstance(rule, Relative) for rule in _rules(threshold)):
        return None
    check.given_params(name, params)
    weights = trees.floats(params)
    for path, leaf in leaves.items():
        check.same_shape(name, path, leaf, weights.get(path))
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
    threshold: Threshold | Mapping[str, Threshold],
    bounds: dict[str, Array],
    step: Array,
    axis_name: AxisName,
) -> Array:
    """Returns the threshold for the record: as it was given, or the largest."""
    if isinstance(threshold, Relative):
        return trees.bound_at(threshold.factor, step)
    if not isinstance(threshold, History | Mapping):
        return trees.bound_at(threshold, step)
    return norms.inf_norm(bounds, axis_name=axis_name)


def _check(threshold, scope, norm, response, nonfinite, ceiling) -> None:
    for rule in _rules(threshold):
        if isinstance(rule, type):
            raise TypeError(
                f"threshold must be a value, but is the class {rule.__name__}. Call it."
            )
        if not isinstance(rule, Relative | History):
            check.not_negative(threshold=rule)
    check.has_method("part", scope=scope)
    if response is responses.lower_peaks and norm is not norms.inf_norm:
        raise ValueError(
            "response=responses.lower_peaks goes by the largest entry and needs"
            " norm=norms.inf_norm."
        )
    check.function(norm=norm, response=response, nonfinite=nonfinite)
    if norm not in _NORMS:
        raise ValueError(
            "norm must be `norms.global_norm`, `norms.rms`, `norms.inf_norm` or"
            f" `norms.spectral_norm`, but is {norm!r}."
        )
    if ceiling is not None:
        check.not_negative(ceiling=ceiling)
        if norm is not norms.global_norm:
            raise ValueError(
                "ceiling bounds the Euclidean norm and needs norm=norms.global_norm."
                " Put `clip_by_global_norm` before instead."
            )
