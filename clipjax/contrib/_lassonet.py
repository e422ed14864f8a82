"""The penalty of LassoNet: an input feature may be used only as far as its skip weight.

A network with a linear skip connection from its inputs to its outputs; a feature whose
skip weights are zero has no weights in the first layer either, and is out.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import norms
from .._core import checks as check, trees
from .._core.types import Number
from ..prox._entries import like


def lassonet(
    skip: Float[Array, "features ..."],
    kernel: Float[Array, "features units"],
    strength: Number,
    bound: Number = 10.0,
) -> tuple[Float[Array, "features ..."], Float[Array, "features units"]]:
    """Returns the nearest skip weights and kernel in the hierarchy, after shrinkage.

    For each feature j, with rows θⱼ and Wⱼ,

    argmin ½·‖b - θⱼ‖² + ½·‖V - Wⱼ‖² + λ·‖b‖₂ over all b, V with ‖V‖_∞ ≤ M·‖b‖₂

    With β the largest of (‖θⱼ‖ - λ + M·Sₖ) / (1 + k·M²) for k = 0, 1, …, where Sₖ is
    the sum of the k largest |Wⱼᵢ|, and 0 at least:

    b = β·θⱼ/‖θⱼ‖, V = sign(Wⱼ)·min(|Wⱼ|, M·β)

    In float32 or wider; a feature with β = 0 is exactly zero in both.  Where θⱼ is
    zero, and so has no direction, θⱼ and Wⱼ become zero.  A NaN makes its feature NaN.

    Call it after each step, with λ times the learning rate.  The rows of the kernel are
    sorted: on a mesh, split it along its features.

    Args:
        skip: θ, from each feature to every output.
        kernel: W, of the first layer.
        strength: λ ≥ 0, times the learning rate.
        bound: M ≥ 0; 0 for a linear model, and the larger, the less linear.

    Example:
        >>> skip = jnp.array([[3.0], [0.5]])
        >>> kernel = jnp.array([[1.0, -9.0], [0.25, 0.25]])
        >>> lassonet(skip, kernel, 1.0, bound=1.0)
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
    size = norms.unit_norm(wide_skip, rows).reshape(-1, 1)
    magnitude = jnp.abs(wide_kernel)
    m = like(bound, magnitude)
    descending = -jnp.sort(-magnitude, axis=-1)
    sums = jnp.cumsum(descending, axis=-1)
    number = jnp.arange(1, kernel.shape[1] + 1, dtype=magnitude.dtype)[None]
    left = size - like(strength, size)
    roots = (left + m * sums) / (1 + m * m * number)
    # A row is convex piecewise; the minimum of the lines has the largest of the roots.
    beta = jnp.maximum(left, jnp.max(roots, axis=-1, keepdims=True, initial=-jnp.inf))
    beta = jnp.where(size == 0, 0, jnp.maximum(beta, 0))
    new_kernel = jnp.copysign(jnp.minimum(magnitude, m * beta), wide_kernel)
    factor = (beta / jnp.where(size == 0, 1, size)).reshape(-1, *[1] * len(rows))
    new_kernel = jnp.where(beta == 0, jnp.zeros_like(new_kernel), new_kernel)
    new_skip = jnp.where(factor == 0, jnp.zeros_like(wide_skip), wide_skip * factor)
    return new_skip.astype(skip.dtype), new_kernel.astype(kernel.dtype)
