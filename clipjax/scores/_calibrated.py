"""Scores of kernels from the inputs of their layers: one pass over data, no training.

A kernel has its outputs on the last axis, as in Flax; all axes before it are inputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._core import checks as check, trees
from .._core.types import Number


def wanda(params: PyTree, input_norms: PyTree) -> PyTree:
    """Scores an entry by its magnitude times the norm of the input that it weighs.

    sᵢⱼ = |Wᵢⱼ|·‖xᵢ‖₂

    Use it to prune a trained network once: `clipjax.prune` with `patterns.FanIn()`
    compares the inputs of one output with each other, as the paper does;
    `patterns.NofM(2, 4, axis=-2)` gives two of four.

    Args:
        params: the parameters; a kernel W has its outputs on the last axis.
        input_norms: a tree with the paths of the kernels to prune.  Each leaf holds the
            norms of the kernel's inputs over all examples, in the shape of all its axes
            but the last, or of the one before the last.

    Returns:
        A tree like `params`, with `None` where `input_norms` has no leaf:
        `clipjax.prune` leaves these dense.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
        >>> clipjax.scores.wanda(params, {"kernel": jnp.array([10.0, 1.0])})["kernel"]
        Array([[10. , 20. ],
               [ 3. ,  0.5]], dtype=float32)

    Reference:
        Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter, A Simple and Effective
        Pruning Approach for Large Language Models, 2023,
        https://arxiv.org/abs/2306.11695
    """
    norms = trees.by_path(input_norms)

    def score(path, kernel):
        norm = jnp.asarray(norms[path])
        if kernel.ndim < 2 or norm.shape not in (
            kernel.shape[:-1],
            kernel.shape[-2:-1],
        ):
            raise ValueError(
                f"input_norms needs one norm for each input, but at {path!r} has shape"
                f" {norm.shape} for a kernel of shape {kernel.shape}. Pass norms of"
                f" shape {kernel.shape[-2:-1]} or {kernel.shape[:-1]}."
            )
        magnitude = jnp.abs(trees.wide(kernel))
        shape = (1,) * (kernel.ndim - 1 - norm.ndim) + (*norm.shape, 1)
        return magnitude * norm.reshape(shape).astype(magnitude.dtype)

    return _scored(params, norms.keys(), score)


def sparse_gpt(params: PyTree, grams: PyTree, damping: Number = 0.01) -> PyTree:
    """Scores an entry by the error of its layer after the other entries make up for it.

    sᵢⱼ = Wᵢⱼ² / [H⁻¹]ᵢᵢ, H = XᵀX + λI, λ = damping · mean(diag XᵀX)

    Use it to prune a trained network once: `clipjax.prune` with `patterns.FanIn()`, or
    with `patterns.NofM(2, 4, axis=-2)` for two of four.

    This is the optimal brain surgeon's score for the squared error of a layer's output.
    It only says which entries go; it does not change the ones that stay.  The entries
    of an input that was always zero rank lowest.

    Args:
        params: the parameters; a kernel W has its outputs on the last axis.
        grams: a tree with the paths of the kernels to prune.  Each leaf is the matrix
            XᵀX of the kernel's inputs, [inputs, inputs]; all axes of a kernel but the
            last count as inputs, in their order.
        damping: ≥ 0; the paper's 0.01.  With 0, a matrix that cannot be inverted gives
            scores of NaN.

    Returns:
        A tree like `params`, with `None` where `grams` has no leaf: `clipjax.prune`
        leaves these dense.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> kernel, gram = jnp.array([[2.0], [3.0]]), jnp.diag(jnp.array([4.0, 1.0]))
        >>> params, grams = {"kernel": kernel}, {"kernel": gram}
        >>> clipjax.scores.sparse_gpt(params, grams, damping=0.0)["kernel"]
        Array([[16.],
               [ 9.]], dtype=float32)

    Reference:
        Elias Frantar, Dan Alistarh, SparseGPT: Massive Language Models Can Be
        Accurately Pruned in One-Shot, 2023, https://arxiv.org/abs/2301.00774
    """
    check.not_negative(damping=damping)
    squares = trees.by_path(grams)

    def score(path, kernel):
        gram = trees.wide(jnp.asarray(squares[path]))
        inputs = kernel.size // max(kernel.shape[-1], 1) if kernel.ndim else 0
        if kernel.ndim < 2 or gram.shape != (inputs, inputs):
            raise ValueError(
                f"grams needs a matrix of {inputs} by {inputs} inputs at {path!r}, for"
                f" a kernel of shape {kernel.shape}, but has shape {gram.shape}."
            )
        gain = 1 / _inverse_diagonal(gram, damping)
        magnitude = jnp.abs(trees.wide(kernel))
        gain = gain.reshape(*kernel.shape[:-1], 1).astype(magnitude.dtype)
        return jnp.square(magnitude) * gain

    return _scored(params, squares.keys(), score)


def _inverse_diagonal(gram: Float[Array, "n n"], damping: Number) -> Float[Array, " n"]:
    """Returns the diagonal of the inverse; infinity for an input that was always 0."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    mean = jnp.mean(diagonal)
    extra = jnp.asarray(damping).astype(gram.dtype) * mean + dead.astype(gram.dtype)
    lower = jnp.linalg.cholesky(gram + jnp.diag(extra))
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    return jnp.where(dead, jnp.inf, jnp.sum(jnp.square(inverse), axis=0))


def _scored(params: PyTree, paths, score) -> PyTree:
    """Scores the leaves that are named; `None` for the others."""
    known = trees.by_path(params)
    for path in paths:
        if path not in known:
            raise ValueError(
                f"There is no parameter at {path!r}. The paths are {sorted(known)}."
            )

    def one(keys, leaf):
        path = trees.path(keys)
        return score(path, jnp.asarray(leaf)) if path in paths else None

    return jax.tree_util.tree_map_with_path(one, params)
