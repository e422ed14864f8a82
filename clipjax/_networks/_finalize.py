"""What comes after sparse training: other copies of the parameters, and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .. import masks
from .._core import checks as check, trees
from .._core.types import Where
from .._sparsity._store import SparsifyState


def finalize(params: PyTree, like: PyTree, *, where: Where = masks.weights) -> PyTree:
    """Puts the exact zeros of a trained model into another copy of its parameters.

    θ̄ᵢ ← 0 where θᵢ = 0

    Use it for copies that no transform reaches: an average of the parameters
    (`optax.incremental_update`), `optax.contrib.schedule_free_eval_params`, the slow
    half of `optax.lookahead`, float32 masters of bfloat16 parameters.

    All other entries and every dtype stay.  A NaN where `like` is zero becomes zero.

    Args:
        params: the copy.
        like: the parameters that were trained; or masks of their shapes, `False` for a
            zero; or the optimizer's state, if it holds masks.
        where: which leaves are sparse, by path and leaf, the same as in training; not
            used with a state, which knows.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> trained = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.zeros(2)}
        >>> average = {"kernel": jnp.array([[2.5, 0.1]]), "bias": jnp.ones(2)}
        >>> clipjax.finalize(average, like=trained)
        {'bias': Array([1., 1.], dtype=float32),
         'kernel': Array([[2.5, 0. ]], dtype=float32)}
    """
    check.function(where=where)
    states = list(_sparsify_states(like))
    leaves = trees.floats(params)
    if states:
        kept = _stored(states, leaves)
    else:
        others = trees.by_path(like)
        chosen = [path for path, leaf in leaves.items() if where(path, leaf)]
        kept = {path: _partner(path, others).astype(bool) for path in chosen}
    for path, mask in kept.items():
        _check_shape(path, mask, leaves[path])
    return trees.map_by_path(lambda x, mask: masks.apply(mask, x), params, kept)


def _sparsify_states(tree: PyTree) -> Iterator[SparsifyState]:
    def ours(node):
        return isinstance(node, SparsifyState)

    yield from filter(ours, jax.tree.leaves(tree, is_leaf=ours))


def _stored(
    states: list[SparsifyState], leaves: dict[str, Array]
) -> dict[str, Bool[Array, "..."]]:
    """Returns by path the masks that the states of a chain hold."""
    kept = {}
    for state in states:
        bits = trees.by_path(state.mask_bits)
        if not bits:
            raise ValueError(
                "like is an optimizer state without stored masks. Pass the parameters"
                " that were trained, or store masks with `storage=masks.Bits()`."
            )
        for path, stored in bits.items():
            param = _partner(path, leaves)
            mask = _unpacked(stored, param)
            kept[path] = kept[path] & mask if path in kept else mask
    return kept


def _unpacked(bits: Array, param: Array) -> Bool[Array, "..."]:
    if bits.dtype == bool:
        return bits
    mask = masks.unpack(bits, param.shape[-1] if param.ndim else 1)
    return mask.reshape(param.shape) if mask.size == param.size else mask


def _partner(path: str, others: dict[str, Any]) -> Array:
    if path not in others:
        raise ValueError(
            f"finalize found no leaf at {path!r} to go with one of the same path: there"
            f" are {sorted(others)}. Pass trees that are named alike, such as"
            " `params.slow` and `params.fast`."
        )
    return jnp.asarray(others[path])


def _check_shape(path: str, mask: Array, param: Array) -> None:
    if mask.shape != param.shape:
        raise ValueError(
            f"finalize needs leaves of the same shape, but at {path!r} params has shape"
            f" {param.shape} and like {mask.shape}."
        )
