"""Scores of a whole network, computed once: from a loss and a batch, or at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._core import trees
from .._core.types import Number
from ._plain import product
from ._tracked import drawn, leaf_key

Loss = Callable[..., Array]


def snip(loss: Loss, params: PyTree, batch: Any) -> PyTree:
    """Scores an entry by how much the loss changes, to first order, if it becomes zero.

    s = |θ·g| / Σ |θ·g|, g = ∇L(θ; batch)

    Use it to prune once before training: `clipjax.prune` with `allocations.global_`.

    Leaves that are not floating are returned as they are.  An entry whose gradient is
    not finite has a score that is not finite; the sum leaves it out.

    Args:
        loss: a function of the parameters and the batch that returns a scalar.
        params: the parameters θ.
        batch: one batch; the paper's has 100 to 128 examples.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> loss = lambda params, batch: jnp.sum(params["w"] * batch)
        >>> params, batch = {"w": jnp.array([1.0, -3.0])}, jnp.array([2.0, 2.0])
        >>> clipjax.scores.snip(loss, params, batch)["w"]
        Array([0.25, 0.75], dtype=float32)

    Reference:
        Namhoon Lee, Thalaiyasingam Ajanthan, Philip H. S. Torr, SNIP: Single-shot
        Network Pruning based on Connection Sensitivity, 2018,
        https://arxiv.org/abs/1810.02340
    """
    leaves = trees.floats(params)
    grads = jax.grad(_of_leaves(loss, params, batch))(leaves)
    result = {path: jnp.abs(product(x, grads[path])) for path, x in leaves.items()}
    finite = [jnp.where(jnp.isfinite(x), x, 0) for x in result.values()]
    total = sum((jnp.sum(x).astype(jnp.float32) for x in finite), jnp.float32(0))
    # All zero, or beyond float32: the scores are compared as they are.
    usable = (total > 0) & jnp.isfinite(total)
    unit = jnp.where(usable, total, 1)
    result = {path: x / unit.astype(x.dtype) for path, x in result.items()}
    return trees.map_by_path(lambda _, score: score, params, result)


def grasp(
    loss: Loss, params: PyTree, batch: Any, temperature: Number = 200.0
) -> PyTree:
    """Scores an entry by how much the norm of the gradient falls if it becomes zero.

    s = θ·(H·g), g = ∇L(θ; batch), H = ∇²L(θ; batch)

    Use it to prune once before training: `clipjax.prune` with `allocations.global_`.

    Scores are signed; the paper's are -s, of which it removes the highest.  H·g costs
    about three gradients: the Hessian itself is never formed.  Leaves that are not
    floating are returned as they are.

    Args:
        loss: a function of the parameters, the batch and the temperature T that divides
            its logits by T and returns a scalar.
        params: the parameters θ.
        batch: one batch; the paper's has 10 to 25 examples a class.
        temperature: T > 0, the paper's 200, which keeps a softmax from saturating.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> loss = lambda params, batch, temperature: jnp.sum(params["w"] ** 3) / 3
        >>> params = {"w": jnp.array([1.0, -2.0])}
        >>> clipjax.scores.grasp(loss, params, None)["w"]  # θ·2θ·θ²
        Array([ 2., 32.], dtype=float32)

    Reference:
        Chaoqi Wang, Guodong Zhang, Roger Grosse, Picking Winning Tickets Before
        Training by Preserving Gradient Flow, 2020, https://arxiv.org/abs/2002.07376
    """
    leaves = trees.floats(params)
    grad = jax.grad(_of_leaves(loss, params, batch, temperature))
    _, curved = jax.jvp(grad, (leaves,), (grad(leaves),))
    result = {path: jnp.real(product(x, curved[path])) for path, x in leaves.items()}
    return trees.map_by_path(lambda _, score: score, params, result)


def random(key: Any, params: PyTree) -> PyTree:
    """Scores every entry at random, entries that are zero below all others.

    s ~ U(0, 1] where θ ≠ 0, s ~ U(-1, 0] where θ = 0

    Use it for a random mask: `clipjax.prune`, as a baseline for other scores.

    A score depends on the key, the path of the leaf and the place in the leaf, not on
    the rest of the tree.  Leaves that are not floating are returned as they are.

    Args:
        key: a key from `jax.random.key`.
        params: the parameters θ.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> params = {"w": jnp.array([1.0, 0.0])}
        >>> clipjax.scores.random(jax.random.key(0), params)["w"] > 0
        Array([ True, False], dtype=bool)
    """
    leaves = trees.floats(params)
    result = {path: drawn(leaf_key(key, path), x) for path, x in leaves.items()}
    return trees.map_by_path(lambda _, score: score, params, result)


def _of_leaves(loss: Loss, params: PyTree, *rest: Any) -> Loss:
    """Returns the loss as a function of the floating leaves, by path."""

    def of_leaves(leaves):
        return loss(trees.map_by_path(lambda _, x: x, params, leaves), *rest)

    return of_leaves
