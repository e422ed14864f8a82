"""A mask around an optimizer: when it is made, and what it hides and takes away.

A rule says which entries a new mask keeps.  All else is the same for every method: raw
gradients reach the rule; an optimizer that is not elementwise sees no gradients and no
parameters of what is not kept; with a new mask its memory of these restarts.  Only
then, since moments that pass through a branch unchanged are not copied if the state is
donated, or carried by a scan.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .. import masks
from .._core import checks as check, emit, trees
from .._core.bits import mask_of
from .._core.eager import compiled
from .._core.memory import restarted
from ._ranked import Now
from ._store import Leaves, Masks, SparsifyState, Store, hidden, is_due


class SparseState(NamedTuple):
    """What `sparse` and the methods of dynamic sparse training remember."""

    sparse: SparsifyState
    masks_made: Int[Array, ""]
    sparse_inner: Any

    keeps_zeros = True


@runtime_checkable
class Rule(Protocol):
    """Which entries are kept."""

    def init(self, params: Leaves) -> Leaves:
        """Returns by path the memory before the first step, if there is one."""
        ...

    def track(self, now: Now) -> Leaves:
        """Returns the memory after one more step."""
        ...

    def masks(self, now: Now, old: Masks) -> Masks:
        """Returns new masks; the old ones are full at first."""
        ...


def masked(
    inner: optax.GradientTransformation,
    rule: Rule,
    store: Store,
    *,
    name: str,
    elementwise: bool,
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with the masks that a rule makes around it.

    An elementwise one need not be shown zeros: what it makes of a pruned entry is read
    by nobody, and its memory of it restarts before the entry returns.
    """
    check.has_method("update", inner=inner)
    check.flag(elementwise=elementwise)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return SparseState(
            store.init(params, rule.init(trees.chosen(params, store.where))),
            jnp.zeros([], jnp.int32),
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params(name, params)
        before, moves = trees.unboxed(state.sparse), trees.floats(updates)
        leaves = store.leaves(params, before)
        leaves = {p: x for p, x in leaves.items() if p in moves}
        moves = {p: moves[p] for p in leaves}
        now = Now(leaves, moves, before.score_memory, before.step, state.masks_made)
        now = now._replace(memory=rule.track(now))

        def make(old, inner_state):
            new = rule.masks(now, old)
            visible = trees.map_by_path(hidden, params, new)
            # The last mask, by its zeros: to read its bits here would copy them.
            stays = {p: mask_of(new[p]) & masks.nonzero(x) for p, x in leaves.items()}
            if elementwise:  # worth that: a pruned entry may be remembered, zero or not
                stays = {p: mask & mask_of(old[p]) for p, mask in stays.items()}
            return new, restarted(inner, inner_state, visible, stays)

        read, after, inner_state, made = store.change(
            before._replace(score_memory=now.memory),
            leaves,
            is_due(before, store.every, store.sparsity),
            make,
            other=state.sparse_inner,
            updates=moves,
        )
        kept = read()

        def seen(tree):
            return tree if elementwise else trees.map_by_path(hidden, tree, kept)

        outgoing, inner_state = inner.update(
            seen(updates), inner_state, seen(params), **extra_args
        )
        number = state.masks_made + made.astype(jnp.int32)
        outgoing = trees.map_by_path(emit.kept, outgoing, leaves, kept)
        after = trees.boxed_as(after, state.sparse)
        return outgoing, SparseState(after, number, inner_state)

    return optax.GradientTransformationExtraArgs(init, compiled(update))
