"""The engine of every clip: scope → norm → threshold → response, measured once.

An update is read once, by the finest of the scopes.  The norms of its parts then stand
side by side in a few small arrays, a row for each leaf, on which all else is computed:
norms of coarser scopes, thresholds, factors, the record.  Each leaf is read a second
time, when it is multiplied by its own row of factors.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
        >>> Bound(1.0, scopes.Leaf()).norm is norms.global_norm
        True
    """

    threshold: Threshold | Mapping[str, Threshold]
    scope: Scope = _TREE
    norm: Callable[..., Any] = norms.global_norm
    response: Response | Entrywise = responses.scale
    start: Relative | None = None

    def __post_init__(self):
        """Checks the arguments."""
        for rule in self.rules():
            if isinstance(rule, type):
                raise TypeError(
                    f"threshold must be a value, but is the class {rule.__name__}."
                    " Call it."
                )
            if not isinstance(rule, Relative | History):
                check.not_negative(threshold=rule)
        check.has_method("part", scope=self.scope)
        check.function(norm=self.norm, response=self.response)
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

    def rules(self) -> list[Threshold]:
        """Returns all thresholds."""
        whole = self.threshold
        return list(whole.values()) if isinstance(whole, Mapping) else [whole]

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

    @property
    def measure(self) -> Callable[..., Any]:
        """What is measured: a root mean square follows from the Euclidean norm."""
        return norms.global_norm if self.norm is norms.rms else self.norm

    @property
    def is_leafwise(self) -> bool:
        """Tells whether the response changes a leaf by other means than a factor."""
        return hasattr(self.response, "at")

    @property
    def remembers(self) -> bool:
        """Tells whether a threshold goes by the past."""
        return any(isinstance(rule, History) for rule in self.rules())

    @property
    def is_labeled(self) -> bool:
        """Tells whether the label of a part matters for its threshold."""
        return self.remembers or isinstance(self.threshold, Mapping)


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
        >>> tx = clip_by(Bound(1.0, scopes.Leaf()), 0.5)
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
    # Compiled as a whole, or outside of `jax.jit` each step would compile its branch
    # anew.  Inside of one this dissolves.
    step = jax.jit(functools.partial(_step, plan), inline=True)

    def init(params):
        return _init(plan, params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if state is None or isinstance(state, optax.EmptyState):
            return step(updates, _no_state(plan), params)[0], state
        return step(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The arguments of `clip_by`."""

    bounds: tuple[Bound, ...]
    nonfinite: Policy
    strict: bool
    where: Where | None
    specs: scopes.SpecRule | None
    axis_name: AxisName

    def __post_init__(self):
        check.function(nonfinite=self.nonfinite)
        if not self.bounds:
            raise ValueError("bounds must not be empty. Give a threshold or a `Bound`.")
        if len({bound.measure for bound in self.bounds}) > 1:
            raise ValueError(
                "bounds must all go by `norms.global_norm` or `norms.rms`, or all by"
                " one other norm, since the update is measured once. Chain two clips."
            )
        if any(bound.is_leafwise for bound in self.bounds[:-1]):
            raise ValueError(
                "bounds may have a response that is no factor, such as"
                " `responses.clamp`, only in the last place. Chain two clips."
            )

    @property
    def measures(self) -> bool:
        """Tells whether a norm is needed: not for one plain bound of single entries."""
        (*others, last) = self.bounds
        is_plain = last.is_leafwise and last.scope == scopes.Element()
        return bool(others) or not is_plain or last.remembers

    def chosen(self, leaves: dict[str, Array]) -> dict[str, Array]:
        """Returns the leaves that are clipped, by path."""
        if self.where is None:
            return leaves
        return {path: x for path, x in leaves.items() if self.where(path, x)}


def _init(plan: _Plan, params: PyTree) -> ClipByState:
    """Returns the state before the first update."""
    found = trees.floats(params)
    leaves = plan.chosen(found)
    memory = tuple(_blank_memory(plan, bound, leaves, found) for bound in plan.bounds)
    unmeasured = UnmeasuredState(jnp.zeros([], jnp.int32))
    return ClipByState(first() if plan.measures else unmeasured, memory)


def _blank_memory(
    plan: _Plan, bound: Bound, leaves: dict[str, Array], found: dict[str, Array]
) -> dict[str, PyTree]:
    """Returns the memory of a bound before the first norm, by label."""
    memory = {}
    if not bound.remembers:
        return memory
    parts = _parts(bound, leaves, found)
    reading = _reading(plan, leaves, [parts])
    for path, part in parts.items():
        rule = bound.rule(part.label)
        if isinstance(rule, History) and part.label not in memory:
            memory[part.label] = rule.empty(_blank_norm(reading, path, leaves[path]))
    return memory


def _blank_norm(reading: "_Reading", path: str, leaf: Array) -> Float[Array, "..."]:
    """Returns zeros like the norm of a part, laid out as that will be."""
    if reading.axes[path] is None:
        return jnp.zeros([], jnp.float32)
    alone = reading._replace(axes={path: reading.axes[path]})
    blank = sharding.zeros(lambda x: alone.stacks({path: x})[0].values[0], leaf)
    return blank.astype(jnp.float32)


def _no_state(plan: _Plan) -> ClipByState:
    """Returns a state for a caller who keeps none, if there is nothing to remember."""
    rules = [rule for bound in plan.bounds for rule in bound.rules()]
    if any(isinstance(rule, History) or callable(rule) for rule in rules):
        raise ValueError(
            "state must be what `tx.init(params)` or the last `tx.update` returned,"
            " since a threshold goes by the step or by past norms, but there is none."
        )
    return _init(plan, {})


def _step(
    plan: _Plan, updates: PyTree, state: ClipByState, params: PyTree
) -> tuple[PyTree, ClipByState]:
    """Measures, goes through the bounds, multiplies, and keeps a record."""
    every = trees.floats(updates)
    # A bias tells the unit of its kernel, even where it has no update.
    found = every if params is None else trees.floats(params) | every
    leaves, step = plan.chosen(every), state.clip.step
    if not plan.measures:
        return _bounded_entries(plan.bounds[0], updates, leaves, state)
    parts = [_parts(bound, leaves, found) for bound in plan.bounds]
    reading = _reading(plan, leaves, parts)
    stacks = reading.stacks(leaves)
    now, memory = _Now([stack.values for stack in stacks]), []
    norm = reading.whole(now.norms)
    context = _Context(plan, reading, stacks, leaves, params, step, jnp.isfinite(norm))
    for bound, own, old in zip(plan.bounds, parts, state.threshold_memory, strict=True):
        now, new = _through(context, _Division(bound, own, context), old, now)
        memory.append(new)
    changed = _applied(context, found, now)
    record = _record(context, state.clip, norm, now, changed)
    changed = trees.map_by_path(lambda _, new: new, updates, changed)
    return changed, ClipByState(record, tuple(memory))


def _bounded_entries(
    bound: Bound, updates: PyTree, leaves: dict[str, Array], state: ClipByState
) -> tuple[PyTree, ClipByState]:
    """Bounds every entry by itself, without a norm."""
    limit = trees.bound_at(bound.threshold, state.clip.step)
    entries = bound.response.entries
    changed = {path: entries(leaf, limit, limit) for path, leaf in leaves.items()}
    changed = trees.map_by_path(lambda _, new: new, updates, changed)
    step = trees.next_step(state.clip.step)
    return changed, state._replace(clip=UnmeasuredState(step))


# How an update is measured


class _Reading(NamedTuple):
    """What is measured together at the finest, and norms of more made from it."""

    norm: Callable[..., Any]  # `global_norm`, `inf_norm` or `spectral_norm`
    axes: dict[str, tuple[int, ...] | None]  # measured together, by path
    names: Any  # mesh axes, for all leaves or by path; of matrices, `PartitionSpec`s
    over: AxisName  # mesh axes over which the norms of parts still differ

    @property
    def is_entrywise(self) -> bool:
        """Tells whether every entry is a part by itself."""
        return all(axes == () for axes in self.axes.values())

    def stacks(
        self, leaves: dict[str, Array], like: list[Stack] | None = None
    ) -> list[Stack]:
        """Measures leaves, in the order of others that these are compared with."""
        if self.norm is norms.global_norm and not self.is_entrywise:
            return stacked.euclidean(leaves, self.axes, self.names, like=like)
        found = {path: self._norm(path, leaf) for path, leaf in leaves.items()}
        # Entries by themselves are not stacked, which would copy whole leaves.
        apart = {path: (path,) for path in found} if self.is_entrywise else {}
        return stacked.stacked(found, apart, like)

    def _norm(self, path: str, leaf: Array) -> Float[Array, "..."]:
        axes = self.axes[path]
        if axes == ():
            return jnp.abs(trees.wide(leaf))
        name = self.names[path] if isinstance(self.names, dict) else self.names
        if self.norm is norms.spectral_norm:
            norm = norms.spectral_norm(leaf, axes, spec=name)
        else:
            norm = norms.unit_inf_norm(leaf, axes, axis_name=name)
        return norm.reshape(()) if axes is None else norm

    def pooled(self, values: Array, axes: Any = None, where: Any = True) -> Array:
        """Returns the norm of several parts together, from the norms of each."""
        over = sharding.axes_of(values, self.over) if self.over else ()
        is_euclidean = self.norm is norms.global_norm
        pool = stacked.pooled if is_euclidean else stacked.largest
        return pool(values, axes, over, where)

    def of_leaves(self, values: list[Array]) -> Float[Array, " leaves"]:
        """Returns the norms of whole leaves, from those of their parts by stack."""
        leaves = []
        for x in values:
            inner = tuple(range(1, x.ndim))
            leaves.append(self.pooled(x, inner) if inner else x)
        return stacked.joined(leaves)

    def whole(self, values: list[Array]) -> Float[Array, ""]:
        """Returns the norm of everything."""
        if not values:
            return jnp.zeros([], jnp.float32)
        if self.norm is norms.global_norm and self.is_entrywise:  # in one pass
            return norms.global_norm(values, scaled=True, axis_name=self.over)
        values, _ = stacked.merged(values)
        return self.pooled(values[0] if len(values) == 1 else self.of_leaves(values))


def _parts(
    bound: Bound, leaves: dict[str, Array], found: dict[str, Array]
) -> dict[str, Part]:
    if bound.scope == _TREE:  # of every leaf the same
        return dict.fromkeys(leaves, Part(""))
    return {path: bound.scope.part(path, found) for path in leaves}


def _reading(
    plan: _Plan, leaves: dict[str, Array], parts: list[dict[str, Part]]
) -> _Reading:
    """Finds the finest parts of every leaf, of which all others are made."""
    axes = {}
    for path in leaves:
        finest = {own[path].axes for own in parts} - {None}
        if len(finest) > 1:
            raise ValueError(
                f"bounds divide the leaf at {path!r} along the axes {sorted(finest)},"
                " but only one way to divide a leaf can be measured. Chain two clips."
            )
        axes[path] = finest.pop() if finest else None
    differ = plan.specs or all(own == () for own in axes.values())
    names = _names(plan, leaves, axes)
    over = plan.axis_name if differ else None
    return _Reading(plan.bounds[0].measure, axes, names, over)


def _names(
    plan: _Plan, leaves: dict[str, Array], axes: dict[str, tuple[int, ...] | None]
) -> Any:
    """Returns over which mesh axes parts are split; of matrices, how leaves are."""
    if plan.bounds[0].norm is norms.spectral_norm:
        rule = functools.partial(sharding.matrix_spec, plan.specs, plan.axis_name)
        return {path: rule(path, leaf) for path, leaf in leaves.items()}
    if plan.specs is None or not plan.axis_name:
        return plan.axis_name
    names = {}
    for path, leaf in leaves.items():
        every = tuple(range(leaf.ndim))
        own = every if axes[path] is None else axes[path]
        names[path] = sharding.split_axes(plan.specs(path, leaf), own)
    return names


# What a bound does to it


class _Set(NamedTuple):
    """Parts that are compared side by side."""

    labels: tuple[str, ...]
    norms: Float[Array, "labels ..."]


class _Now(NamedTuple):
    """An update that has passed some of its bounds, by stack."""

    norms: list[Array]
    factors: list[Array] | None = None  # `None` before the first
    thresholds: list[Array] | None = None  # of the last bound
    compared: list[Array] | None = None  # the norms that those were compared with
    known: list[Array] | None = None  # whether all that a part is measured with is


class _Context(NamedTuple):
    """An update as it came."""

    plan: _Plan
    reading: _Reading
    stacks: list[Stack]
    leaves: dict[str, Array]
    params: PyTree
    step: Int[Array, ""]
    known: Bool[Array, ""]  # whether it is finite

    def weights(self) -> list[Array]:
        """Measures the parameters of the leaves, by stack."""
        check.given_params("A bound that is relative to the parameters", self.params)
        found = trees.floats(self.params)
        for path, leaf in self.leaves.items():
            check.same_shape("clip_by", path, leaf, found.get(path))
        own = {path: found[path] for path in self.leaves}
        return [stack.values for stack in self.reading.stacks(own, self.stacks)]


@dataclasses.dataclass(frozen=True)
class _Division:
    """How one bound divides the update."""

    bound: Bound
    parts: dict[str, Part]
    context: _Context

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """The labels that leaves share; none where each leaf stands by itself."""
        labels = tuple(dict.fromkeys(part.label for part in self.parts.values()))
        return labels if len(labels) < len(self.parts) else ()

    def labels(self, stack: Stack) -> tuple[str, ...]:
        """Returns the labels of the leaves in a stack."""
        return tuple(self.parts[path].label for path in stack.paths)

    def sets(self, values: list[Array]) -> list[_Set]:
        """Returns the norms of all parts, from those of the finest ones by stack."""
        if self.groups and values:
            sets = [_Set(self.groups, self._of_groups(values))]
        else:
            pairs = zip(self.context.stacks, values, strict=True)
            sets = [_Set(self.labels(s), self._of_parts(s, x)) for s, x in pairs]
        return (
            [self._mean(own) for own in sets] if self.bound.norm is norms.rms else sets
        )

    def _of_parts(self, stack: Stack, values: Array) -> Array:
        whole = all(self.parts[path].axes is None for path in stack.paths)
        return self.context.reading.of_leaves([values]) if whole else values

    def _of_groups(self, values: list[Array]) -> Array:
        reading = self.context.reading
        leaf_norms = reading.of_leaves(values)
        together = reading._replace(over=None)
        if len(self.groups) == 1 or any(part.shared for part in self.parts.values()):
            return jnp.broadcast_to(together.pooled(leaf_norms), len(self.groups))
        labels = [x for stack in self.context.stacks for x in self.labels(stack)]
        inside = np.asarray([[x == group for x in labels] for group in self.groups])
        return together.pooled(leaf_norms[None], (1,), inside)

    def _mean(self, own: _Set) -> _Set:
        """Turns Euclidean norms into root mean squares."""
        names, counts = self.context.reading.names, dict.fromkeys(own.labels, 0)
        for path, part in self.parts.items():
            name = names[path] if isinstance(names, dict) else names
            leaf = self.context.leaves[path]
            number = stacked.num_entries(leaf, part.axes, name)
            for label in counts if part.shared else counts.keys() & {part.label}:
                counts[label] += number
        roots = np.sqrt([max(counts[label], 1) for label in own.labels])
        roots = jnp.asarray(roots, own.norms.dtype)
        return _Set(own.labels, own.norms / _column(roots, own.norms))

    def spread(self, results: list[Array], values: list[Array]) -> list[Array]:
        """Returns what was found for the parts by stack, to stand beside its norms."""
        pairs = zip(results, values, strict=True)
        if self.groups and values:
            (result,) = results
            if len(self.groups) == 1:
                return [result.reshape(())] * len(values)
            index = {group: i for i, group in enumerate(self.groups)}
            rows = [[index[x] for x in self.labels(s)] for s in self.context.stacks]
            picked = [result[np.asarray(row)] for row in rows]
            pairs = zip(picked, values, strict=True)
        return [_column(x, own) for x, own in pairs]


def _through(
    context: _Context, division: _Division, memory: dict[str, PyTree], now: _Now
) -> tuple[_Now, dict[str, PyTree]]:
    """Returns an update behind one more bound, and what that remembers."""
    bound, new = division.bound, dict(memory)
    sets, split = division.sets(now.norms), lambda same: same
    if context.plan.nonfinite not in (responses.propagate, responses.skip):
        known = division.spread([jnp.isfinite(x.norms) for x in sets], now.norms)
        known = [a & b for a, b in zip(now.known or known, known, strict=True)]
        now = now._replace(known=known)
    if not bound.is_labeled:  # one rule for all
        values, split = stacked.merged([own.norms for own in sets])
        sets = [_Set((), x) for x in values]
    weights = functools.cache(lambda: _weights(context, division))
    found = []
    for i, own in enumerate(sets):
        own_weights = functools.partial(lambda i: weights()[i], i)
        found.append(_compare(context, bound, memory, own, own_weights))
        new |= found[-1].memory
    thresholds = division.spread(split([x.thresholds for x in found]), now.norms)
    behind = now._replace(thresholds=thresholds, compared=now.norms)
    if not bound.is_leafwise:
        factors = division.spread(split([x.factors for x in found]), now.norms)
        pairs = zip(now.norms, factors, strict=True)
        values = [x * f.astype(x.dtype) for x, f in pairs]
        if now.factors is not None:
            pairs = zip(now.factors, factors, strict=True)
            factors = [before * own for before, own in pairs]
        behind = behind._replace(norms=values, factors=factors)
    return behind, new


def _weights(context: _Context, division: _Division) -> list[Array]:
    """Returns the norms of the parameters, as those of the update are compared."""
    norms = [own.norms for own in division.sets(context.weights())]
    return norms if division.bound.is_labeled else stacked.merged(norms)[0]


class _Compared(NamedTuple):
    """What came of parts that were compared side by side."""

    thresholds: Array
    factors: Array
    memory: dict[str, PyTree]


def _compare(
    context: _Context,
    bound: Bound,
    memory: dict[str, PyTree],
    own: _Set,
    weights: Callable[[], Array],
) -> _Compared:
    """Finds the thresholds of parts, the factors that follow, and the next memory."""
    if isinstance(bound.threshold, Mapping) and len(own.labels) > 1:
        return _compare_each(context, bound, memory, own, weights)
    label = own.labels[0] if own.labels else ""
    rule = trees.at_step(bound.rule(label), context.step)
    past = None
    if isinstance(rule, Relative):
        limit = rule.of(weights())
    elif isinstance(rule, History):
        past = _rows_of(memory, own)
        limit = jax.vmap(rule.threshold)(past, trees.single(own.norms))
        if bound.start is not None and context.params is not None:
            start = trees.at_step(bound.start, context.step)
            limit = _started(limit, lambda: start.of(weights()))
    else:
        limit = trees.bound_at(rule, context.step)
    limit = jnp.broadcast_to(limit, own.norms.shape)
    # Where nothing may exceed its bound: a norm may be so much more than was found.
    margin = 1 + 2**-20 if context.plan.strict else 1
    factor = trees.at_step(bound.response, context.step)(own.norms * margin, limit)
    if past is None:
        return _Compared(limit, factor, {})
    sees = [trees.single(x) for x in (own.norms, limit, own.norms * factor)]
    new = jax.vmap(rule.remember)(past, *sees)
    tells = context.known & (own.norms > 0)
    kept = functools.partial(_where_told, tells, context.reading.over)
    new = jax.tree.map(kept, new, past)
    rows = enumerate(own.labels)
    return _Compared(
        limit, factor, {p: jax.tree.map(lambda x, i=i: x[i], new) for i, p in rows}
    )


def _compare_each(
    context: _Context,
    bound: Bound,
    memory: dict[str, PyTree],
    own: _Set,
    weights: Callable[[], Array],
) -> _Compared:
    """Compares every label by a rule of its own."""
    found = [
        _compare(
            context,
            bound,
            memory,
            _Set((label,), own.norms[i : i + 1]),
            functools.partial(lambda i: weights()[i : i + 1], i),
        )
        for i, label in enumerate(own.labels)
    ]
    memories = {label: row for one in found for label, row in one.memory.items()}
    thresholds, factors = (
        jnp.concatenate(x) for x in list(zip(*found, strict=True))[:2]
    )
    return _Compared(thresholds, factors, memories)


def _rows_of(memory: dict[str, PyTree], own: _Set) -> PyTree:
    """Stacks what is remembered of parts, laid out as their norms are."""

    def stack(*rows):
        x = jnp.stack(rows)
        return sharding.like(x, own.norms) if x.shape == own.norms.shape else x

    return jax.tree.map(stack, *(memory[label] for label in own.labels))


def _started(limit: Array, start: Callable[[], Array]) -> Array:
    """Returns other thresholds where there are none yet."""
    is_unknown = jnp.isinf(limit)
    first = lax.cond(
        jnp.any(is_unknown),
        lambda: start().astype(limit.dtype),
        lambda: jnp.full_like(limit, jnp.inf),
    )
    return jnp.where(is_unknown, first, limit)


def _where_told(tells: Array, over: AxisName, new: Array, old: Array) -> Array:
    """Keeps what is remembered of a part, unless its norm has something to tell."""
    if new.ndim < tells.ndim:  # one for all parts of a leaf
        tells = anywhere(tells, tuple(range(new.ndim, tells.ndim)), over)
    return jnp.where(_column(tells, new), new, old)


# What comes of it


def _applied(context: _Context, found: dict[str, Array], now: _Now) -> dict[str, Array]:
    """Returns the leaves as they come out."""
    plan, stacks = context.plan, context.stacks
    policy, response = plan.nonfinite, plan.bounds[-1].response
    kept = None
    if policy is not responses.propagate:
        parts = now.known or [context.known] * len(stacks)
        kept = [policy(known, context.known) for known in parts]
    columns = (now.factors, None, None, kept)
    if plan.bounds[-1].is_leafwise:
        columns = (now.factors, now.thresholds, now.compared, kept)
    if not context.reading.is_entrywise:
        # Held, or XLA would compute all of the above again for every leaf.
        columns = jax.tree.map(lax.optimization_barrier, columns)
    scale = trees.scale_inward if plan.strict else trees.scale
    factors, limits, compared, kept = (_by_path(stacks, x) for x in columns)
    changed = {}
    for path, leaf in context.leaves.items():
        if factors:
            leaf = scale(leaf, factors[path])
        if plan.bounds[-1].is_leafwise:
            leaf = response.at(path, found)(leaf, compared[path], limits[path])
        if kept:
            leaf = _select(kept[path], leaf)
        changed[path] = leaf
    return changed


def _record(
    context: _Context,
    old: ClipState,
    norm: Float[Array, ""],
    now: _Now,
    changed: dict[str, Array],
) -> ClipState:
    """Returns the record of a step, with nothing non-finite in it."""
    reading, last = context.reading, context.plan.bounds[-1]
    outgoing, over = now.norms, reading.over
    factors, _ = stacked.merged(now.factors or [])
    touched = [factor != 1 for factor in factors]
    if last.is_leafwise:
        outgoing = [x.values for x in reading.stacks(changed, context.stacks)]
        over = context.plan.axis_name
        touched += [x != changed[path] for path, x in context.leaves.items()]
    if isinstance(last.threshold, Relative):
        shown = trees.bound_at(last.threshold.factor, context.step)
    elif isinstance(last.threshold, History | Mapping):
        shown = norms.inf_norm(now.thresholds, axis_name=reading.over)
    else:
        shown = trees.bound_at(last.threshold, context.step)
    flags = jnp.stack([jnp.any(flag) for flag in touched] or [jnp.zeros([], bool)])
    return after(
        old,
        norm=norm,
        clipped_norm=reading.whole(outgoing),
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


# Small arrays, a row for each leaf


def _column(x: Array, like: Array) -> Array:
    """Gives an array as many axes as another has, behind its own."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)) if x.ndim < like.ndim else x


def _by_path(
    stacks: list[Stack], values: list[Array | None] | None
) -> dict[str, Array]:
    """Returns the row of each leaf, or the number that holds for all of them."""
    result = {}
    for (paths, _), x in zip(stacks, values or [None] * len(stacks), strict=True):
        if x is not None:
            rows = stacked.unstacked(x) if x.ndim else [x] * len(paths)
            result |= dict(zip(paths, rows, strict=True))
    return result


def _select(kept: Bool[Array, "..."], leaf: Array) -> Array:
    zeros = jnp.zeros_like(leaf)
    if kept.ndim:
        return jnp.where(kept, leaf, zeros)
    return lax.select(kept, leaf, zeros)


def anywhere(
    flag: Bool[Array, "..."], axes: tuple[int, ...] | None, over: AxisName
) -> Bool[Array, "..."]:
    """Tells whether a flag is set along some axes, on any device."""
    found = jnp.any(flag, axes)
    if names := sharding.axes_of(found, over) if over else ():
        return lax.pmax(found.astype(jnp.int32), names) > 0
    return found
