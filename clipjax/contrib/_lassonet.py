"""The penalty of LassoNet: the skip weight of a feature bounds its other weights.

For a network with a linear skip connection from its inputs to its outputs.  A feature
whose skip weights are zero has no weights in the first layer either: it is not used.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import norms
from .._core import checks as check, trees
from .._core.trees import like
from .._core.types import Number


def lassonet(
    skip: Float[Array, "features ..."],
    kernel: Float[Array, "features units"],
    strength: Number,
    bound: Number = 10.0,
) -> tuple[Float[Array, "features ..."], Float[Array, "features units"]]:
    """Shrinks skip weights, and bounds the first layer's weights by them.

    For each feature j, with rows θⱼ and Wⱼ, returns the minimizers b and V of

    ½·‖b - θⱼ‖² + ½·‖V - Wⱼ‖² + λ·‖b‖₂ with ‖V‖_∞ ≤ M·‖b‖₂

    They are b = β·θⱼ/‖θⱼ‖ and V = sign(Wⱼ)·min(|Wⱼ|, M·β), where β is the largest of 0
    and (‖θⱼ‖ - λ + M·Sₖ) / (1 + k·M²) for k = 0, 1, …, and Sₖ is the sum of the k
    largest |Wⱼᵢ|.

    Use it to select features in a network that is not linear: call it after each step,
    with λ times the learning rate.

    Computed in float32 or wider.  A feature with β = 0 is exactly zero in both results,
    and so is one with θⱼ = 0.  A NaN makes its feature NaN.  The rows of the kernel are
    sorted: on a mesh, split the kernel along its features only.

    Args:
        skip: θ, the weights from each feature to the outputs.
        kernel: W, the weights of the first layer.
        strength: λ ≥ 0, times the learning rate.
        bound: M ≥ 0; 0 gives a linear model, larger values allow more of the rest.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> skip = jnp.array([[3.0], [0.5]])
        >>> kernel = jnp.array([[1.0, -9.0], [0.25, 0.25]])
        >>> clipjax.contrib.lassonet(skip, kernel, 1.0, bound=1.0)
        (Array([[5.5],
               [0. ]], dtype=float32), Array([[ 1. , -5.5],
               [ 0. ,  0. ]], dtype=float32))

    Reference:
        Ismael Lemhadri, Feng Ruan, Louis Abraham, Robert Tibshirani, LassoNet: A Neural
        Network with Feature Sparsity, 2021, https://arxiv.org/abs/1907.12207
    """
    check.not_negative(strength=strength, bound=bound)
    rows = tuple(range(1, skip.ndim))
    wide_skip, wide_kernel = trees.wide(skip), trees.wide(kernel)
    skip_norm = norms.unit_norm(wide_skip, rows).reshape(-1, 1)
    magnitude = jnp.abs(wide_kernel)
    m = like(bound, magnitude)
    descending = -jnp.sort(-magnitude, axis=-1)
    sums = jnp.cumsum(descending, axis=-1)
    number = jnp.arange(1, kernel.shape[1] + 1, dtype=magnitude.dtype)[None]
    left = skip_norm - like(strength, skip_norm)
    roots = (left + m * sums) / (1 + m * m * number)
    # The derivative in β is the least of these rising lines: it has the largest root.
    beta = jnp.maximum(left, jnp.max(roots, axis=-1, keepdims=True, initial=-jnp.inf))
    beta = jnp.where(skip_norm == 0, 0, jnp.maximum(beta, 0))
    new_kernel = jnp.copysign(jnp.minimum(magnitude, m * beta), wide_kernel)
    factor = beta / jnp.where(skip_norm == 0, 1, skip_norm)
    factor = factor.reshape(-1, *[1] * len(rows))
    new_kernel = jnp.where(beta == 0, jnp.zeros_like(new_kernel), new_kernel)
    new_skip = jnp.where(factor == 0, jnp.zeros_like(wide_skip), wide_skip * factor)
    return new_skip.astype(skip.dtype), new_kernel.astype(kernel.dtype)
