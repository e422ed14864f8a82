"""The engine of every clip: scope → norm → threshold → response, measured once.

An update is read once, by the finest of the scopes.  The norms of its parts then stand
side by side in a few small arrays, a row for each leaf, on which all else is computed:
norms of coarser scopes, thresholds, factors, the record.  Each leaf is read a second
time, when it is multiplied by its own row of factors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
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

Threshold = Number | Schedule | Relative | History
"""A bound: a number, or a rule that finds one."""

_TREE = scopes.Tree()
_NORMS = (norms.global_norm, norms.rms, norms.inf_norm, norms.spectral_norm)


class ClipState(NamedTuple):
    """The last step of a clip, and how often it acted.

    Norms are of the last step whose norm was finite.  They are Euclidean, of all leaves
    together; but of a clip by `norms.inf_norm` or `norms.spectral_norm`, the largest
    such norm of any part.
    """

    step: Int[Array, ""]  # updates seen
    norm: Float[Array, ""]  # of the incoming update
    clipped_norm: Float[Array, ""]  # of the outgoing update
    threshold: Float[Array, ""]  # in the unit of the transform's own argument
    clipped_steps: Int[Array, ""]  # updates that were changed
    nonfinite_steps: Int[Array, ""]  # updates with a NaN or an infinity

    def measured(self) -> Iterator[tuple[str, Array]]:
        """Yields what `metrics` reads."""
        steps = jnp.maximum(self.step, 1).astype(jnp.float32)
        yield "norm", self.norm
        yield "clipped_norm", self.clipped_norm
        yield "threshold", self.threshold
        yield "clipped_share", self.clipped_steps.astype(jnp.float32) / steps
        yield "nonfinite_steps", self.nonfinite_steps


class UnmeasuredState(NamedTuple):
    """What remains of a clip that needs no norm."""

    step: Int[Array, ""]  # updates seen


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
    plan = _Plan(
        tuple(b if isinstance(b, Bound) else Bound(b) for b in bounds),
        nonfinite,
        strict,
        where,
        specs,
        axis_name,
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
        if state is None or isinstance(state, optax.EmptyState):
            return step(updates, _no_state(plan), params)[0], state
        return step(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] -- a state may be kept by nobody


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The arguments of `clip_by`, and what follows from them."""

    bounds: tuple[Bound, ...]
    nonfinite: Policy
    strict: bool
    where: Where | None
    specs: scopes.SpecRule | None
    axis_name: AxisName
    norm: Callable[..., Any] = norms.global_norm  # what is measured
    is_leafwise: bool = False  # whether the last response changes leaves as a whole
    remembers: bool = False  # whether a threshold goes by the past
    measures: bool = True  # not for one plain bound of single entries

    def __post_init__(self):
        if not callable(self.nonfinite):
            check.function(nonfinite=self.nonfinite)
        if not self.bounds:
            raise ValueError("bounds must not be empty. Give a threshold or a `Bound`.")
        kinds = {
            norms.global_norm if b.norm is norms.rms else b.norm for b in self.bounds
        }
        if len(kinds) > 1:
            raise ValueError(
                "bounds must all go by `norms.global_norm` or `norms.rms`, or all by"
                " one other norm, since the update is measured once. Chain two clips."
            )
        *others, last = (hasattr(bound.response, "at") for bound in self.bounds)
        if any(others):
            raise ValueError(
                "bounds may have a response that is no factor, such as"
                " `responses.clamp`, only in the last place. Chain two clips."
            )
        rules = [rule for bound in self.bounds for rule in bound.rules]
        remembers = any(isinstance(rule, History) for rule in rules)
        bound = self.bounds[-1]
        is_plain = (
            not others
            and bound.scope == scopes.Element()
            and bound.response is responses.clamp
            and not isinstance(bound.threshold, Relative | Mapping)
            and self.nonfinite is responses.propagate
        )
        for name, value in {
            "norm": kinds.pop(),
            "is_leafwise": last,
            "remembers": remembers,
            "measures": remembers or not is_plain,
        }.items():
            object.__setattr__(self, name, value)


def _init(plan: _Plan, params: PyTree) -> ClipByState:
    """Returns the state before the first update."""
    found, memory = trees.floats(params), []
    leaves = _chosen(plan, found)
    for bound in plan.bounds:
        own = {}
        if any(isinstance(rule, History) for rule in bound.rules):
            (parts,), axes, names, _ = _divided(plan, leaves, found, [bound])
            for path, part in parts.items():
                rule = bound.rule(part.label)
                if isinstance(rule, History) and part.label not in own:
                    own[part.label] = rule.empty(
                        _blank(plan, leaves, path, axes, names)
                    )
        memory.append(own)
    unmeasured = UnmeasuredState(jnp.zeros([], jnp.int32))
    return ClipByState(first() if plan.measures else unmeasured, tuple(memory))


def _blank(
    plan: _Plan, leaves: dict[str, Array], path: str, axes: dict[str, Any], names: Any
) -> Float[Array, "..."]:
    """Returns zeros like the norm of a part, laid out as that will be."""
    if axes[path] is None:
        return jnp.zeros([], jnp.float32)
    own = {path: axes[path]}

    def norm(x):
        return _measured(plan, {path: x}, own, names)[0].values[0]

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


def _chosen(plan: _Plan, leaves: dict[str, Array]) -> dict[str, Array]:
    return {p: x for p, x in leaves.items() if plan.where is None or plan.where(p, x)}


class _Update(NamedTuple):
    """An update as it came, and as it was measured."""

    plan: _Plan
    leaves: dict[str, Array]  # that are clipped
    found: dict[str, Array]  # all, and their parameters where they have no update
    params: PyTree
    step: Int[Array, ""]
    axes: dict[str, tuple[int, ...] | None]  # measured together at the finest
    names: Any  # mesh axes, for all leaves or by path; of matrices, `PartitionSpec`s
    over: AxisName  # mesh axes over which the norms of parts still differ
    of_entries: bool  # whether every entry is a part by itself
    stacks: list[Stack]
    norm: Float[Array, ""]  # of everything


class _Now(NamedTuple):
    """An update that has passed some of its bounds, by stack."""

    norms: list[Array]
    factors: list[Array] | None = None  # `None` before the first
    thresholds: list[Array] | None = None  # of the last bound
    compared: list[Array] | None = None  # the norms that those were compared with
    known: list[Array] | None = None  # whether all that a part is measured with is


def _step(
    plan: _Plan, updates: PyTree, state: ClipByState, params: PyTree
) -> tuple[PyTree, ClipByState]:
    """Measures, goes through the bounds, multiplies, and keeps a record."""
    every, step = trees.floats(updates), state.clip.step
    leaves = _chosen(plan, every)
    if not plan.measures:  # every entry is bounded by itself
        limit = trees.bound_at(plan.bounds[0].threshold, step)  # pyright: ignore[reportArgumentType] -- no rule
        entries = plan.bounds[0].response.entries  # pyright: ignore[reportFunctionMemberAccess] -- has it
        changed = {path: entries(leaf, limit, limit) for path, leaf in leaves.items()}
        record = UnmeasuredState(trees.next_step(step))
        return trees.replaced(updates, changed), state._replace(clip=record)
    # A bias tells the unit of its kernel, even where it has no update.
    found = every if params is None else trees.floats(params) | every
    parts, axes, names, over = _divided(plan, leaves, found, plan.bounds)
    of_entries = all(own == () for own in axes.values())
    stacks = _measured(plan, leaves, axes, names)
    now, memory = _Now([stack.values for stack in stacks]), []
    norm = _pooled_all(plan, now.norms, over, of_entries)
    update = _Update(
        plan,
        leaves,
        found,
        params,
        step,
        axes,
        names,
        over,
        of_entries,
        stacks,
        norm,
    )
    for bound, own, old in zip(plan.bounds, parts, state.threshold_memory, strict=True):
        now, new = _through(update, bound, own, old, now)
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
) -> tuple[list[dict[str, Part]], dict[str, Any], Any, AxisName]:
    """Divides the leaves for each bound; returns the finest parts and their meshes."""
    parts, axes, names = [], dict.fromkeys(leaves), plan.axis_name
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
        names = {path: rule(path, leaf) for path, leaf in leaves.items()}
    elif plan.specs is not None and plan.axis_name:
        names = {}
        for path, leaf in leaves.items():
            own = axes[path]
            own = tuple(range(leaf.ndim)) if own is None else own
            names[path] = sharding.split_axes(plan.specs(path, leaf), own)
    differ = plan.specs or all(own == () for own in axes.values())
    return parts, axes, names, plan.axis_name if differ else None


def _measured(
    plan: _Plan,
    leaves: dict[str, Array],
    axes: dict[str, tuple[int, ...] | None],
    names: Any,
    like: list[Stack] | None = None,
) -> list[Stack]:
    """Measures leaves, in the order of others that these are compared with."""
    of_entries = all(own == () for own in axes.values())
    if plan.norm is norms.global_norm and not of_entries:
        return stacked.euclidean(leaves, axes, names, like=like)
    found = {}
    for path, leaf in leaves.items():
        name = names[path] if isinstance(names, dict) else names
        if axes[path] == ():
            found[path] = jnp.abs(trees.wide(leaf))
        elif plan.norm is norms.spectral_norm:
            found[path] = norms.spectral_norm(leaf, axes[path], spec=name)
        else:
            found[path] = norms.unit_inf_norm(leaf, axes[path], axis_name=name)
        if axes[path] is None:
            found[path] = found[path].reshape(())
    # Entries by themselves are not stacked, which would copy whole leaves.
    apart = {path: (path,) for path in found} if of_entries else {}
    return stacked.stacked(found, apart, like)


def _pooled(
    plan: _Plan,
    values: Array,
    axes: Any = None,
    over: AxisName = None,
    where: Any = True,
) -> Array:
    """Returns the norm of several parts together, from the norms of each."""
    names = sharding.axes_of(values, over) if over else ()
    is_euclidean = plan.norm is norms.global_norm
    pool = stacked.pooled if is_euclidean else stacked.largest
    return pool(values, axes, names, where)


def _pooled_leaves(
    plan: _Plan, values: list[Array], over: AxisName
) -> Float[Array, " leaves"]:
    """Returns the norms of whole leaves, from those of their parts by stack."""
    inner = [tuple(range(1, x.ndim)) for x in values]
    pairs = zip(values, inner, strict=True)
    return stacked.joined([_pooled(plan, x, i, over) if i else x for x, i in pairs])


def _pooled_all(
    plan: _Plan, values: list[Array], over: AxisName, of_entries: bool
) -> Float[Array, ""]:
    """Returns the norm of everything."""
    if not values:
        return jnp.zeros([], jnp.float32)
    if of_entries:  # as large as the leaves
        pool = norms.inf_norm
        if plan.norm is norms.global_norm:
            pool = functools.partial(norms.global_norm, scaled=True)
        return pool(values, axis_name=over)
    if over is None:
        values, _ = stacked.merged(values)
        if len(values) == 1:
            return _pooled(plan, values[0])
    return _pooled(plan, _pooled_leaves(plan, values, over))


# What a bound does to it


class _Sets(NamedTuple):
    """The parts of one bound, some of them compared side by side."""

    labels: list[tuple[str, ...]]
    norms: list[Array]
    rows: list[np.ndarray] | None  # of leaves that share a label: which it is


def _gathered(
    update: _Update, bound: Bound, parts: dict[str, Part], values: list[Array]
) -> _Sets:
    """Returns the norms of all parts, from those of the finest ones by stack."""
    plan, groups = update.plan, tuple(dict.fromkeys(p.label for p in parts.values()))
    labels = [tuple(parts[path].label for path in s.paths) for s in update.stacks]
    is_shared = any(part.shared for part in parts.values())
    if len(groups) == len(parts) and not is_shared:  # every leaf stands by itself
        whole = [all(parts[p].axes is None for p in s.paths) for s in update.stacks]
        values = [
            _pooled_leaves(plan, [x], update.over) if is_whole else x
            for x, is_whole in zip(values, whole, strict=True)
        ]
        sets = _Sets(labels, values, None)
    else:
        place = {label: i for i, label in enumerate(groups)}
        rows = [np.asarray([place[label] for label in own]) for own in labels]
        norm = _pooled_leaves(plan, values, update.over)
        if len(groups) == 1 or is_shared:
            norm = jnp.broadcast_to(_pooled(plan, norm), len(groups))
        else:
            inside = np.concatenate(rows)[None] == np.arange(len(groups))[:, None]
            norm = _pooled(plan, norm[None], (1,), None, inside)
        sets = _Sets([groups], [norm], rows)
    if bound.norm is not norms.rms:
        return sets
    return sets._replace(norms=_means(update, parts, sets))


def _means(update: _Update, parts: dict[str, Part], sets: _Sets) -> list[Array]:
    """Turns Euclidean norms into root mean squares."""
    counts = dict.fromkeys((part.label for part in parts.values()), 0)
    for path, part in parts.items():
        leaf, specs, names = (
            update.leaves[path],
            update.plan.specs,
            update.plan.axis_name,
        )
        axes = tuple(range(leaf.ndim)) if part.axes is None else part.axes
        if specs is not None and names:
            names = sharding.split_axes(specs(path, leaf), axes)
        number = stacked.num_entries(leaf, axes, names)
        for label in counts if part.shared else [part.label]:
            counts[label] += number
    result = []
    for labels, norm in zip(sets.labels, sets.norms, strict=True):
        roots = np.sqrt([max(counts[label], 1) for label in labels])
        result.append(norm / _column(jnp.asarray(roots, norm.dtype), norm))
    return result


def _spread(sets: _Sets, results: list[Array], values: list[Array]) -> list[Array]:
    """Returns what was found for the parts by stack, to stand beside its norms."""
    if sets.rows is None:
        return [_column(x, own) for x, own in zip(results, values, strict=True)]
    (result,) = results
    if len(result) == 1:
        return [result.reshape(())] * len(values)
    pairs = zip(sets.rows, values, strict=True)
    return [_column(result[row], own) for row, own in pairs]


def _through(
    update: _Update,
    bound: Bound,
    parts: dict[str, Part],
    memory: dict[str, PyTree],
    now: _Now,
) -> tuple[_Now, dict[str, PyTree]]:
    """Returns the update behind one more bound, and what that remembers."""
    plan, new = update.plan, dict(memory)
    sets = _gathered(update, bound, parts, now.norms)
    is_one_rule = not (memory or isinstance(bound.threshold, Mapping))
    merge = stacked.merged if is_one_rule else lambda same: (same, lambda x: x)
    compared, split = merge(sets.norms)

    @functools.cache
    def weights():
        own = _gathered(update, bound, parts, _weights(update))
        return merge(own.norms)[0]

    if bound.start is not None and len(compared) > 1 and update.params is not None:
        weights()  # not first within the branch of one of them
    thresholds, factors = [], []
    for i, norm in enumerate(compared):
        labels = () if is_one_rule else sets.labels[i]
        one = functools.partial(lambda i: weights()[i], i)
        limit, factor, remembered = _compared(update, bound, labels, norm, memory, one)
        thresholds.append(limit)
        factors.append(factor)
        new |= remembered
    if plan.nonfinite not in (responses.propagate, responses.skip):
        known = _spread(sets, [jnp.isfinite(x) for x in sets.norms], now.norms)
        known = [a & b for a, b in zip(now.known or known, known, strict=True)]
        now = now._replace(known=known)
    limits = _spread(sets, split(thresholds), now.norms)
    behind = now._replace(thresholds=limits, compared=now.norms)
    if hasattr(bound.response, "at"):
        return behind, new
    own = _spread(sets, split(factors), now.norms)
    own = [f.astype(x.dtype) for x, f in zip(now.norms, own, strict=True)]
    values = [x * f for x, f in zip(now.norms, own, strict=True)]
    if now.factors is not None:
        own = [a * b for a, b in zip(now.factors, own, strict=True)]
    return behind._replace(norms=values, factors=own), new


def _weights(update: _Update) -> list[Array]:
    """Measures the parameters of the leaves, by stack."""
    name = "A bound by `thresholds.Relative`"
    check.given_params(name, update.params)
    found = trees.floats(update.params)
    for path, leaf in update.leaves.items():
        check.same_shape(name, path, leaf, found.get(path))
    own = {path: found[path] for path in update.leaves}
    like = _measured(update.plan, own, update.axes, update.names, update.stacks)
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
    if isinstance(bound.threshold, Mapping) and len(labels) > 1:  # each by its own
        found = []
        for i, label in enumerate(labels):
            one = functools.partial(lambda i: weights()[i : i + 1], i)
            own = norm[i : i + 1]
            found.append(_compared(update, bound, (label,), own, memory, one))
        limits, factors, memories = zip(*found, strict=True)
        new = {label: row for rows in memories for label, row in rows.items()}
        return jnp.concatenate(limits), jnp.concatenate(factors), new
    rule, response, past = bound.rule((*labels, "")[0]), bound.response, None
    if isinstance(rule, Relative):
        limit = trees.at_step(rule, update.step).of(weights())
    elif isinstance(rule, History):
        rule = trees.at_step(rule, update.step)
        past = _stacked_memory(memory, labels, norm)
        limit = jax.vmap(rule.threshold)(past, trees.single(norm))
        if bound.start is not None and update.params is not None:
            start = trees.at_step(bound.start, update.step)
            limit = _started(limit, lambda: start.of(weights()))
    else:
        limit = trees.bound_at(rule, update.step)
    limit = jnp.broadcast_to(limit.astype(norm.dtype), norm.shape)
    limit = sharding.like(limit, norm)
    # Where nothing may exceed its bound: a norm may be so much more than was found.
    margin = 1 + 2**-20 if update.plan.strict else 1
    if dataclasses.is_dataclass(response):
        response = trees.at_step(response, update.step)
    factor = response(norm * margin, limit)
    if past is None:
        return limit, factor, {}
    sees = (norm, limit, norm * factor)
    return limit, factor, _remembered(update, rule, labels, past, sees)


def _stacked_memory(
    memory: dict[str, PyTree], labels: tuple[str, ...], norm: Array
) -> PyTree:
    """Stacks what is remembered of parts, laid out as their norms are."""

    def stack(*rows):
        x = jnp.stack(rows)
        return sharding.like(x, norm) if x.shape == norm.shape else x

    return jax.tree.map(stack, *(memory[label] for label in labels))


def _started(limit: Array, start: Callable[[], Array]) -> Array:
    """Returns other thresholds where there are none yet."""
    is_unknown = jnp.isinf(limit)
    first = lax.cond(
        jnp.any(is_unknown),
        lambda: start().astype(limit.dtype),
        lambda: jnp.full_like(limit, jnp.inf),
    )
    return jnp.where(is_unknown, first, limit)


def _remembered(
    update: _Update,
    rule: Any,
    labels: tuple[str, ...],
    past: PyTree,
    sees: tuple[Array, Array, Array],
) -> dict[str, PyTree]:
    """Returns what is remembered of parts, by label, where norms tell something."""
    tells = jnp.isfinite(update.norm) & (sees[0] > 0)

    def keep(new, old):
        told = tells
        if new.ndim < tells.ndim:  # one for all parts of a leaf
            told = anywhere(tells, tuple(range(new.ndim, tells.ndim)), update.over)
        return jnp.where(_column(told, new), new, old)

    new = jax.tree.map(
        keep, jax.vmap(rule.remember)(past, *map(trees.single, sees)), past
    )
    return {
        label: jax.tree.map(lambda x, i=i: x[i], new) for i, label in enumerate(labels)
    }


# What comes of it


def _applied(update: _Update, now: _Now) -> dict[str, Array]:
    """Returns the leaves as they come out."""
    plan, stacks, held = update.plan, update.stacks, lax.optimization_barrier
    response: Any = plan.bounds[-1].response
    if update.of_entries:  # as large as the leaves
        held = jnp.asarray
    kept = None
    if plan.nonfinite is not responses.propagate:
        parts = now.known or [jnp.isfinite(update.norm)] * len(stacks)
        kept = [plan.nonfinite(known, jnp.isfinite(update.norm)) for known in parts]
    # Held, or XLA would compute all of the above again for every leaf.
    factors = _by_path(stacks, now.factors, held)
    kept = _by_path(stacks, kept, held)
    changed, limits, compared = {}, {}, {}
    if plan.is_leafwise:
        limits = _by_path(stacks, now.thresholds, held)
        compared = _by_path(stacks, now.compared, held)
    scale = trees.scale_inward if plan.strict else trees.scale
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


def _by_path(
    stacks: list[Stack], values: list[Any] | None, held: Callable[[Array], Array]
) -> dict[str, Array]:
    """Returns the row of each leaf, or the number that holds for all of them."""
    result = {}
    for (paths, _), x in zip(stacks, values or [], strict=values is not None):
        if x is not None:
            rows = stacked.unstacked(held(x)) if x.ndim else [held(x)] * len(paths)
            result |= dict(zip(paths, rows, strict=True))
    return result


def _recorded(
    update: _Update, old: Any, now: _Now, changed: dict[str, Array]
) -> ClipState:
    """Returns the record of a step."""
    plan, last, over = update.plan, update.plan.bounds[-1], update.over
    outgoing, (touched, _) = now.norms, stacked.merged(now.factors or [])
    touched = [factor != 1 for factor in touched]
    if plan.is_leafwise:
        like = _measured(plan, changed, update.axes, update.names, update.stacks)
        outgoing = [stack.values for stack in like]
        touched += [x != changed[path] for path, x in update.leaves.items()]
        over = plan.axis_name
    if isinstance(last.threshold, Relative):
        shown = trees.bound_at(last.threshold.factor, update.step)
    elif isinstance(last.threshold, History | Mapping):
        shown = norms.inf_norm(now.thresholds, axis_name=update.over)
    else:
        shown = trees.bound_at(last.threshold, update.step)
    flags = jnp.stack([jnp.any(flag) for flag in touched] or [jnp.zeros([], bool)])
    return after(
        old,
        norm=update.norm,
        clipped_norm=_pooled_all(plan, outgoing, update.over, update.of_entries),
        threshold=shown,
        clipped=anywhere(flags, None, over),
    )


def first() -> ClipState:
    """Returns the record before the first update, each number an array of its own."""
    i, f = jnp.int32, jnp.float32
    return ClipState(*(jnp.zeros([], kind) for kind in (i, f, f, f, i, i)))


def after(
    state: ClipState,
    *,
    norm: Float[Array, ""],
    clipped_norm: Float[Array, ""],
    threshold: Float[Array, ""],
    clipped: Bool[Array, ""],
) -> ClipState:
    """Returns the record after an update, with nothing non-finite in it."""
    known = jnp.isfinite(norm)
    limit = float(jnp.finfo(jnp.float32).max)

    def keep(new, old):
        within = jnp.minimum(new, limit).astype(old.dtype)
        return jnp.where(known & ~jnp.isnan(new), within, old)

    return ClipState(
        trees.next_step(state.step),
        keep(norm, state.norm),
        keep(clipped_norm, state.clipped_norm),
        keep(threshold, state.threshold),
        state.clipped_steps + (known & clipped).astype(jnp.int32),
        state.nonfinite_steps + (~known).astype(jnp.int32),
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
