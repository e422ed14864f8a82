"""Clipping of attention logits, at their source: the weights of queries and keys.

No transform of updates: the largest logit is a statistic of the forward pass, and what
is scaled is the parameter itself, after the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree, Shaped

from .._core import checks as check, trees
from .._core.types import Number

_Power = float | int | Shaped[np.ndarray, "..."] | Shaped[Array, "..."]
_Logits = Shaped[np.ndarray, "*layers heads"] | Shaped[Array, "*layers heads"]


def _flax_powers(path: str, leaf: Array) -> float:
    """Shares a head's factor evenly between the two projections of Flax's attention."""
    del leaf
    return 0.5 if path.split("/")[-2:-1] in (["query"], ["key"]) else 0.0


def qk_clip(
    params: PyTree,
    max_logits: Mapping[str, _Logits],
    *,
    threshold: Number = 100.0,
    powers: Callable[[str, Array], _Power] = _flax_powers,
    head_axis: int = -2,
) -> PyTree:
    """Scales queries and keys down in each head whose largest logit was above τ.

    W ← W · γₕᵖ, γₕ = min(1, τ / Sₕ), for the largest logit Sₕ of head h

    Use it after the optimizer's step, in attention without normalized queries and keys.

    A logit is bilinear in the weights and biases of query and key: if the powers p of
    the two add up to 1, it is scaled by γₕ, and the same batch then gives at most τ,
    apart from the rounding of the weights.  Keep them in float32: in bfloat16, terms
    that cancel can leave more.

    If several query heads share a key head, the group takes the least γ of its heads,
    as in Megatron-LM.  With a power of 1 for queries and 0 for keys each head keeps its
    own.

    A head with Sₕ ≤ τ passes bit for bit.  So does one whose Sₕ is NaN, infinite, or
    not above 0.  A traced τ that is not above 0 clips nothing.

    Args:
        params: the parameters of any network.
        max_logits: Sₕ by the path of the attention layer, `""` for the whole tree: the
            maximum over batch and positions of what goes into the softmax, without mask
            and soft cap.  Its shape is (heads,); for layers stacked along the leading
            axes of their leaves, (layers, heads).
        threshold: τ > 0, a number or a traced value.
        powers: a function of path and leaf that returns p in [0, 1], a number or an
            array that broadcasts to the leaf.  By default ½ for leaves in `query` and
            `key`, as Flax calls them, and 0 for others.  Multi-head latent attention
            has ½ for the parts of query and key without position, 1 for the rotary part
            of the query and 0 for the rotary key, which all heads share.
        head_axis: the axis of the heads in leaves that have a power; -2 is Flax's, for
            kernels (features, heads, head_dim) and biases (heads, head_dim).

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> attention = {
        ...     "query": {"kernel": jnp.full((1, 2, 1), 8.0)},
        ...     "key": {"kernel": jnp.full((1, 2, 1), 4.0)},
        ... }
        >>> logits = {"attention": jnp.array([400.0, 50.0])}
        >>> clipped = clipjax.contrib.qk_clip({"attention": attention}, logits)
        >>> for name, leaf in clipped["attention"].items():
        ...     print(name, leaf["kernel"][0, :, 0])  # √(100/400) = ½ in the first head
        key [2. 4.]
        query [4. 8.]

    Reference:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025,
        https://arxiv.org/abs/2507.20534
    """
    check.positive(threshold=threshold)
    check.function(powers=powers)
    chosen = {layer: {} for layer in max_logits}
    for path, leaf in trees.floats(params).items():
        layer = _layer(path, max_logits)
        if layer is not None and _acts(power := powers(path, leaf)):
            chosen[layer][path] = (leaf, power)
    factors: dict[str, Array] = {}
    for layer, found in max_logits.items():
        logits = jnp.asarray(found)
        heads = {
            path: _heads(path, leaf, head_axis, layer, logits)
            for path, (leaf, _) in chosen[layer].items()
        }
        if not heads:
            raise ValueError(
                f"max_logits names {layer!r}, but no leaf under that path has a power."
                " Name the attention layers by their paths, or give `powers`."
            )
        bound, loudest = _bounded(logits, threshold, min(heads.values()))
        for path, (leaf, power) in chosen[layer].items():
            repeats = heads[path] // loudest.shape[-1]
            own = jnp.repeat(loudest, repeats, axis=-1)
            factors[path] = _factor(bound, own, power, leaf, head_axis)
    return trees.map_by_path(_scale, params, factors)


def _layer(path: str, layers: Mapping[str, Any]) -> str | None:
    """Returns the innermost of the layers that a leaf belongs to."""
    above = [name for name in layers if not name or path.startswith(f"{name}/")]
    return max(above, key=len, default=None)


def _acts(power: _Power) -> bool:
    return isinstance(power, Tracer) or bool(np.any(power))


def _bounded(
    logits: Array, threshold: Number, groups: int
) -> tuple[Float[Array, ""], Float[Array, "*layers groups"]]:
    """Returns τ, and the largest logit of each group of heads: τ at least, and finite.

    ∞ for a τ that is not above 0.
    """
    logits = trees.wide(logits)
    bound = jnp.asarray(threshold).astype(logits.dtype)
    bound = jnp.where(bound > 0, bound, jnp.inf)
    usable = (logits > bound) & jnp.isfinite(logits)
    loud = jnp.where(usable, logits, bound)
    return bound, jnp.max(loud.reshape(*loud.shape[:-1], groups, -1), axis=-1)


def _factor(
    bound: Float[Array, ""],
    logits: Float[Array, "*layers heads"],
    power: _Power,
    leaf: Array,
    head_axis: int,
) -> Float[Array, "..."]:
    """Returns (τ / S)ᵖ, where S is above τ, in a shape that broadcasts to the leaf."""
    shape = [1] * leaf.ndim
    shape[: logits.ndim - 1] = logits.shape[:-1]
    shape[head_axis] = logits.shape[-1]
    logits = logits.reshape(shape)
    power = jnp.asarray(power).astype(logits.dtype)
    power = power.reshape([1] * (leaf.ndim - power.ndim) + list(power.shape))
    # Power by power: τ / S may be subnormal. No 0/0, for S > τ > 0.
    factor = bound**power / logits**power
    return jnp.where(logits > bound, factor, 1)


def _scale(leaf: Array, factor: Float[Array, "..."]) -> Array:
    """Scales where the factor is below 1: a product with 1 may lose a subnormal."""
    return jnp.where(factor < 1, trees.scale(leaf, factor), leaf)


def _heads(path: str, leaf: Array, head_axis: int, layer: str, logits: Array) -> int:
    """Returns how many heads a leaf has; raises unless they share the layer's."""
    shape, stacked = logits.shape, logits.ndim - 1
    fits = stacked >= 0 and -leaf.ndim <= head_axis < leaf.ndim
    fits = fits and stacked <= head_axis % leaf.ndim
    fits = fits and leaf.shape[:stacked] == shape[:-1]
    heads = leaf.shape[head_axis] if fits else 0
    if not heads or shape[-1] % heads:
        raise ValueError(
            f"max_logits of {layer!r} has shape {shape}, which does not fit the leaf at"
            f" {path!r} of shape {leaf.shape} with its heads on axis {head_axis}. Give"
            " a number for each query head, and `head_axis`."
        )
    return heads
