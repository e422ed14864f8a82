"""Gates that learn whether to be open: hard concrete L0 regularization.

A gate multiplies what it may switch off: a weight, an input, a neuron.  Its parameter
log α lives in the user's tree.  In training, multiply by `sample(key, log_alpha)` and
add λ·`expected_l0(log_alpha)` to the loss; afterwards, multiply by
`evaluate(log_alpha)`.

The distribution is hard concrete: a sigmoid of logistic noise, stretched from (0, 1) to
(γ, ζ) and clipped to [0, 1], so that exactly 0 and exactly 1 have a probability.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from .._core import checks as check, sharding, trees
from .._core.types import Number

__all__ = [
    "evaluate",
    "expected_l0",
    "open_probability",
    "sample",
]


_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # of the paper


def sample(
    key: Key[Array, ""] | UInt32[Array, "2"],
    log_alpha: Float[Array, "..."],
    *,
    temperature: Number = _TEMPERATURE,
    low: Number = _LOW,
    high: Number = _HIGH,
) -> Float[Array, "..."]:
    """Draws gates for one step of training.

    z = min(1, max(0, s·(ζ - γ) + γ)), s = σ((log v - log(1 - v) + log α) / β), for v
    uniform in (0, 1)

    The gradient by log α is zero for a gate that is exactly 0 or 1.  Computed in
    float32 or wider; a NaN stays NaN.

    Args:
        key: a key, another one in every step.
        log_alpha: log α of each gate; log(p / (1 - p)) starts with gates near p.
        temperature: β > 0; the nearer to 0, the more gates are exactly 0 or 1.
        low: γ ≤ 0, the lower end of the stretched interval.
        high: ζ ≥ 1, the upper end of the stretched interval.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.contrib.gates.sample(jax.random.key(0), jnp.array([-9.0, 9.0]))
        Array([0., 1.], dtype=float32)

    Reference:
        Christos Louizos, Max Welling, Diederik P. Kingma, Learning Sparse Neural
        Networks through L₀ Regularization, 2018, https://arxiv.org/abs/1712.01312
    """
    _check(temperature, low, high)
    logits = trees.wide(log_alpha)
    noise = jax.random.logistic(key, logits.shape, logits.dtype)
    noisy = (sharding.like(noise, logits) + logits) / trees.like(temperature, logits)
    return _stretched(noisy, low, high).astype(log_alpha.dtype)


def evaluate(
    log_alpha: Float[Array, "..."], *, low: Number = _LOW, high: Number = _HIGH
) -> Float[Array, "..."]:
    """Returns the gates to use after training, without noise.

    ẑ = min(1, max(0, σ(log α)·(ζ - γ) + γ)): exactly zero up to log α = log(-γ / ζ)

    Args:
        log_alpha: log α of each gate.
        low: γ, the same as for `sample`.
        high: ζ, the same as for `sample`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.contrib.gates.evaluate(jnp.array([-3.0, 0.0, 3.0]))
        Array([0. , 0.5, 1. ], dtype=float32)
    """
    _check(1.0, low, high)
    return _stretched(trees.wide(log_alpha), low, high).astype(log_alpha.dtype)


def open_probability(
    log_alpha: Float[Array, "..."],
    *,
    temperature: Number = _TEMPERATURE,
    low: Number = _LOW,
    high: Number = _HIGH,
) -> Float[Array, "..."]:
    """Returns the probability that a sampled gate is not zero.

    P(z ≠ 0) = σ(log α - β·log(-γ / ζ))

    Use it in place of `expected_l0` where gates switch different numbers of weights:
    add λ times the sum of these numbers times these probabilities to the loss.

    Args:
        log_alpha: log α of each gate.
        temperature: β, the same as for `sample`.
        low: γ, the same as for `sample`.
        high: ζ, the same as for `sample`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> log_alpha = jnp.zeros(2)
        >>> open_probability = clipjax.contrib.gates.open_probability
        >>> share = open_probability(log_alpha, temperature=1.0, low=-1.0, high=3.0)
        >>> share.round(5)  # σ(0 - log(1 / 3))
        Array([0.75, 0.75], dtype=float32)
    """
    _check(temperature, low, high)
    logits = trees.wide(log_alpha)
    shift = jnp.log(-trees.like(low, logits) / trees.like(high, logits))
    return jax.nn.sigmoid(logits - trees.like(temperature, logits) * shift)


def expected_l0(
    log_alpha: Float[Array, "..."],
    *,
    temperature: Number = _TEMPERATURE,
    low: Number = _LOW,
    high: Number = _HIGH,
) -> Float[Array, ""]:
    """Returns the expected number of gates that are not zero, in float32 or wider.

    E‖z‖₀ = Σᵢ P(zᵢ ≠ 0), the penalty to add to the loss, times λ

    Args:
        log_alpha: log α of each gate.
        temperature: β, the same as for `sample`.
        low: γ, the same as for `sample`.
        high: ζ, the same as for `sample`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.contrib.gates.expected_l0(jnp.array([-30.0, 30.0, 30.0]))
        Array(2., dtype=float32)
    """
    return jnp.sum(
        open_probability(log_alpha, temperature=temperature, low=low, high=high)
    )


def _check(temperature: Number, low: Number, high: Number) -> None:
    check.positive(temperature=temperature)
    check.between(-float("inf"), 0, low=low)
    check.at_least(1, high=high)


def _stretched(logits: Array, low: Number, high: Number) -> Array:
    gamma, zeta = trees.like(low, logits), trees.like(high, logits)
    return jnp.clip(jax.nn.sigmoid(logits) * (zeta - gamma) + gamma, 0, 1)


def __dir__() -> list[str]:
    return __all__
