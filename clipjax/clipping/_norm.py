"""Clipping by a fixed norm: of the whole tree, or of each leaf."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .. import _checks as check, _meshes as meshes, _trees as trees, norms
from .._types import AxisName, Number, Schedule
from . import _state as states
from ._response import exceeds, shrink


def clip_by_global_norm(
    max_norm: Number | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the update so that its global norm is at most c.

    u ← u · c / max(c, ‖u‖₂), the norm over all entries of all leaves

    Takes the place of `optax.clip_by_global_norm`; the norm is computed in float32 or
    wider, and is right from 1e-38 to 1e38.  An update within the bound passes bit for
    bit.  Rounding to a narrow dtype may exceed the bound by one part in 2⁹ (bfloat16)
    or 2¹² (float16).  An update with a NaN or an infinity passes unchanged and is
    counted: `optax.apply_if_finite` can then see it.

    Args:
        max_norm: c ≥ 0, a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.6], dtype=float32), 'b': Array([0.8], dtype=float32)}

    Reference:
        Razvan Pascanu, Tomas Mikolov, Yoshua Bengio, On the Difficulty of Training
        Recurrent Neural Networks, 2012, https://arxiv.org/abs/1211.5063
    """
    check.not_negative(max_norm=max_norm)

    def init(params):
        del params
        return states.first()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        bound = trees.bound_at(max_norm, state.step)
        norm = norms.global_norm(updates, scaled=True, axis_name=axis_name)
        factor = shrink(norm, bound)
        new_state = states.after(
            state,
            norm=norm,
            clipped_norm=norm * factor,
            threshold=bound,
            clipped=exceeds(norm, bound),
        )
        return trees.scale_all(updates, factor), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_block_rms(
    threshold: Number | Schedule, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its root mean square is at most d.

    u ← u · d / max(d, RMS(u)), RMS(u) = ‖u‖₂ / √n, for each leaf u of n entries

    Takes the place of `optax.clip_by_block_rms`.  After the optimizer it is Adafactor's
    update clipping.  A leaf with a NaN or an infinity passes unchanged, the others are
    clipped; such a step is counted.

    Args:
        threshold: d ≥ 0, a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = clip_by_block_rms(1.0)
        >>> updates = {"a": jnp.array([1.0, 7.0]), "b": jnp.array([0.5])}
        >>> tx.update(updates, tx.init(updates))[0]
        {'a': Array([0.2, 1.4], dtype=float32), 'b': Array([0.5], dtype=float32)}

    Reference:
        Noam Shazeer, Mitchell Stern, Adafactor: Adaptive Learning Rates with Sublinear
        Memory Cost, 2018, https://arxiv.org/abs/1804.04235
    """
    check.not_negative(threshold=threshold)

    def init(params):
        del params
        return states.first()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        bound = trees.bound_at(threshold, state.step)
        leaves = trees.floats(updates)
        sizes = norms.leaf_norms(leaves, scaled=True, axis_name=axis_name)
        rms = {p: _rms(sizes[p], x, axis_name) for p, x in leaves.items()}
        factors = {p: shrink(size, bound) for p, size in rms.items()}
        above = [exceeds(size, bound) for size in rms.values()]
        new_state = states.after(
            state,
            norm=norms.global_norm(sizes, scaled=True),
            clipped_norm=norms.global_norm(
                {p: sizes[p] * factors[p] for p in sizes}, scaled=True
            ),
            threshold=bound,
            clipped=jnp.any(jnp.stack(above)) if above else jnp.zeros([], bool),
        )
        return trees.map_by_path(trees.scale, updates, factors), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _rms(norm: Float[Array, ""], leaf: Array, axis_name: AxisName) -> Float[Array, ""]:
    entries = max(leaf.size, 1) * meshes.blocks(leaf, axis_name)
    return norm / jnp.sqrt(jnp.asarray(entries, norm.dtype))
