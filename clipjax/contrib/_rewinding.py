"""Winning tickets: train, prune, return to the start, and train again."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .. import allocations, masks, patterns
from .._core import checks as check, emit, sharding, trees
from .._core.bits import mask_of
from .._core.eager import compiled
from .._core.memory import first_state
from .._core.types import AxisName, Number, Schedule, Where
from .._sparsity._store import (
    SparsifyState,
    Store,
    check_storage,
    hidden,
    is_due,
)
from ..allocations import Allocation
from ..patterns._by_path import marks

_STEPS = 3  # that a rewind takes: θ + (θₖ - θ) is θₖ only if the two are close


class RewindingState(NamedTuple):
    """What `rewinding` remembers."""

    rewinding: SparsifyState  # the age of its masks is negative while it rewinds
    rounds_done: Int[Array, ""]
    rewound: dict[str, Array]  # by path, the parameters to return to
    rewinding_inner: Any

    keeps_zeros = True


def rewinding(
    inner: optax.GradientTransformation,
    *,
    every: Number | Schedule,
    rounds: Number | Schedule,
    rate: Number | Schedule = 0.2,
    rewind_step: Number = 0,
    allocation: Allocation | None = None,
    where: Where | None = None,
    storage: masks.Bits | masks.Booleans = masks.Bits(),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the smallest parameters in rounds, each from the same early parameters.

    After each of R rounds of N steps: sᵣ = 1 - (1 - p)ʳ,  m = the largest |θ| of those
    that are left,  θ ← m⊙θₖ,  `inner` ← `inner.init`

    Use it for iterative magnitude pruning with rewinding, in one jitted loop.  With k =
    0 it is the lottery ticket hypothesis; larger networks need a k of some hundred or
    thousand steps.

    After (R + 1)·N training steps, and 3·R steps of rewinding, the network has a
    sparsity of 1 - (1 - p)ᴿ and was trained from θₖ.  All floating leaves rewind, also
    those that are not pruned.

    A rewind takes three steps without training, since one addition cannot take every θ
    to θₖ: after them θₖ is there bit for bit, unless θ was larger by a factor of 2²²
    (in bfloat16, of 2¹⁴).  What is pruned is exactly zero from the first of them on.

    `inner` and its schedules start anew with the first step of every round.  A prune is
    due until it happens, so a step that a wrapper discards loses nothing; it waits
    while gradients of the selected leaves hold a NaN or an infinity.  `inner` does not
    see gradients and parameters of what is pruned.  Donate the state, or step inside a
    scan, or XLA copies it in every step.

    State beside that of `inner`: θₖ, one more copy of all floating leaves, and a mask.

    Args:
        inner: the optimizer, or a chain with it; extra arguments are passed on to it.
        every: N ≥ 1, the number of training steps of a round, rounded down; a number, a
            traced value or a schedule.
        rounds: R ≥ 0, how often to prune and rewind; a number, a traced value or a
            schedule.
        rate: p in [0, 1], the share of the parameters left that a round prunes; a
            number, a traced value or a schedule.
        rewind_step: k in [0, N), the step of the first round to return to.
        allocation: how the leaves share the sparsity, from `allocations`;
            by default `global_`.
        where: which leaves are made sparse, by path and leaf; by default floating
            leaves of rank 2 or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps, from `masks`.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            along their first axis, where the allocation reads shapes.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = clipjax.contrib.rewinding(optax.sgd(1.0), every=2, rounds=1, rate=0.5)
        >>> update = jax.jit(tx.update)
        >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
        >>> grads = {"kernel": jnp.array([[-3.0, 0.0, 0.0, 1.0]])}
        >>> state = tx.init(params)
        >>> for _ in range(5):  # two of training, three of rewinding
        ...     updates, state = update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params["kernel"]  # from [7, 2, 3, 2]
        Array([[1., 0., 3., 0.]], dtype=float32)

    Reference:
        Jonathan Frankle, Gintare Karolina Dziugaite, Daniel M. Roy, Michael Carbin,
        Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2019,
        https://arxiv.org/abs/1912.05671
    """
    allocation = allocations.global_ if allocation is None else allocation
    where = masks.weights if where is None else where
    check.has_method("update", inner=inner)
    check.between(0, 1, rate=rate)
    check.not_negative(rounds=rounds, rewind_step=rewind_step)
    check.function(allocation=allocation)
    check_storage("rewinding", storage)
    store = Store(every, where, storage, axis_name)
    _check_first_round(every, rewind_step)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        early = {p: jnp.array(x, copy=True) for p, x in trees.floats(params).items()}
        return RewindingState(
            store.init(params)._replace(mask_age=jnp.zeros([], jnp.int32)),
            jnp.zeros([], jnp.int32),
            trees.remembered(params, early),
            inner.init(params),
        )

    def smallest(state, leaves, old):
        done = (state.rounds_done + 1).astype(jnp.float32)
        left = 1 - trees.value_at(rate, state.rewinding.step)
        if callable(rate):
            share = 1 - left * (1 - state.rewinding.total_sparsity)
        else:
            share = 1 - left**done
        return marks(
            {p: jnp.where(mask_of(old[p]), jnp.abs(x), -1) for p, x in leaves.items()},
            leaves,
            jnp.clip(share, 0, 1),
            pattern=patterns.Unstructured(),
            allocation=allocation,
            axis_name=axis_name,
        )

    def update(updates, state, params=None, **extra_args):
        check.given_params("rewinding", params)
        now, rewound = trees.unboxed((state.rewinding, state.rewound))
        moves, own = trees.floats(updates), trees.floats(params)
        own = {p: x for p, x in own.items() if p in moves}
        leaves = store.leaves(params, now)
        for path, x in trees.float_arrays(params).items():
            check.same_kind("early parameter", path, rewound.get(path), x)
        leaves = {p: x for p, x in leaves.items() if p in moves}
        early = _at(rewound, own, now.step, rewind_step)
        more = state.rounds_done.astype(jnp.float32) < trees.value_at(rounds, now.step)
        read, after, _, made = store.change(
            now,
            leaves,
            more & is_due(now, every),
            lambda old, _: (smallest(state, leaves, old), ()),
            updates={p: moves[p] for p in leaves},
        )
        rewinds = made | (now.mask_age < 0)

        # Before the first step of a round: behind a step, the branch would copy.
        inner_state = jax.lax.cond(
            (now.mask_age == 0) & (state.rounds_done > 0),
            lambda old: _anew(inner, trees.map_by_path(hidden, params, read()), old),
            lambda old: old,
            state.rewinding_inner,
        )
        kept = read()
        outgoing, inner_state = inner.update(
            trees.map_by_path(hidden, updates, kept),
            inner_state,
            trees.map_by_path(hidden, params, kept),
            **extra_args,
        )

        def toward(update, param, end):
            back = emit.step_to(update, param, end)
            return jnp.where(rewinds, back, emit.widened(update, param))

        outgoing = trees.map_by_path(toward, outgoing, own, early)
        age = jnp.where(made, 1 - _STEPS, trees.next_step(now.mask_age))
        new_state = RewindingState(
            trees.boxed_as(after._replace(mask_age=age), state.rewinding),
            state.rounds_done + made.astype(jnp.int32),
            trees.boxed_as(early, state.rewound),
            inner_state,
        )
        return trees.map_by_path(emit.kept, outgoing, leaves, kept), new_state

    return optax.GradientTransformationExtraArgs(init, compiled(update))


def _anew(inner: optax.GradientTransformation, params: PyTree, old: PyTree) -> PyTree:
    """Returns a first state, of the dtypes of the one there is and laid out as it."""

    def one(new, was):
        if not trees.is_number(was):
            return new  # a random key
        was = jnp.asarray(was)
        return sharding.like(jnp.asarray(new, was.dtype), was)

    return jax.tree.map(one, first_state(inner, params, old), old)


def _check_first_round(every: Number | Schedule, rewind_step: Number) -> None:
    known = isinstance(every, int | float) and isinstance(rewind_step, int | float)
    if known and not rewind_step < every:  # pyright: ignore[reportOperatorIssue] -- numbers both
        raise ValueError(
            f"rewind_step must be below every, {every}, but is {rewind_step}: only the"
            " first round has parameters to return to."
        )


def _at(
    rewound: dict[str, Array],
    params: dict[str, Array],
    step: Int[Array, ""],
    rewind_step: Number,
) -> dict[str, Array]:
    """Returns the parameters to return to: those of now, if it is their step."""
    if isinstance(rewind_step, int) and rewind_step == 0:
        return rewound
    here = step == jnp.asarray(rewind_step).astype(jnp.int32)

    def taken():
        old = rewound
        return old | {
            p: jnp.where(jnp.isfinite(x), x, old[p]) for p, x in params.items()
        }

    return jax.lax.cond(here, taken, lambda: rewound)
