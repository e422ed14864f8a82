"""The published methods, and the parts that they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, Int

from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule

Weights = Inexact[Array, "..."]
Level = Float[Array, ""] | None


class Sets(NamedTuple):
    """Which entries of a leaf take part in a step."""

    kept: Bool[Array, "..."]  # not zero in the network
    explored: Bool[Array, "..."]  # get a gradient
    density: Float[Array, ""]  # share of the entries that are kept


Penalty = Callable[[Weights, Sets, Int[Array, ""]], Weights]
"""From latent weights, their sets and the step to what is added to the gradient."""

Threshold = Callable[[Weights, AxisName], Float[Array, ""]]
"""From the weights of a leaf at the start to the magnitude below which they go."""


@runtime_checkable
class Curve(Protocol):
    """An increasing function ψ of each latent weight, with ψ(0) = 0."""

    @property
    def level(self) -> Number | None:
        """Where a number ℓ that is learned for each leaf starts; `None` for none."""
        ...

    def latent(self, weights: Weights, level: Level) -> Weights:
        """Returns latent weights z with ψ(z) = θ."""
        ...

    def weights(self, latent: Weights, level: Level) -> Weights:
        """Returns ψ(z)."""
        ...

    def pull_back(
        self, gradient: Weights, latent: Weights, level: Level
    ) -> tuple[Weights, Weights | None]:
        """Returns the gradients of z and of ℓ, the latter one for each entry."""
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """ψ(z) = z: the latent weights are the weights before they are masked."""

    level = None

    def latent(self, weights: Weights, level: Level) -> Weights:
        """Returns the weights."""
        del level
        return weights

    def weights(self, latent: Weights, level: Level) -> Weights:
        """Returns the latent weights."""
        del level
        return latent

    def pull_back(
        self, gradient: Weights, latent: Weights, level: Level
    ) -> tuple[Weights, None]:
        """Returns the gradient."""
        del latent, level
        return gradient, None


@dataclasses.dataclass(frozen=True)
class Power:
    """ψ(z) = z·|z|^(α-1), with ψ′(z) = α·|z|^(α-1).

    Args:
        exponent: α ≥ 1.
    """

    exponent: Number

    level = None

    def __post_init__(self):
        check.at_least(1, exponent=self.exponent)

    def latent(self, weights: Weights, level: Level) -> Weights:
        """Returns the root of that degree."""
        del level
        size = jnp.abs(weights)
        return jnp.sign(weights) * size ** (1 / self._exponent(size))

    def weights(self, latent: Weights, level: Level) -> Weights:
        """Returns the power."""
        del level
        size = jnp.abs(latent)
        return latent * size ** (self._exponent(size) - 1)

    def pull_back(
        self, gradient: Weights, latent: Weights, level: Level
    ) -> tuple[Weights, None]:
        """Returns the gradient times the slope."""
        del level
        size = jnp.abs(latent)
        exponent = self._exponent(size)
        return gradient * (exponent * size ** (exponent - 1)), None

    def _exponent(self, like: Array) -> Array:
        return jnp.asarray(self.exponent).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class SoftThreshold:
    """ψ(z) = sign(z)·max(|z| - σ(ℓ), 0), σ the logistic function.

    Args:
        level: where ℓ starts.
    """

    level: Number

    def latent(self, weights: Weights, level: Level) -> Weights:
        """Returns the weights, farther from zero by the threshold."""
        return weights + jnp.sign(weights) * _sigmoid(level, weights)

    def weights(self, latent: Weights, level: Level) -> Weights:
        """Returns what is above the threshold."""
        beyond = jnp.abs(latent) - _sigmoid(level, latent)
        return jnp.sign(latent) * jnp.maximum(beyond, 0)

    def pull_back(
        self, gradient: Weights, latent: Weights, level: Level
    ) -> tuple[Weights, Weights]:
        """Returns both gradients, zero where the weight is."""
        share = _sigmoid(level, latent)
        alive = jnp.where(jnp.abs(latent) > share, gradient, 0)
        return alive, -jnp.sign(latent) * alive * (share * (1 - share))


@dataclasses.dataclass(frozen=True)
class Reparametrization:
    """A method, by its parts; for `clipjax.latent`.

    Args:
        curve: ψ, such as `Identity()`, `Power(2.0)` or a value of your own.
        penalty: what is added to the gradient of the latent weights, if anything.
        backward_sparsity: the share of entries without a gradient, in [0, 1], among
            those that are not kept; `None` for a gradient everywhere.  This one and the
            next are numbers, traced values or schedules.
        hysteresis: h in [0, 1): an entry that is not kept returns only where its score
            is (1+h)/(1-h) times that of one that is.
        threshold: magnitudes below this are zero, in place of a sparsity: of each leaf,
            from its first weights on.

    Example:
        >>> import dataclasses
        >>> import clipjax
        >>> both = clipjax.latents.Reparametrization(
        ...     clipjax.latents.Power(2.0), hysteresis=0.1
        ... )
        >>> both == dataclasses.replace(
        ...     clipjax.latents.power_propagation(2.0), hysteresis=0.1
        ... )
        True
    """

    curve: Curve = Identity()
    penalty: Penalty | None = None
    backward_sparsity: Number | Schedule | None = None
    hysteresis: Number | Schedule = 0.0
    threshold: Threshold | None = None

    def __post_init__(self):
        check.has_method("pull_back", curve=self.curve)
        check.below_one(hysteresis=self.hysteresis)
        if self.backward_sparsity is not None:
            check.between(0, 1, backward_sparsity=self.backward_sparsity)
        for name in ("penalty", "threshold"):
            if (value := getattr(self, name)) is not None:
                check.function(**{name: value})


def straight_through() -> Reparametrization:
    """Masks the weights, and lets the gradient pass as if there were no mask.

    θ = m ⊙ z, ∂z = g

    Example:
        >>> import clipjax
        >>> clipjax.latents.straight_through() == clipjax.latents.Reparametrization()
        True

    Reference:
        Yoshua Bengio, Nicholas Léonard, Aaron Courville, Estimating or Propagating
        Gradients Through Stochastic Neurons for Conditional Computation, 2013,
        https://arxiv.org/abs/1308.3432
    """
    return Reparametrization()


def sr_ste(decay: Number | Schedule = 2e-4) -> Reparametrization:
    """Lets the gradient pass, and draws to zero what is masked, so that masks settle.

    θ = m ⊙ z, ∂z = g + λ·(1 - m) ⊙ z

    Made for N of M; it works with any pattern.

    Args:
        decay: λ ≥ 0; a number, a traced value or a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> kept = jnp.array([True, False])
        >>> sets = clipjax.latents.Sets(kept, kept, jnp.float32(0.5))
        >>> clipjax.latents.sr_ste(0.25).penalty(
        ...     jnp.array([3.0, 4.0]), sets, jnp.int32(0)
        ... )
        Array([0., 1.], dtype=float32)

    Reference:
        Aojun Zhou, Yukun Ma, Junnan Zhu, Jianbo Liu, Zhijie Zhang, Kun Yuan, Wenxiu
        Sun, Hongsheng Li, Learning N:M Fine-grained Structured Sparse Neural Networks
        From Scratch, 2021, https://arxiv.org/abs/2102.04010
    """
    check.not_negative(decay=decay)

    def penalty(latent, sets, step):
        return jnp.where(sets.kept, 0, _times(decay, step, latent))

    return Reparametrization(penalty=penalty)


def top_kast(
    backward_sparsity: Number | Schedule, decay: Number | Schedule = 1e-4
) -> Reparametrization:
    """Gives a gradient to what is kept and to the next largest, and to nothing else.

    θ = m ⊙ z, ∂z = b ⊙ (g + λ·z·(m + (1 - m)/D)), m ⊂ b

    b are the entries with the highest scores, a larger share than the share D of those
    that are kept.  The penalty holds back what explores.  The paper steps with plain
    SGD; momentum, and weight decay in the optimizer, move the other entries too.

    Args:
        backward_sparsity: the share of entries without a gradient, in [0, 1], at most
            the sparsity; at 1, only what is kept gets one; a number, a traced value
            or a schedule.
        decay: λ ≥ 0, a number, a traced value or a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> kept, explored = jnp.array([1, 0, 0]) > 0, jnp.array([1, 1, 0]) > 0
        >>> sets = clipjax.latents.Sets(kept, explored, jnp.float32(0.5))
        >>> rule = clipjax.latents.top_kast(0.5, decay=0.125)
        >>> rule.penalty(jnp.array([8.0, 4.0, 2.0]), sets, jnp.int32(0))
        Array([1., 1., 0.], dtype=float32)

    Reference:
        Siddhant M. Jayakumar, Razvan Pascanu, Jack W. Rae, Simon Osindero, Erich Elsen,
        Top-KAST: Top-K Always Sparse Training, 2020, https://arxiv.org/abs/2106.03517
    """
    check.not_negative(decay=decay)

    def penalty(latent, sets, step):
        density = jnp.where(sets.density > 0, sets.density, 1)  # nothing is kept
        scale = jnp.where(sets.kept, 1, 1 / density.astype(jnp.abs(latent).dtype))
        pulled = _times(decay, step, latent) * scale
        return jnp.where(sets.explored, pulled, 0)

    return Reparametrization(penalty=penalty, backward_sparsity=backward_sparsity)


def surgery(
    hysteresis: Number | Schedule = 0.1, deviations: Number | None = None
) -> Reparametrization:
    """Lets the gradient pass, and makes it hard to cross the threshold, either way.

    θ = m ⊙ z, ∂z = g; mᵢ ← 0 if |zᵢ| ≤ (1-h)·t, 1 if |zᵢ| > (1+h)·t, else mᵢ as it was

    What was pruned by mistake is spliced in again.  Two ways to t:

    - By a sparsity: t is such that the mask has exactly the number of entries that
      pattern, allocation and sparsity ask for, so it may follow a schedule and compare
      all layers.  The rule is met by comparing scores, of which those of kept entries
      count (1+h)/(1-h) fold.
    - By `deviations`: t = max(μ + c·σ, 0), of the magnitudes in a leaf when training
      starts.  How many entries are zero then follows from the training, and a layer may
      lose all of them.

    The paper changes masks with a falling probability (1 + γ·t)⁻¹, γ = 10⁻⁴; about as
    often does `latent(..., every=lambda step: 1.5 + 1e-4 * step)`.  It prunes biases
    too: choose them with `where`.

    Args:
        hysteresis: h in [0, 1), the paper's 0.1; a number, a traced value or a
            schedule.
        deviations: c, chosen for each network; `None` for a threshold by sparsity.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> rule = clipjax.latents.surgery(deviations=1.0)
        >>> rule.threshold(jnp.array([1.0, -3.0]), None)  # 2 + 1
        Array(3., dtype=float32)

    Reference:
        Yiwen Guo, Anbang Yao, Yurong Chen, Dynamic Network Surgery for Efficient DNNs,
        2016, https://arxiv.org/abs/1608.04493
    """
    if deviations is None:
        return Reparametrization(hysteresis=hysteresis)
    check.between(-100, 100, deviations=deviations)

    def threshold(weights, axis_name):
        mean = _mean(jnp.abs(weights), axis_name)
        spread = _mean(jnp.square(jnp.abs(weights) - mean), axis_name)
        count = jnp.asarray(deviations).astype(mean.dtype)
        bound = jnp.maximum(mean + count * jnp.sqrt(spread), 0)
        return trees.single(jnp.minimum(bound, jnp.finfo(bound.dtype).max))

    return Reparametrization(hysteresis=hysteresis, threshold=threshold)


def soft_threshold(level: Number = -3200.0) -> Reparametrization:
    """Learns a threshold for each leaf, and draws all weights towards zero by it.

    θ = sign(z)·max(|z| - σ(ℓ), 0), ∂z = g where θ ≠ 0, ∂ℓ = -σ′(ℓ)·Σ g·sign(θ)

    No sparsity is asked for: pass `None`.  Weight decay in the optimizer, which steps ℓ
    as it does the weights, brings ℓ from far below zero towards zero, and so the
    threshold from 0 towards 1/2; the gradient stops it.  Both together set the
    sparsity.  A weight of zero gets no gradient, and returns only if ℓ falls.

    The default is the authors' for a ResNet-50 of 90 % zeros: 100 epochs of ImageNet,
    weight decay 2.25e-5.  A short training needs a higher start, such as -10.

    Args:
        level: where ℓ starts, the same in all leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> curve = clipjax.latents.soft_threshold().curve
        >>> curve.weights(jnp.array([2.0, -0.25]), jnp.float32(0.0))  # σ(0) = 0.5
        Array([ 1.5, -0. ], dtype=float32)

    Reference:
        Aditya Kusupati, Vivek Ramanujan, Raghav Somani, Mitchell Wortsman, Prateek
        Jain, Sham Kakade, Ali Farhadi, Soft Threshold Weight Reparameterization for
        Learnable Sparsity, 2020, https://arxiv.org/abs/2002.03231
    """
    check.number(level=level)
    return Reparametrization(SoftThreshold(level))


def power_propagation(exponent: Number = 2.0) -> Reparametrization:
    """Raises the weights to a power, so that large ones learn faster than small ones.

    θ = m ⊙ z·|z|^(α-1), ∂z = g·α·|z|^(α-1)

    Weights gather near zero and can be masked at less cost.  A latent weight of exactly
    zero stays there.

    Args:
        exponent: α ≥ 1; at 1 it is `straight_through`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> curve = clipjax.latents.power_propagation(2.0).curve
        >>> curve.weights(curve.latent(jnp.array([4.0, -9.0]), None), None)
        Array([ 4., -9.], dtype=float32)

    Reference:
        Jonathan Schwarz, Siddhant M. Jayakumar, Razvan Pascanu, Peter E. Latham, Yee
        Whye Teh, Powerpropagation: A sparsity inducing weight reparameterisation, 2021,
        https://arxiv.org/abs/2110.00296
    """
    return Reparametrization(Power(exponent))


def _sigmoid(level: Level, like: Array) -> Array:
    return jax.nn.sigmoid(jnp.asarray(level)).astype(jnp.abs(like).dtype)


def _times(number: Number | Schedule, step: Array, latent: Weights) -> Weights:
    return latent * trees.value_at(number, step).astype(jnp.abs(latent).dtype)


def _mean(x: Float[Array, "..."], axis_name: AxisName) -> Float[Array, ""]:
    size = x.size * sharding.blocks(x, axis_name)
    return sharding.over(lax.psum, jnp.sum(x), x, axis_name) / float(max(size, 1))
