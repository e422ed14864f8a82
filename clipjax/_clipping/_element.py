"""Clipping entry by entry."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from .. import responses
from .._core import checks as check, trees
from .._core.types import Number, Schedule


class ElementClipState(NamedTuple):
    """What `clip` remembers: where a schedule stands."""

    step: Int[Array, ""]


def clip(max_delta: Number | Schedule) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [-c, c]; a complex one to magnitude c.

    uᵢ ← min(max(uᵢ, -c), c), and zᵢ ← zᵢ·min(1, c/|zᵢ|)

    Takes the place of `optax.clip`, which refuses complex entries.  The bound is
    rounded down to each leaf's dtype, so that no entry exceeds it.  An infinity becomes
    ±c and a NaN stays.  Leaves that are not floating pass unchanged.

    Args:
        max_delta: c ≥ 0, a number, a traced value or a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = clip(1.0)
        >>> updates = {"w": jnp.array([3.0, -0.5]), "z": jnp.array([3 + 4j])}
        >>> clipped, _ = tx.update(updates, tx.init(updates))
        >>> clipped["w"], clipped["z"]
        (Array([ 1. , -0.5], dtype=float32), Array([0.6+0.8j], dtype=complex64))

    Reference:
        Tomáš Mikolov, Statistical Language Models Based on Neural Networks, 2012
    """
    check.not_negative(max_delta=max_delta)

    def init(params):
        del params
        return ElementClipState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        bound = trees.bound_at(max_delta, state.step)
        clipped = jax.tree.map(
            lambda u: (
                responses.clamped(jnp.asarray(u), bound, bound)
                if trees.is_float(u)
                else u
            ),
            updates,
        )
        return clipped, ElementClipState(trees.next_step(state.step))

    return optax.GradientTransformationExtraArgs(init, update)
