"""What the transforms of a chain measured, read from the optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from .._core import trees


def metrics(opt_state: PyTree) -> dict[str, Array]:
    """Returns what clipjax's transforms measured in the last step, as a flat dict.

    | key                 | meaning                                                    |
    | ------------------- | ---------------------------------------------------------- |
    | `norm`              | global norm of the update before the clip                  |
    | `clipped_norm`      | global norm of the update after the clip                   |
    | `threshold`         | the bound that was in force                                |
    | `clipped_share`     | share of all steps so far that were clipped                |
    | `nonfinite_steps`   | number of all steps so far with a NaN or an infinity       |
    | `sparsity`          | share of zeros in all leaves that are made sparse          |
    | `sparsity/<path>`   | share of zeros in each of them                             |

    Use it to log a training, inside `jax.jit` or outside: it only reads the state, and
    computes nothing anew.

    Norm and threshold are those of the last step that was finite.  A clip by
    `norms.inf_norm` or `norms.spectral_norm` reports the largest such norm of its parts
    as `norm` and `clipped_norm`.  If two transforms of a chain measure the same, the
    place of their state precedes each key, as in `0/norm`.  A state without transforms
    of clipjax gives an empty dict.

    Args:
        opt_state: the state of any optimizer, or `optimizer.opt_state` of an
            `nnx.Optimizer`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import clipjax
        >>> tx = optax.chain(clipjax.clip_by_global_norm(1.0), optax.sgd(0.1))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> {name: float(value) for name, value in clipjax.metrics(state).items()}
        {'norm': 5.0, 'clipped_norm': 1.0, 'threshold': 1.0, 'clipped_share': 1.0,
        'nonfinite_steps': 0.0}
    """
    if isinstance(opt_state, optax.GradientTransformation):
        raise TypeError(
            "opt_state must be the state of an optimizer, but is the optimizer itself."
            " Pass what `tx.init(params)` or `tx.update(...)` returned."
        )
    found = [
        (trees.path(keys).removesuffix("/clip"), dict(_plain(state).measured()))
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
    return callable(getattr(node, "measured", None))


def _plain(state: Any) -> Any:
    """Takes arrays out of the variables in which NNX keeps them."""
    return state._make(
        {path: _array(own) for path, own in field.items()}
        if isinstance(field, dict)
        else _array(field)
        for field in state
    )


def _array(variable: Any) -> Array:
    (array,) = jax.tree.leaves(variable)
    return array
