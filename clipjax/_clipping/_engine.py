"""The engine of every clip, as users call it."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from .. import norms, responses, scopes
from .._core.types import AxisName, Number, Schedule, Where
from ..responses import Entrywise, Policy, Response
from ..scopes import Scope
from ._plan import Plan, Threshold
from ._transform import transform

_TREE = scopes.Tree()


def clip_by(
    threshold: Threshold | Mapping[str, Threshold],
    *,
    scope: Scope = _TREE,
    norm: Callable[..., Any] = norms.global_norm,
    response: Response | Entrywise = responses.scale,
    nonfinite: Policy = responses.propagate,
    ceiling: Number | Schedule | None = None,
    strict: bool = False,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips by any norm of any part of the update against any threshold.

    u ← u · r(n, T), for each part u of the scope, with its norm n and its threshold T

    Every clip of this library is a few lines on this one.  What is within its bound
    passes bit for bit, and clipping twice is clipping once, up to rounding.  Norms,
    thresholds and factors are float32 or wider; an entry is rounded once, to its own
    dtype.  Nothing is remembered of a step with a NaN or an infinity anywhere, nor of a
    part whose norm is zero.

    `clipjax.metrics` reports the global norm, with `norms.rms` too; with `inf_norm` or
    `spectral_norm` the largest such norm of any part.  Norms that a clip before this
    one in a chain has measured or left behind are not measured again.

    Args:
        threshold: T ≥ 0: a number, a traced value, a schedule; `thresholds.Relative`,
            by the parameters; another rule of `thresholds`, by the norms of the past;
            or a mapping of these from the key of a part, such as the label of a group.
        scope: what is measured together, from `scopes`.
        norm: `norms.global_norm`, `rms`, `inf_norm` or `spectral_norm`; of a single
            entry, each is the absolute value.
        response: what becomes of the update, from `responses`.
        nonfinite: what becomes of one with a NaN or an infinity: `responses.propagate`,
            `zero_scope` or `skip`.
        ceiling: a bound on the Euclidean norm of the whole tree, applied before; with
            `norm=norms.global_norm` only.  A schedule of it counts finite steps.
        strict: whether no norm may exceed its bound even after rounding: entries are
            rounded toward zero, and the bound is lowered by two parts in a million.
        where: which leaves are clipped, by path and leaf; others are neither measured
            nor changed.  All floating leaves, if none is given.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; needed
            where parts of a leaf are measured and axes that are not are split too, and
            for the spectral norm of what is split.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = clip_by(1.0, scope=scopes.Leaf(), norm=norms.inf_norm)
        >>> updates = {"a": jnp.array([2.0, 4.0]), "b": jnp.array([0.5])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.5, 1. ], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    plan = Plan(
        "clip_by",
        threshold,
        scope,
        norm,
        response,
        nonfinite,
        ceiling,
        strict,
        where,
        specs,
        axis_name,
    )
    return transform(plan)
