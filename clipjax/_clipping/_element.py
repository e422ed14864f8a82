"""Clipping entry by entry."""

from __future__ import annotations

import optax

from .. import responses, scopes
from .._core import checks as check
from .._core.types import Number, Schedule
from ._engine import Bound, clip_by


def clip(max_delta: Number | Schedule) -> optax.GradientTransformationExtraArgs:
    """Clips every entry to [-c, c], a complex one to magnitude c.

    uᵢ ← min(max(uᵢ, -c), c), and zᵢ ← zᵢ·min(1, c/|zᵢ|)

    Use it in place of `optax.clip`, which refuses complex entries.

    The bound is rounded down to each leaf's dtype, so that no entry exceeds it.  An
    infinity becomes ±c and a NaN stays.  Leaves that are not floating pass unchanged.
    No norm is measured, so `clipjax.metrics` shows none.

    Args:
        max_delta: c ≥ 0, a number, a traced value or a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.clip(1.0)
        >>> updates = {"w": jnp.array([3.0, -0.5]), "z": jnp.array([3 + 4j])}
        >>> clipped, _ = tx.update(updates, tx.init(updates))
        >>> clipped["w"], clipped["z"]
        (Array([ 1. , -0.5], dtype=float32), Array([0.6+0.8j], dtype=complex64))

    Reference:
        Tomáš Mikolov, Statistical Language Models Based on Neural Networks, 2012
    """
    check.not_negative(max_delta=max_delta)
    bound = Bound(max_delta, scopes.Element(), response=responses.clamp)
    return clip_by(bound)
