"""Schedules of the sparsity that Optax does not have."""

from __future__ import annotations

import jax.numpy as jnp

from .._core import checks as check, trees
from .._core.types import Number, Schedule


def cyclic_schedule(
    sparsity: Number | Schedule,
    steps: int,
    *,
    warmup: int | None = None,
    compressed: int | None = None,
    dense: int | None = None,
    final: int | None = None,
) -> Schedule:
    """Alternates between a sparsity and 0, and ends with the sparsity: AC/DC.

    s(t) = 0 for W steps, then c cycles of C steps at s and D steps at 0,
    c = ⌊(T - F - W)/(C + D)⌋, then 0 until step T - F, and s from there on

    Use it as the sparsity of `clipjax.sparsify`, with `allocations.global_` as in the
    paper.  At sparsity 0 every entry passes, and pruned ones grow again.  An `every`
    above 1 must divide all phases, or a phase starts late.

    Args:
        sparsity: s in [0, 1] of the compressed phases; a number, a traced value or a
            schedule.
        steps: T ≥ 1, the steps of the whole training.  Static.
        warmup: W ≥ 0, dense steps at the start; by default, as in the paper, a tenth
            of T.  Static.
        compressed: C ≥ 0, steps of a compressed phase; by default a twentieth of T.
            Static.
        dense: D ≥ 0, steps of a dense phase; by default a twentieth of T.  Static.
        final: F ≥ 0, steps of the last compressed phase, which goes on after T; by
            default 15 % of T.  Static.

    Example:
        >>> import clipjax
        >>> phases = dict(warmup=2, compressed=3, dense=2, final=4)
        >>> sparsity = clipjax.contrib.cyclic_schedule(0.9, 12, **phases)
        >>> "".join("-#"[int(sparsity(step) > 0)] for step in range(14))
        '--###---######'

    Reference:
        Alexandra Peste, Eugenia Iofinova, Adrian Vladu, Dan Alistarh, AC/DC:
        Alternating Compressed/DeCompressed Training of Deep Neural Networks, 2021,
        https://arxiv.org/abs/2106.12379
    """
    check.between(0, 1, sparsity=sparsity)
    check.whole(1, steps=steps)
    warmup = steps // 10 if warmup is None else warmup
    compressed = max(steps // 20, 1) if compressed is None else compressed
    dense = max(steps // 20, 1) if dense is None else dense
    final = -(-3 * steps // 20) if final is None else final
    check.whole(0, warmup=warmup, compressed=compressed, dense=dense, final=final)
    if warmup + final > steps:
        raise ValueError(
            f"warmup and final must fit into {steps} steps, but are {warmup} and"
            f" {final}. Shorten one of them."
        )
    period = max(compressed + dense, 1)
    last = warmup + (steps - final - warmup) // period * period

    def schedule(step):
        step = jnp.asarray(step)
        in_cycles = (step >= warmup) & (step < last)
        is_compressed = in_cycles & ((step - warmup) % period < compressed)
        share = trees.value_at(sparsity, step)
        return jnp.where(is_compressed | (step >= steps - final), share, 0)

    return schedule
