"""Clipping by a fixed norm: of the whole tree, or of each leaf."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from .. import norms, responses, scopes
from .._core import checks as check
from .._core.types import AxisName, Number, Schedule
from ._engine import Bound, clip_by


def clip_by_global_norm(
    max_norm: Number | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the update so that its global norm is at most c.

    u ← u · c / max(c, ‖u‖₂), the norm over all entries of all leaves

    Use it in place of `optax.clip_by_global_norm`.

    The norm is computed in float32 or wider, and is right from 1e-38 to 1e38.  An
    update within the bound passes bit for bit.  Rounding to a narrow dtype may exceed
    the bound by one part in 2⁸ (bfloat16) or 2¹¹ (float16).  An update with a NaN or an
    infinity passes unchanged and is counted: `optax.apply_if_finite` can then see it.

    Args:
        max_norm: c ≥ 0, a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.clip_by_global_norm(1.0)
        >>> updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.6], dtype=float32), 'b': Array([0.8], dtype=float32)}

    Reference:
        Razvan Pascanu, Tomas Mikolov, Yoshua Bengio, On the Difficulty of Training
        Recurrent Neural Networks, 2012, https://arxiv.org/abs/1211.5063
    """
    check.not_negative(max_norm=max_norm)
    return clip_by(max_norm, axis_name=axis_name)


def clip_by_leaf_norm(
    max_norm: Number | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its own norm is at most c.

    u ← u · c / max(c, ‖u‖₂), for each leaf u

    Use it where one layer's gradient would shrink all others; Keras calls it
    `clipnorm`.

    A leaf with a NaN or an infinity passes unchanged, and the step is counted.

    Args:
        max_norm: c ≥ 0, a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.clip_by_leaf_norm(1.0)
        >>> updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.6, 0.8], dtype=float32), 'b': Array([0.5], dtype=float32)}

    Reference:
        Razvan Pascanu, Tomas Mikolov, Yoshua Bengio, On the Difficulty of Training
        Recurrent Neural Networks, 2012, https://arxiv.org/abs/1211.5063
    """
    check.not_negative(max_norm=max_norm)
    return clip_by(Bound(max_norm, scopes.Leaf()), axis_name=axis_name)


def clip_by_block_rms(
    threshold: Number | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its root mean square is at most d.

    u ← u · d / max(d, RMS(u)), RMS(u) = ‖u‖₂ / √n, for each leaf u of n entries

    Use it in place of `optax.clip_by_block_rms`; after an optimizer it is the clip of
    Adafactor.

    A leaf with a NaN or an infinity passes unchanged, and the step is counted.

    Args:
        threshold: d ≥ 0, a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.clip_by_block_rms(1.0)
        >>> updates = {"a": jnp.array([1.0, 7.0]), "b": jnp.array([0.5])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.2, 1.4], dtype=float32), 'b': Array([0.5], dtype=float32)}

    Reference:
        Noam Shazeer, Mitchell Stern, Adafactor: Adaptive Learning Rates with Sublinear
        Memory Cost, 2018, https://arxiv.org/abs/1804.04235
    """
    check.not_negative(threshold=threshold)
    return clip_by(Bound(threshold, scopes.Leaf(), norms.rms), axis_name=axis_name)


def normalize_by_update_norm(
    scale_factor: Number | Schedule = 1.0,
    eps: Number = 0.0,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales every update to the same global norm.

    u ← s · u / (‖u‖₂ + ε); a zero update stays zero

    Use it in place of `optax.normalize_by_update_norm`, whose ε of 10⁻⁶ halves an
    update of that norm.

    An update with a NaN or an infinity passes unchanged and is counted.

    Args:
        scale_factor: s ≥ 0, the norm of every update; a number, a traced value or a
            schedule.
        eps: ε ≥ 0; updates with a norm far below it stay small.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.normalize_by_update_norm(10.0)
        >>> updates = {"a": jnp.array([6e-9, 8e-9])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([6., 8.], dtype=float32)}

    Reference:
        Elad Hazan, Kfir Y. Levy, Shai Shalev-Shwartz, Beyond Convexity: Stochastic
        Quasi-Convex Optimization, 2015, https://arxiv.org/abs/1507.02030
    """
    check.not_negative(scale_factor=scale_factor, eps=eps)

    def response(norm, threshold):
        shares = jnp.isfinite(norm) & (norm > 0)
        lowered = jnp.where(shares, norm, 1) / jnp.where(
            shares, norm + jnp.asarray(eps, norm.dtype), 1
        )
        return responses.normalize(norm, threshold) * lowered

    return clip_by(Bound(scale_factor, response=response), axis_name=axis_name)
