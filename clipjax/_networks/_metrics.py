"""What the transforms of a chain measured, read from the optimizer's state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._clipping._engine import ClipState
from .._core import trees
from .._proximal import ProximalState
from .._sparsity._store import SparsifyState

_STATES = (ClipState, SparsifyState, ProximalState)


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Returns what clipjax's transforms measured in the last step, as a flat dict.

    | key                 | of the last step, if not said otherwise                    |
    | ------------------- | ---------------------------------------------------------- |
    | `norm`              | global norm of the update before the clip                  |
    | `clipped_norm`      | and after it                                               |
    | `threshold`         | the bound that was in force                                |
    | `clipped_share`     | share of all steps so far that were clipped                |
    | `nonfinite_steps`   | number of all steps so far with a NaN or an infinity       |
    | `sparsity`          | share of zeros in all leaves that are made sparse          |
    | `sparsity/<path>`   | and in each of them                                        |

    Nothing is computed anew, so it costs nothing, inside `jax.jit` and outside of it.
    Norm and threshold are those of the last step that was finite.  A clip by another
    norm than the Euclidean, by `norms.inf_norm` or `norms.spectral_norm`, reports the
    largest such norm of what it measures as `norm` and `clipped_norm`.  Where two
    transforms of a chain measure the same, each key is preceded by the place of its
    state, as in `0/norm`.  A state without transforms of ours gives an empty dict.

    Args:
        opt_state: the state of any optimizer, or `optimizer.opt_state` of an
            `nnx.Optimizer`.

    Example:
        >>> import optax
        >>> from clipjax import clip_by_global_norm
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> {name: float(value) for name, value in metrics(state).items()}
        {'norm': 5.0, 'clipped_norm': 1.0, 'threshold': 1.0, 'clipped_share': 1.0, \
'nonfinite_steps': 0.0}
    """
    found = [
        (trees.path(keys).removesuffix("/clip"), _of_state(state))
        for keys, state in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_ours)
        if _ours(state)
    ]
    result = {}
    for place, values in found:
        for name, value in values.items():
            shared = sum(name in others for _, others in found) > 1
            result[f"{place}/{name}" if shared else name] = value
    return result


def _ours(node: Any) -> bool:
    return isinstance(node, _STATES)


def _of_state(state: ClipState | SparsifyState | ProximalState) -> dict[str, Array]:
    if isinstance(state, ClipState):
        return dict(_clip(state))
    if isinstance(state, ProximalState):
        return dict(_sparsity(state.prox_total_sparsity, state.prox_leaf_sparsity))
    return dict(_sparsity(state.total_sparsity, state.leaf_sparsity))


def _clip(state: ClipState) -> Iterator[tuple[str, Array]]:
    plain = ClipState(*(_plain(field) for field in state))
    steps = jnp.maximum(plain.step, 1).astype(jnp.float32)
    yield "norm", plain.norm
    yield "clipped_norm", plain.clipped_norm
    yield "threshold", plain.threshold
    yield "clipped_share", plain.clipped_steps.astype(jnp.float32) / steps
    yield "nonfinite_steps", plain.nonfinite_steps


def _sparsity(total: Any, leaves: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    yield "sparsity", _plain(total)
    for path, share in leaves.items():
        yield f"sparsity/{path}", _plain(share)


def _plain(field: Any) -> Array:
    """Takes an array out of the variable in which NNX keeps it."""
    (array,) = jax.tree.leaves(field)
    return array
