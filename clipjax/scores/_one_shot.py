"""Scores of a whole network, computed once: from a loss and a batch, or at random."""

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
    """Scores every entry by how much the loss changes where it becomes zero.

    s = |θ·g| / Σ |θ·g|, g = ∇L(θ; batch)

    For `clipjax.prune`, at the start of training and with `allocations.global_`.
    Leaves that are not floating are returned as they are.  Where a gradient is not
    finite, so is its score, and the sum leaves it out.

    Args:
        loss: of parameters and a batch, a scalar.
        params: the parameters θ.
        batch: one batch; the paper's is of 100 to 128 examples.

    Example:
        >>> loss = lambda params, batch: jnp.sum(params["w"] * batch)
        >>> snip(loss, {"w": jnp.array([1.0, -3.0])}, jnp.array([2.0, 2.0]))["w"]
        Array([0.25, 0.75], dtype=float32)

    Reference:
        Namhoon Lee, Thalaiyasingam Ajanthan, Philip H. S. Torr, SNIP: Single-shot
        Network Pruning based on Connection Sensitivity, 2018,
        https://arxiv.org/abs/1810.02340
    """
    leaves = trees.floats(params)
    slopes = jax.grad(_of_leaves(loss, params, batch))(leaves)
    result = {path: jnp.abs(product(x, slopes[path])) for path, x in leaves.items()}
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
    """Scores every entry by how much the gradient shrinks where it becomes zero.

    s = θ·(H·g), g = ∇L(θ; batch), H = ∇²L(θ; batch)

    The paper removes the highest -θ·(H·g); the scores are signed.  One product with the
    Hessian, by forward over reverse: no Hessian is formed.  For `clipjax.prune`, at the
    start of training and with `allocations.global_`.  Leaves that are not floating are
    returned as they are.

    Args:
        loss: of parameters, a batch and the temperature T, a scalar: it divides the
            logits by T.
        params: the parameters θ.
        batch: one batch; the paper's is of ten to 25 examples a class.
        temperature: T > 0, the paper's 200: it keeps the softmax away from certainty.

    Example:
        >>> loss = lambda params, batch, temperature: jnp.sum(params["w"] ** 3) / 3
        >>> grasp(loss, {"w": jnp.array([1.0, -2.0])}, None)["w"]  # θ·2θ·θ²
        Array([ 2., 32.], dtype=float32)

    Reference:
        Chaoqi Wang, Guodong Zhang, Roger Grosse, Picking Winning Tickets Before
        Training by Preserving Gradient Flow, 2020, https://arxiv.org/abs/2002.07376
    """
    leaves = trees.floats(params)
    slope = jax.grad(_of_leaves(loss, params, batch, temperature))
    _, curved = jax.jvp(slope, (leaves,), (slope(leaves),))
    result = {path: jnp.real(product(x, curved[path])) for path, x in leaves.items()}
    return trees.map_by_path(lambda _, score: score, params, result)


def random(key: Any, params: PyTree) -> PyTree:
    """Scores every entry at random, and what is zero below all the rest.

    s ~ U(0, 1] where θ ≠ 0, s ~ U(-1, 0] where θ = 0

    The number of an entry depends on the path of its leaf and its place in it, not on
    the rest of the tree.  Leaves that are not floating are returned as they are.

    Args:
        key: as `jax.random.key` makes it.
        params: the parameters θ.

    Example:
        >>> scores = random(jax.random.key(0), {"w": jnp.array([1.0, 0.0])})
        >>> scores["w"] > 0
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
