"""What a clip records of its last step, and how often it acted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core import trees


class ClipState(NamedTuple):
    """The last step of a clip, and how often it acted.

    Norms are of the last step whose norm was finite.  They are Euclidean, of all leaves
    together; but of a clip by `norms.inf_norm` or `norms.spectral_norm`, the largest
    such norm of any part.
    """

    step: Int[Array, ""]  # updates seen
    norm: Float[Array, ""]  # of the incoming update
    clipped_norm: Float[Array, ""]  # of the outgoing update
    threshold: Float[Array, ""]  # in its argument's unit; the largest number for none
    clipped_steps: Int[Array, ""]  # updates that were changed
    nonfinite_steps: Int[Array, ""]  # updates with a NaN or an infinity

    def measured(self) -> Iterator[tuple[str, Array]]:
        """Yields what `metrics` reads."""
        steps = jnp.maximum(self.step, 1).astype(jnp.float32)
        yield "norm", self.norm
        yield "clipped_norm", self.clipped_norm
        is_none = self.threshold >= jnp.finfo(jnp.float32).max
        yield "threshold", jnp.where(is_none, jnp.inf, self.threshold)
        yield "clipped_share", self.clipped_steps.astype(jnp.float32) / steps
        yield "nonfinite_steps", self.nonfinite_steps


class UnmeasuredState(NamedTuple):
    """What remains of a clip that needs no norm."""

    step: Int[Array, ""]  # updates seen


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
    most = float(jnp.finfo(jnp.float32).max)
    numbers = []
    for new, old in zip((norm, clipped_norm, threshold), state[1:4], strict=True):
        within = jnp.minimum(new, most).astype(old.dtype)
        numbers.append(jnp.where(known & ~jnp.isnan(new), within, old))
    return ClipState(
        trees.next_step(state.step),
        numbers[0],
        numbers[1],
        numbers[2],
        state.clipped_steps + (known & clipped).astype(jnp.int32),
        state.nonfinite_steps + (~known).astype(jnp.int32),
    )
