"""Calls of `update` outside of any trace, compiled once for each kind of arguments."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles an `update` once, for calls outside of any trace.

    A branch or a loop that closes over concrete arrays is another program in every
    call: outside of `jax.jit` each call would compile it again, and keep it.  So a
    factory wraps its `update` in this, once, and returns the result.

    Where an argument is traced, `update` runs as it stands and adds no call to the
    program.  `value_fn`, the loss as Optax's line searches take it, is compiled too,
    once for each function.  Where another argument is no array and no number, `update`
    runs as it stands and is not compiled.
    """
    jitted = jax.jit(update, static_argnames="value_fn")

    @functools.wraps(update)
    def called(updates, state, params=None, **extra_args):
        given = {k: x for k, x in extra_args.items() if k != "value_fn"}
        leaves = jax.tree.leaves((updates, state, params, given))
        run = jitted if all(map(_is_concrete, leaves)) else update
        return run(updates, state, params, **extra_args)

    return called


def _is_concrete(leaf: Any) -> bool:
    kinds = jax.Array, np.ndarray, np.generic, numbers.Number
    return isinstance(leaf, kinds) and not isinstance(leaf, Tracer)
