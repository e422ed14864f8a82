"""The engine of every clip: scope → norm → threshold → response, measured once.

An update is read once, by the finest of the scopes.  The norms of its parts then stand
side by side in a few small arrays, a row for each leaf, on which all else is computed:
norms of coarser scopes, thresholds, factors, the record.  Each leaf is read a second
time, when it is multiplied by its own row of factors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import norms, responses, scopes
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule, Where
from ..norms import _stacked as stacked
from ..norms._stacked import Stack
from ..responses import Entrywise, Policy, Response
from ..scopes import Part, Scope
from ..thresholds import History, Relative
from ._record import ClipState, UnmeasuredState, after, first

Threshold = Number | Schedule | Relative | History
"""A bound: a number, or a rule that finds one."""

_TREE = scopes.Tree()
_NORMS = (norms.global_norm, norms.rms, norms.inf_norm, norms.spectral_norm)


class ClipByState(NamedTuple):
    """What a clip remembers: its last step, and the memory of its thresholds."""

    clip: ClipState | UnmeasuredState
    threshold_memory: tuple[dict[str, PyTree], ...]  # of each bound, by label


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound on the norm of each part of an update, for `clip_by`.

    Args:
        threshold: T ≥ 0: a number, a traced value or a schedule; a rule of
            `thresholds`; or a mapping from the labels of parts, such as those of
            `scopes.Group`, to these.
        scope: which entries are measured together, from `scopes`.
        norm: `norms.global_norm`, `rms`, `inf_norm` or `spectral_norm`; of a single
            entry, each is the absolute value.
        response: what becomes of a part by its norm and its threshold, from
            `responses`.
        start: the rule by the parameters that is the bound as long as a rule by the
            past knows no norm; not used where `update` gets no parameters.
        first: the largest factor as long as a rule by the past knows no norm, in
            [0, 1]; below one, a spike that comes first does not pass, and is remembered
            as if the threshold were at least a tenth of that share of it.

    Example:
        >>> import clipjax
        >>> clipjax.Bound(1.0, clipjax.scopes.Leaf()).norm is clipjax.norms.global_norm
        True
    """

    threshold: Threshold | Mapping[str, Threshold]
    scope: Scope = _TREE
    norm: Callable[..., Any] = norms.global_norm
    response: Response | Entrywise = responses.scale
    start: Relative | None = None
    first: float = 1.0

    def __post_init__(self):
        """Checks the arguments."""
        for rule in self.rules:
            if isinstance(rule, type):
                raise TypeError(
                    f"threshold must be a value, but is the class {rule.__name__}."
                    " Call it."
                )
            if not isinstance(rule, Relative | History):
                check.not_negative(threshold=rule)
        if not 0 <= self.first <= 1:
            raise ValueError(f"first must lie between 0 and 1, but is {self.first!r}.")
        if isinstance(self.scope, type) or not isinstance(self.scope, Scope):
            check.has_method("part", scope=self.scope)
        if not callable(self.response):
            check.function(response=self.response)
        if self.norm not in _NORMS:
            raise ValueError(
                "norm must be `norms.global_norm`, `norms.rms`, `norms.inf_norm` or"
                f" `norms.spectral_norm`, but is {self.norm!r}."
            )
        if self.response is responses.lower_peaks and self.norm is not norms.inf_norm:
            raise ValueError(
                "response=responses.lower_peaks goes by the largest entry and needs"
                " norm=norms.inf_norm."
            )

    @functools.cached_property
    def rules(self) -> tuple[Threshold, ...]:
        """All thresholds."""
        whole = self.threshold
        return tuple(whole.values()) if isinstance(whole, Mapping) else (whole,)

    def rule(self, label: str) -> Threshold:
        """Returns the threshold of the parts with a label."""
        if not isinstance(self.threshold, Mapping):
            return self.threshold
        if label not in self.threshold:
            raise ValueError(
                f"threshold names {sorted(self.threshold)}, but there is a part"
                f" {label!r}. Add one for it, or leave its leaves out with `where`."
            )
        return self.threshold[label]


def clip_by(
    *bounds: Bound | Threshold,
    nonfinite: Policy = responses.propagate,
    strict: bool = False,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips any parts of the update, by any norms, against any thresholds.

    u ← u · r(n, T), for each bound in turn, and each part u of its scope, with its norm
    n and its threshold T

    Use it for a clip that has no name: every clip of this library is a few lines on it.

    What is within its bounds passes bit for bit, and clipping twice is clipping once,
    up to rounding.  Norms, thresholds and factors are float32 or wider; an entry is
    rounded once, to its own dtype.  The update is measured once, whatever the number of
    bounds: the norm of a coarser scope follows from those of a finer one and their
    factors.  A step with a NaN or an infinity is not remembered, and neither is a norm
    of zero.

    `clipjax.metrics` reports the global norm, or with `inf_norm` or `spectral_norm` the
    largest such norm of any part, and the last bound's threshold.

    If no threshold goes by the past, a caller may pass `None` or `optax.EmptyState()`
    for the state, and gets it back.

    Args:
        bounds: each a `Bound`, or a threshold alone, for the global norm.  Bounds by
            another norm than `norms.global_norm` and `rms` must all be by that one.
        nonfinite: what becomes of an update with a NaN or an infinity:
            `responses.propagate`, `zero_scope` or `skip`.
        strict: whether no norm may exceed its bound even after rounding: entries are
            rounded toward zero, and the bound is lowered by two parts in a million.
        where: which leaves are clipped, by path and leaf, by default all floating ones;
            the others are neither measured nor changed.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; needed
            where a part is split along other axes than its own, and for spectral norms.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.clip_by(clipjax.Bound(1.0, clipjax.scopes.Leaf()), 0.5)
        >>> updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
        >>> tx.update(updates, tx.init(updates))[0]["a"]  # to norm 1, then to 0.5
        Array([0.3, 0.4], dtype=float32)
    """
    plan = _plan(
        tuple(b if isinstance(b, Bound) else Bound(b) for b in bounds),
        nonfinite=nonfinite,
        strict=strict,
        where=where,
        specs=specs,
        axis_name=axis_name,
    )
    step = functools.partial(_step, plan)
    if not trees.holds_arrays(plan.bounds):
        # Compiled as a whole, or outside of `jax.jit` each step would compile its
        # branch anew.  Inside of one this dissolves.
        step = jax.jit(step, inline=True)

    def init(params):
        return _init(plan, params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        # Of a module, what is no array stays outside of the compiled step.
        params = None if params is None else trees.arrays(params)
        if state is None or isinstance(state, optax.EmptyState):
            return step(updates, _no_state(plan), params)[0], state
        return step(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] -- a state may be kept by nobody


class _Plan(NamedTuple):
    """The arguments of `clip_by`, and what follows from them."""

    bounds: tuple[Bound, ...]
    nonfinite: Policy
    strict: bool
    where: Where | None
    specs: scopes.SpecRule | None
    axis_name: AxisName
    norm: Callable[..., Any]  # what is measured
    pool: Callable[..., Array]  # norms of parts to that of all of them
    is_leafwise: bool  # whether the last response changes leaves as a whole
    remembers: bool  # whether a threshold goes by the past
    measures: bool  # not for one plain bound of single entries


def _plan(bounds: tuple[Bound, ...], *, nonfinite: Policy, **options: Any) -> _Plan:
    """Checks what bounds are together, and says what they need."""
    check.flag(strict=options["strict"])
    if not callable(nonfinite):
        check.function(nonfinite=nonfinite)
    if not bounds:
        raise ValueError("bounds must not be empty. Give a threshold or a `Bound`.")
    kinds = {norms.global_norm if b.norm is norms.rms else b.norm for b in bounds}
    if len(kinds) > 1:
        raise ValueError(
            "bounds must all go by `norms.global_norm` or `norms.rms`, or all by one"
            " other norm, since the update is measured once. Chain two clips."
        )
    *others, is_leafwise = (hasattr(bound.response, "at") for bound in bounds)
    if any(others):
        raise ValueError(
            "bounds may have a response that is no factor, such as `responses.clamp`,"
            " only in the last place. Chain two clips."
        )
    norm, last = kinds.pop(), bounds[-1]
    remembers = any(isinstance(rule, History) for b in bounds for rule in b.rules)
    is_plain = (
        len(bounds) == 1
        and last.scope == scopes.Element()
        and last.response is responses.clamp
        and not isinstance(last.threshold, Relative | Mapping)
        and nonfinite is responses.propagate
    )
    return _Plan(
        bounds,
        nonfinite,
        **options,
        norm=norm,
        pool=stacked.pooled if norm is norms.global_norm else stacked.largest,
        is_leafwise=is_leafwise,
        remembers=remembers,
        measures=remembers or not is_plain,
    )


def _init(plan: _Plan, params: PyTree) -> ClipByState:
    """Returns the state before the first update."""
    found, memory = trees.floats(params), []
    leaves = {p: x for p, x in found.items() if not plan.where or plan.where(p, x)}
    for bound in plan.bounds:
        own = {}
        if any(isinstance(rule, History) for rule in bound.rules):
            division = _divided(plan, leaves, found, [bound])
            for path, part in division.parts[0].items():
                rule = bound.rule(part.label)
                if isinstance(rule, History) and part.label not in own:
                    own[part.label] = rule.empty(_blank(plan, leaves, path, division))
            own = trees.remembered(params, own, boxes=False)
        memory.append(own)
    record = first() if plan.measures else UnmeasuredState(jnp.zeros([], jnp.int32))
    return ClipByState(record, tuple(memory))


def _blank(
    plan: _Plan, leaves: dict[str, Array], path: str, division: _Division
) -> Float[Array, "..."]:
    """Returns zeros like the norm of a part, laid out as that will be."""
    if division.axes[path] is None:
        return jnp.zeros([], jnp.float32)

    def norm(x):
        return _measured(plan, {path: x}, division)[0].values[0]

    return sharding.zeros(norm, leaves[path]).astype(jnp.float32)


def _no_state(plan: _Plan) -> ClipByState:
    """Returns a state for a caller who keeps none, if there is nothing to remember."""
    rules = [rule for bound in plan.bounds for rule in bound.rules]
    frozen = [*rules, *(bound.response for bound in plan.bounds)]
    if (
        plan.remembers
        or any(map(callable, rules))
        or any(map(trees.is_scheduled, frozen))
    ):
        raise ValueError(
            "state must be what `tx.init(params)` or the last `tx.update` returned,"
            " since a threshold goes by the step or by past norms, but there is none."
        )
    return _init(plan, {})


class _Division(NamedTuple):
    """Which parts are measured."""

    parts: list[dict[str, Part]]  # of each bound, by path
    axes: dict[str, tuple[int, ...] | None]  # measured together at the finest
    mesh_axes: Any  # for all leaves or by path; of matrices, `PartitionSpec`s
    over: AxisName  # mesh axes over which the norms of parts still differ
    of_entries: bool  # whether every entry is a part by itself


class _Update(NamedTuple):
    """An update as it came, and as it was measured."""

    plan: _Plan
    leaves: dict[str, Array]  # that are clipped
    found: dict[str, Array]  # all, and their parameters where they have no update
    params: PyTree
    step: Int[Array, ""]
    division: _Division
    stacks: list[Stack]
    norm: Float[Array, ""]  # of everything


class _Now(NamedTuple):
    """An update that has passed some of its bounds, by stack."""

    norms: list[Array]
    norm: Float[Array, ""] | None  # of everything, where that is known
    touched: tuple[Bool[Array, ""], ...] = ()  # whether a bound changed anything
    factors: list[Array] | None = None  # `None` before the first
    thresholds: list[Array] | None = None  # of the last bound
    compared: list[Array] | None = None  # the norms that those were compared with
    known: list[Array] | None = None  # whether all that a part is measured with is


def _step(
    plan: _Plan, updates: PyTree, state: ClipByState, params: PyTree
) -> tuple[PyTree, ClipByState]:
    """Measures, goes through the bounds, multiplies, and keeps a record."""
    every, step = trees.floats(updates), state.clip.step
    leaves = {p: x for p, x in every.items() if not plan.where or plan.where(p, x)}
    if not plan.measures:  # every entry is bounded by itself
        limit = trees.bound_at(plan.bounds[0].threshold, step)  # pyright: ignore[reportArgumentType] -- no rule
        entries = plan.bounds[0].response.entries  # pyright: ignore[reportFunctionMemberAccess] -- has it
        changed = {path: entries(leaf, limit, limit) for path, leaf in leaves.items()}
        record = UnmeasuredState(trees.next_step(step))
        return trees.replaced(updates, changed), state._replace(clip=record)
    # A bias tells the unit of its kernel, even where it has no update.
    found = every if params is None else trees.floats(params) | every
    division = _divided(plan, leaves, found, plan.bounds)
    stacks = _measured(plan, leaves, division)
    values = [stack.values for stack in stacks]
    norm = _whole(plan, values, division.over)
    update = _Update(plan, leaves, found, params, step, division, stacks, norm)
    if len(state.threshold_memory) != len(plan.bounds):
        raise ValueError(
            f"state is of {len(state.threshold_memory)} bounds, but there are"
            f" {len(plan.bounds)}. Make a new one by `tx.init(params)`."
        )
    now, memory = _Now(values, norm), []
    for i, (bound, old) in enumerate(
        zip(plan.bounds, state.threshold_memory, strict=True)
    ):
        now, new = _through(update, bound, division.parts[i], old, now)
        memory.append(new)
    changed = _applied(update, now)
    record = _recorded(update, state.clip, now, changed)
    return trees.replaced(updates, changed), ClipByState(record, tuple(memory))


# How an update is measured


def _divided(
    plan: _Plan,
    leaves: dict[str, Array],
    found: dict[str, Array],
    bounds: Sequence[Bound],
) -> _Division:
    """Divides the leaves for each bound, and finds the finest parts."""
    parts, axes, mesh_axes = [], dict.fromkeys(leaves), plan.axis_name
    for bound in bounds:
        if bound.scope == _TREE:  # of every leaf the same
            parts.append(dict.fromkeys(leaves, Part("")))
            continue
        parts.append({path: bound.scope.part(path, found) for path in leaves})
        for path, part in parts[-1].items():
            if None not in (part.axes, axes[path]) and part.axes != axes[path]:
                raise ValueError(
                    f"bounds divide the leaf at {path!r} along {axes[path]} and"
                    f" {part.axes}, but it is measured once. Chain two clips."
                )
            axes[path] = axes[path] if part.axes is None else part.axes
    if plan.norm is norms.spectral_norm:
        rule = functools.partial(sharding.matrix_spec, plan.specs, plan.axis_name)
        mesh_axes = {path: rule(path, leaf) for path, leaf in leaves.items()}
    elif plan.specs is not None and plan.axis_name:
        mesh_axes = {
            path: sharding.split_axes(plan.specs(path, leaf), _measured_axes(leaf, own))
            for (path, leaf), own in zip(leaves.items(), axes.values(), strict=True)
        }
    of_entries = all(own == () for own in axes.values())
    over = plan.axis_name if plan.specs or of_entries else None
    return _Division(parts, axes, mesh_axes, over, of_entries)


def _measured_axes(leaf: Array, axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return tuple(range(leaf.ndim)) if axes is None else axes


def _measured(
    plan: _Plan,
    leaves: dict[str, Array],
    division: _Division,
    like: list[Stack] | None = None,
) -> list[Stack]:
    """Measures leaves, in the order of others that these are compared with."""
    axes, mesh_axes = division.axes, division.mesh_axes
    if plan.norm is norms.global_norm and not division.of_entries:
        return stacked.euclidean(leaves, axes, mesh_axes, like=like)
    found = {}
    for path, leaf in leaves.items():
        own = mesh_axes[path] if isinstance(mesh_axes, dict) else mesh_axes
        if axes[path] == ():
            found[path] = jnp.abs(trees.wide(leaf))
        elif plan.norm is norms.spectral_norm:
            found[path] = norms.spectral_norm(leaf, axes[path], spec=own)
        else:
            found[path] = norms.unit_inf_norm(leaf, axes[path], axis_name=own)
        if axes[path] is None:
            found[path] = found[path].reshape(())
    # Entries by themselves are not stacked, which would copy whole leaves.
    apart = {path: (path,) for path in found} if division.of_entries else {}
    return stacked.stacked(found, apart, like)


def _of_leaves(
    plan: _Plan, values: list[Array], over: AxisName
) -> Float[Array, " leaves"]:
    """Returns the norms of whole leaves, from those of their parts by stack."""
    inner = [tuple(range(1, x.ndim)) for x in values]
    pairs = zip(values, inner, strict=True)
    return stacked.joined(
        [plan.pool(x, axes, over) if axes else x for x, axes in pairs]
    )


def _whole(plan: _Plan, values: list[Array], over: AxisName) -> Float[Array, ""]:
    """Returns the norm of everything."""
    if not values:
        return jnp.zeros([], jnp.float32)
    if over is None and len(values) > 1:
        values, _ = stacked.merged(values)
    if len(values) == 1:  # norms of whole leaves are those of all devices already
        return plan.pool(values[0], None, over if values[0].ndim > 1 else None)
    return plan.pool(_of_leaves(plan, values, over))


# What a bound does to it


class _Sets(NamedTuple):
    """The parts of one bound, as they are compared: a number or side by side."""

    labels: list[tuple[str, ...]]  # of the norms in each array
    norms: list[Array]
    rows: list[np.ndarray] | None = None  # of leaves that share a label: which it is

    def spread(self, results: list[Array], like: list[Array]) -> list[Array]:
        """Returns what was found for the parts by stack, to stand beside others."""
        if not results or results[0].ndim == 0:  # of all parts together
            return results * len(like)
        if self.rows is not None:
            results = [results[0][rows] for rows in self.rows]
        return [_column(x, own) for x, own in zip(results, like, strict=True)]


def _gathered(
    update: _Update,
    bound: Bound,
    parts: dict[str, Part],
    values: list[Array],
    norm: Array | None,
) -> _Sets:
    """Returns the norms of all parts, from those of the finest ones by stack."""
    plan, over, stacks = update.plan, update.division.over, update.stacks
    groups = tuple(dict.fromkeys(part.label for part in parts.values()))
    is_whole = [all(parts[p].axes is None for p in s.paths) for s in stacks]
    is_shared = any(part.shared for part in parts.values())
    labels = [tuple(parts[path].label for path in s.paths) for s in stacks]
    if len(groups) == 1 and all(is_whole):
        sets = _Sets([groups], [_whole(plan, values, over) if norm is None else norm])
    elif len(groups) == len(parts) and not is_shared:  # every leaf stands by itself
        pairs = zip(values, is_whole, strict=True)
        sets = _Sets(
            labels, [_of_leaves(plan, [x], over) if w else x for x, w in pairs]
        )
    else:
        rows = [np.asarray([groups.index(label) for label in own]) for own in labels]
        inside = np.concatenate(rows)[None] == np.arange(len(groups))[:, None]
        inside = np.ones_like(inside) if is_shared else inside
        each = _of_leaves(plan, values, over)[None]
        sets = _Sets([groups], [plan.pool(each, (1,), None, inside)], rows)
    return _means(update, parts, sets) if bound.norm is norms.rms else sets


def _means(update: _Update, parts: dict[str, Part], sets: _Sets) -> _Sets:
    """Turns Euclidean norms into root mean squares."""
    plan, counts = update.plan, {part.label: 0 for part in parts.values()}
    for path, part in parts.items():
        leaf, mesh_axes = update.leaves[path], plan.axis_name
        if plan.specs is not None and mesh_axes:
            axes = _measured_axes(leaf, part.axes)
            mesh_axes = sharding.split_axes(plan.specs(path, leaf), axes)
        number = stacked.num_entries(leaf, part.axes, mesh_axes)
        for label in counts if part.shared else [part.label]:
            counts[label] += number
    result = []
    for labels, norm in zip(sets.labels, sets.norms, strict=True):
        roots = np.sqrt([max(counts[label], 1) for label in labels])
        roots = jnp.asarray(roots, norm.dtype)
        result.append(norm / (_column(roots, norm) if norm.ndim else roots[0]))
    return sets._replace(norms=result)


def _through(
    update: _Update,
    bound: Bound,
    parts: dict[str, Part],
    memory: dict[str, PyTree],
    now: _Now,
) -> tuple[_Now, dict[str, PyTree]]:
    """Returns the update behind one more bound, and what that remembers."""
    plan, new = update.plan, dict(memory)
    sets = _gathered(update, bound, parts, now.norms, now.norm)
    compared, split = sets.norms, list
    is_one_rule = not (memory or isinstance(bound.threshold, Mapping))
    if is_one_rule and len(compared) > 1:
        compared, split = stacked.merged(compared)

    @functools.cache
    def weights():
        own = _gathered(update, bound, parts, _weights(update), None).norms
        return own if split is list else stacked.merged(own)[0]

    several = len(compared) > 1 or isinstance(bound.threshold, Mapping)
    if bound.start is not None and several and update.params is not None:
        weights()  # not first within the branch of one of them
    limits, factors = [], []
    for i, norm in enumerate(compared):
        labels = ("",) if is_one_rule else sets.labels[i]
        limit, factor, remembered = _compared(
            update, bound, labels, norm, memory, lambda i=i: weights()[i]
        )
        limits.append(limit)
        factors.append(factor)
        new |= remembered
    if not hasattr(bound.response, "at"):
        touched = tuple(jnp.any(factor != 1) for factor in factors)
        now = now._replace(touched=now.touched + touched)
    return _behind(plan, bound, sets, split(limits), split(factors), now), new


def _behind(
    plan: _Plan,
    bound: Bound,
    sets: _Sets,
    limits: list[Array],
    factors: list[Array],
    now: _Now,
) -> _Now:
    """Returns the update behind a bound, from the thresholds and factors of parts."""
    limits = sets.spread(limits, now.norms)
    behind = now._replace(thresholds=limits, compared=now.norms)
    if plan.nonfinite not in (responses.propagate, responses.skip):
        known = sets.spread([jnp.isfinite(x) for x in sets.norms], now.norms)
        known = [a & b for a, b in zip(now.known or known, known, strict=True)]
        behind = behind._replace(known=known)
    if hasattr(bound.response, "at"):
        return behind
    norm = None
    if now.norm is not None and len(factors) == 1 and not factors[0].ndim:
        norm = now.norm * factors[0].astype(now.norm.dtype)
    own = sets.spread(factors, now.norms)
    own = [f.astype(x.dtype) for x, f in zip(now.norms, own, strict=True)]
    values = [x * f for x, f in zip(now.norms, own, strict=True)]
    if now.factors is not None:
        own = [a * b for a, b in zip(now.factors, own, strict=True)]
    return behind._replace(norms=values, norm=norm, factors=own)


def _weights(update: _Update) -> list[Array]:
    """Measures the parameters of the leaves, by stack."""
    name = "A bound by `thresholds.Relative`"
    check.given_params(name, update.params)
    found = trees.floats(update.params)
    for path, leaf in update.leaves.items():
        check.same_shape(name, path, leaf, found.get(path))
    own = {path: found[path] for path in update.leaves}
    like = _measured(update.plan, own, update.division, update.stacks)
    return [stack.values for stack in like]


def _compared(
    update: _Update,
    bound: Bound,
    labels: tuple[str, ...],
    norm: Array,
    memory: dict[str, PyTree],
    weights: Callable[[], Array],
) -> tuple[Array, Array, dict[str, PyTree]]:
    """Returns the thresholds of parts, their factors, and what is remembered."""
    label, *others = labels
    if others and isinstance(bound.threshold, Mapping):
        return _by_label(update, bound, labels, norm, memory, weights)
    rule = trees.at_step(bound.rule(label), update.step)
    past, each = None, jax.vmap
    is_first: Any = None
    if isinstance(rule, Relative):
        limit = rule.of(weights())
    elif isinstance(rule, History):
        _check_memory(rule, memory, labels, norm)
        if norm.ndim:
            past = _stacked_memory(memory, labels, norm)
        else:
            past, each = memory[label], lambda function: function
        limit = each(rule.threshold)(past, trees.single(norm))
        is_first = jnp.isinf(limit)
        if bound.start is not None and update.params is not None:
            start = trees.at_step(bound.start, update.step)
            limit = _started(limit, is_first, lambda: start.of(weights()))
    else:
        limit = trees.bound_at(rule, update.step)
    limit = limit.astype(norm.dtype)
    if limit.shape != norm.shape:
        limit = sharding.like(jnp.broadcast_to(limit, norm.shape), norm)
    # Where nothing may exceed its bound: a norm may be so much more than was found.
    margin = 1 + 2**-20 if update.plan.strict else 1
    factor = trees.at_step(bound.response, update.step)(norm * margin, limit)
    if not isinstance(rule, History):
        return limit, factor, {}
    told = limit
    if bound.first < 1:
        factor = jnp.where(is_first, jnp.minimum(factor, bound.first), factor)
        least = bound.first / 10 * norm  # or a scale that is far off would take long
        told = jnp.where(is_first, jnp.maximum(limit, least), limit)
    sees = map(trees.single, (norm, told, norm * factor))
    tells = jnp.isfinite(update.norm) & (norm > 0)
    new = _kept(each(rule.remember)(past, *sees), past, tells, update.division.over)
    if not norm.ndim:
        return limit, factor, {label: new}
    rows = [jax.tree.map(lambda x, i=i: x[i], new) for i in range(len(labels))]
    return limit, factor, dict(zip(labels, rows, strict=True))


def _check_memory(
    rule: History, memory: dict[str, PyTree], labels: tuple[str, ...], norm: Array
) -> None:
    """Raises where a state remembers other parts, or by another rule."""
    row = jax.ShapeDtypeStruct(norm.shape[1:], jnp.float32)
    new = jax.eval_shape(rule.empty, row)
    for label in labels:
        check.same_kind("memory of norms", label, memory.get(label), new)


def _by_label(
    update: _Update,
    bound: Bound,
    labels: tuple[str, ...],
    norm: Array,
    memory: dict[str, PyTree],
    weights: Callable[[], Array],
) -> tuple[Array, Array, dict[str, PyTree]]:
    """Compares the norm of each label by a rule of its own."""
    found = [
        _compared(
            update,
            bound,
            (label,),
            norm[i : i + 1],
            memory,
            lambda i=i: weights()[i : i + 1],
        )
        for i, label in enumerate(labels)
    ]
    limits, factors, memories = zip(*found, strict=True)
    new = {label: row for rows in memories for label, row in rows.items()}
    return jnp.concatenate(limits), jnp.concatenate(factors), new


def _stacked_memory(
    memory: dict[str, PyTree], labels: tuple[str, ...], norm: Array
) -> PyTree:
    """Stacks what is remembered of parts, laid out as their norms are."""

    def stack(*rows):
        x = jnp.stack(rows)
        return sharding.like(x, norm) if x.shape == norm.shape else x

    return jax.tree.map(stack, *(memory[label] for label in labels))


def _started(
    limit: Array, is_unknown: Bool[Array, "..."], start: Callable[[], Array]
) -> Array:
    """Returns other thresholds where there are none yet."""
    first = lax.cond(
        jnp.any(is_unknown),
        lambda: start().astype(limit.dtype),
        lambda: jnp.full_like(limit, jnp.inf),
    )
    return jnp.where(is_unknown, first, limit)


def _kept(
    new: PyTree, past: PyTree, tells: Bool[Array, "..."], over: AxisName
) -> PyTree:
    """Returns what is remembered: as before, where a norm tells nothing."""

    def keep(new, old):
        told = tells
        if new.ndim < tells.ndim:  # one for all parts of a leaf
            told = anywhere(tells, tuple(range(new.ndim, tells.ndim)), over)
        return jnp.where(_column(told, new), new, old)

    return jax.tree.map(keep, new, past)


# What comes of it


def _applied(update: _Update, now: _Now) -> dict[str, Array]:
    """Returns the leaves as they come out."""
    plan, stacks = update.plan, update.stacks
    response: Any = plan.bounds[-1].response
    kept = None
    if plan.nonfinite is not responses.propagate:
        parts = now.known or [jnp.isfinite(update.norm)] * len(stacks)
        kept = [plan.nonfinite(known, jnp.isfinite(update.norm)) for known in parts]
    factors, kept = _by_path(update, now.factors), _by_path(update, kept)
    limits = _by_path(update, now.thresholds) if plan.is_leafwise else {}
    compared = _by_path(update, now.compared) if plan.is_leafwise else {}
    scale = trees.scale_inward if plan.strict else trees.scale
    changed = {}
    for path, leaf in update.leaves.items():
        if factors:
            leaf = scale(leaf, factors[path])
        if plan.is_leafwise:
            entries = response.at(path, update.found)
            leaf = entries(leaf, compared[path], limits[path])
        if path in kept:
            choose = jnp.where if kept[path].ndim else lax.select
            leaf = choose(kept[path], leaf, jnp.zeros_like(leaf))
        changed[path] = leaf
    return changed


def _by_path(update: _Update, values: list[Any] | None) -> dict[str, Array]:
    """Returns the row of each leaf, or the number that holds for all of them."""
    result = {}
    for (paths, _), x in zip(update.stacks, values or [], strict=values is not None):
        if x is None:
            continue
        if not update.division.of_entries:  # which are as large as the leaves
            # Held, or XLA would compute all of the above again for every leaf.
            x = lax.optimization_barrier(x)
        rows = stacked.unstacked(x) if x.ndim else [x] * len(paths)
        result |= dict(zip(paths, rows, strict=True))
    return result


def _recorded(
    update: _Update, old: Any, now: _Now, changed: dict[str, Array]
) -> ClipState:
    """Returns the record of a step."""
    plan, last, over = update.plan, update.plan.bounds[-1], update.division.over
    outgoing, norm, touched, split = now.norms, now.norm, list(now.touched), over
    if plan.is_leafwise:
        like = _measured(plan, changed, update.division, update.stacks)
        outgoing, norm, split = [s.values for s in like], None, plan.axis_name
        touched += [jnp.any(x != changed[path]) for path, x in update.leaves.items()]
    if isinstance(last.threshold, Relative):
        shown = trees.bound_at(last.threshold.factor, update.step)
    elif isinstance(last.threshold, History | Mapping):
        shown = norms.inf_norm(now.thresholds, axis_name=over)
    else:
        shown = trees.bound_at(last.threshold, update.step)
    clipped = jnp.any(jnp.stack(touched)) if touched else jnp.zeros([], bool)
    return after(
        old,
        norm=update.norm,
        clipped_norm=_whole(plan, outgoing, over) if norm is None else norm,
        threshold=shown,
        clipped=anywhere(clipped, None, split) if split else clipped,
    )


# Small arrays


def _column(x: Array, like: Array) -> Array:
    """Gives an array as many axes as another has, behind its own."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)) if x.ndim < like.ndim else x


def anywhere(
    flag: Bool[Array, "..."], axes: tuple[int, ...] | None, over: AxisName
) -> Bool[Array, "..."]:
    """Tells whether a flag is set along some axes, on any device."""
    found = jnp.any(flag, axes)
    if names := sharding.axes_of(found, over) if over else ():
        return lax.pmax(found.astype(jnp.int32), names) > 0
    return found
