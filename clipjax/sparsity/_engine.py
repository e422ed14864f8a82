"""A mask around an optimizer: when it is made, and what it hides and takes away.

A rule says which entries a new mask keeps.  All else is the same for every method: raw
gradients reach the rule and nobody else, the optimizer sees neither gradients nor
parameters of what is not kept, and what it remembers of these restarts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from .. import _checks as check, _meshes as meshes, _trees as trees, masks, norms
from .._types import AxisName, Number, Schedule, Where
from ._restart import restarted
from ._sparsify import (
    _NEVER,
    SparsifyState,
    _full_bits,
    _is_due,
    _measured,
    _projected,
    _unpack,
)

Masks = dict[str, Bool[Array, "..."]]


class SparseState(NamedTuple):
    """What `sparse` and the methods of dynamic sparse training remember."""

    sparse: SparsifyState
    masks_made: Int[Array, ""]
    sparse_inner: Any


class Now(NamedTuple):
    """What a rule may look at, by path: only leaves that have an update."""

    params: dict[str, Array]
    updates: dict[str, Array]  # raw
    memory: dict[str, Array]
    step: Int[Array, ""]
    masks_made: Int[Array, ""]


@runtime_checkable
class Rule(Protocol):
    """Which entries are kept."""

    @property
    def rests(self) -> bool:
        """Tells whether a step with a new mask, but the first, is none of `inner`."""
        ...

    def init(self, params: dict[str, Array]) -> dict[str, Array]:
        """Returns by path the memory before the first step, if there is one."""
        ...

    def track(self, now: Now) -> dict[str, Array]:
        """Returns the memory after one more step."""
        ...

    def masks(self, now: Now, old: Masks) -> Masks:
        """Returns new masks; the old ones are full at first."""
        ...


@dataclasses.dataclass(frozen=True)
class Store:
    """Where there are masks, when they are made anew, and how they are kept."""

    every: Number | Schedule
    where: Where
    storage: masks.Storage
    axis_name: AxisName

    def __post_init__(self) -> None:
        check.at_least(1, every=self.every)
        check.function(where=self.where)
        check.one_of(masks.Bits, masks.Booleans, masks.Zeros, storage=self.storage)

    @property
    def stores(self) -> bool:
        """Tells whether anything is stored."""
        return not isinstance(self.storage, masks.Zeros)

    def full(self, x: Array) -> Array:
        """Returns as it is stored the mask that keeps all of a leaf."""
        return _full_bits(x, self.storage)

    def chosen(self, params: PyTree) -> dict[str, Array]:
        """Returns by path the leaves that have masks."""
        leaves = trees.floats(params)
        return {p: x for p, x in leaves.items() if x.size and self.where(p, x)}

    def init(
        self, params: PyTree, memory: dict[str, Array] | None = None
    ) -> SparsifyState:
        """Returns the state with full masks, which are due to be made."""
        leaves = self.chosen(params)
        return SparsifyState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(_NEVER, jnp.int32),
            {p: self.full(x) for p, x in leaves.items()} if self.stores else {},
            {p: jnp.zeros([], jnp.float32) for p in leaves},
            jnp.zeros([], jnp.float32),
            {} if memory is None else memory,
        )

    def is_due(
        self, state: SparsifyState, updates: dict[str, Array]
    ) -> Bool[Array, ""]:
        """Tells whether to make masks: the time has come, and all updates are finite.

        These are read only when the time has come.
        """
        if not updates:
            return jnp.zeros([], bool)
        return jax.lax.cond(
            _is_due(state, self.every),
            lambda: jnp.isfinite(norms.inf_norm(updates, axis_name=self.axis_name)),
            lambda: jnp.zeros([], bool),
        )

    def held(self, state: SparsifyState, leaves: dict[str, Array]) -> Masks:
        """Returns the masks as they are stored."""
        if self.stores:
            return {p: _unpack(state.mask_bits[p], x) for p, x in leaves.items()}
        shares = state.leaf_sparsity
        return {p: masks.nonzero(x) | (shares[p] == 0) for p, x in leaves.items()}

    def next(
        self,
        state: SparsifyState,
        leaves: dict[str, Array],
        due: Bool[Array, ""],
        make: Callable[[Masks], Masks],
    ) -> tuple[Callable[[], Masks], SparsifyState]:
        """Returns how to read this step's masks, new if they are due, and the state.

        Read where they are needed, since whatever enters a branch is written to memory:
        bits rather than masks.
        """

        def search():
            new = make(self.held(state, leaves))
            bits, shares, total = _measured(new, self.axis_name, self.storage)
            return state.mask_bits | bits, state.leaf_sparsity | shares, total

        def hold():
            bits = state.mask_bits
            if not self.stores:
                bits = {p: meshes.zeros(self.full, x) for p, x in leaves.items()}
            return bits, state.leaf_sparsity, state.total_sparsity

        bits, shares, total = jax.lax.cond(due, search, hold) if leaves else hold()

        def read():
            now = {p: _unpack(bits[p], x) for p, x in leaves.items()}
            if self.stores:
                return now
            old = self.held(state, leaves)
            return {p: jnp.where(due, now[p], old[p]) for p in leaves}

        return read, state._replace(
            step=trees.next_step(state.step),
            mask_age=jnp.where(due, 1, trees.next_step(state.mask_age)),
            mask_bits=bits if self.stores else {},
            leaf_sparsity=shares,
            total_sparsity=total,
        )


def masked(
    inner: optax.GradientTransformation, rule: Rule, store: Store, *, name: str
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with the masks that a rule makes around it."""
    check.has_method("update", inner=inner)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return SparseState(
            store.init(params, rule.init(store.chosen(params))),
            jnp.zeros([], jnp.int32),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params(name, params)
        moves, leaves = trees.floats(updates), store.chosen(params)
        leaves = {p: x for p, x in leaves.items() if p in moves}
        moves = {p: moves[p] for p in leaves}
        now = Now(
            leaves,
            moves,
            state.sparse.score_memory,
            state.sparse.step,
            state.masks_made,
        )
        now = now._replace(memory=rule.track(now))
        due = store.is_due(state.sparse, moves)
        read, after = store.next(
            state.sparse._replace(score_memory=now.memory),
            leaves,
            due,
            lambda old: rule.masks(now, old),
        )
        rests = due & (state.masks_made > 0) if rule.rests else None
        outgoing, inner_state = _step(
            inner, rests, updates, state.sparse_inner, params, read, extra_args
        )
        made = state.masks_made + due.astype(jnp.int32)
        projected = trees.map_by_path(_projected, outgoing, leaves, read())
        return projected, SparseState(after, made, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    inner: optax.GradientTransformationExtraArgs,
    rests: Bool[Array, ""] | None,
    updates: PyTree,
    inner_state: PyTree,
    params: PyTree,
    read: Callable[[], Masks],
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """Takes the step of what is kept, or none; nothing else is remembered."""

    def hidden(leaf, mask):
        return masks.apply(mask, leaf)

    def step():
        kept = read()
        visible = trees.map_by_path(hidden, params, kept)
        incoming = trees.map_by_path(hidden, updates, kept)
        outgoing, after = inner.update(incoming, inner_state, visible, **extra_args)
        return trees.floats(outgoing), restarted(inner, after, visible, kept)

    def rest():
        kept = read()
        kinds, _ = jax.eval_shape(step)
        zeros = {p: jnp.zeros_like(moves[p], dtype=kinds[p].dtype) for p in kinds}
        visible = trees.map_by_path(hidden, params, kept)
        return zeros, restarted(inner, inner_state, visible, kept)

    moves = trees.floats(updates)
    outgoing, after = step() if rests is None else jax.lax.cond(rests, rest, step)
    return trees.map_by_path(lambda _, new: new, updates, outgoing), after
