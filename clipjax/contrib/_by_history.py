"""Published clips whose threshold comes from the norms of the past.

Each is its paper's rule on the engine, with its paper's defaults; what it does to
spikes and changes of level is in each docstring, and in a table of the benchmarks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array

from .. import norms, responses, scopes, thresholds
from .._clipping._engine import Bound, clip_by
from .._core import checks as check, trees
from .._core.types import AxisName, Number, Schedule

_LEAF = scopes.Leaf()


def autoclip(
    quantile: Number | Schedule = 0.1,
    *,
    window: int = 10_000,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm to a quantile of all norms so far (AutoClip).

    u ← u · T / max(T, n), T = Q_q(n₁, …, nₜ), the norm itself among them

    Use it as a normalization more than as a guard: the default clips nine steps of ten.

    A spike comes out at the level of the others, but in the first steps it passes
    whole.  A lasting rise is clipped for as long as the past before it was.

    Args:
        quantile: q in [0, 1], a number, a traced value or a schedule.
        window: the number of norms that are remembered; in the paper, all.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.autoclip(0.5)
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> for norm in [1.0, 3.0, 9.0]:
        ...     updates, state = tx.update({"w": jnp.array([norm])}, state)
        >>> updates["w"]
        Array([3.], dtype=float32)

    Reference:
        Prem Seetharaman, Gordon Wichern, Bryan Pardo, Jonathan Le Roux, AutoClip:
        Adaptive Gradient Clipping for Source Separation Networks, 2020,
        https://arxiv.org/abs/2007.14469
    """
    rule = thresholds.WindowedQuantile(
        quantile, 1.0, thresholds.raw, window, current=True
    )
    return clip_by(rule, axis_name=axis_name)


def clip_by_percentile(
    quantile: Number | Schedule = 0.05,
    *,
    window: int = 100,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to a quantile of its own last norms (percentile clipping).

    u ← u · T / max(T, n), T = Q_q(nₜ₋w₊₁, …, nₜ), the norm itself among them

    Use it for what bitsandbytes offered as `percentile_clipping=5`.  The default clips
    95 % of ordinary steps; `quantile=0.9` clips a tenth, and follows a lasting rise
    within ten steps.

    While the window fills, the quantile is that of the norms so far, and not of zeros
    as there, which stopped training for some ninety steps.  The first step passes
    whole.

    Args:
        quantile: q in [0, 1], a number, a traced value or a schedule.
        window: w, the number of norms that are remembered.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.clip_by_percentile(0.0)
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> for norm in [3.0, 1.0, 9.0]:
        ...     updates, state = tx.update({"w": jnp.array([norm])}, state)
        >>> updates["w"]
        Array([1.], dtype=float32)

    Reference:
        Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer, 8-bit Optimizers via
        Block-wise Quantization, 2021, https://arxiv.org/abs/2110.02861 (its library)
    """
    rule = thresholds.WindowedQuantile(
        quantile, 1.0, thresholds.raw, window, current=True
    )
    return clip_by(Bound(rule, _LEAF), axis_name=axis_name)


def quantile_clip(
    quantile: Number | Schedule = 0.5,
    *,
    rate: Number | Schedule = 0.2,
    start: Number | Schedule = 1.0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm to a quantile that it follows by small steps.

    u ← u · T / max(T, n); then T ← T·exp(-η·(1[n ≤ T] - q))

    Use it where one number of memory should do.  The default clips half of all ordinary
    steps, `quantile=0.9` a tenth.

    A spike moves the threshold no more than any other norm.  A lasting rise by f is
    followed in ln f / (η·q) steps, a fall in ln f / (η·(1-q)).  Of five spikes in a row
    the last comes out at 1.5 times the level, or 2.5 with `quantile=0.9`.

    Args:
        quantile: q in [0, 1], a number, a traced value or a schedule.
        rate: η > 0, the step of the threshold's logarithm; a number, a traced value or
            a schedule.
        start: the first threshold, > 0; a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.quantile_clip(0.5, start=4.0)
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> updates, state = tx.update({"w": jnp.array([9.0])}, state)
        >>> updates["w"], tx.update({"w": jnp.array([9.0])}, state)[0]["w"]
        (Array([4.], dtype=float32), Array([4.420684], dtype=float32))

    Reference:
        Galen Andrew, Om Thakkar, H. Brendan McMahan, Swaroop Ramaswamy, Differentially
        Private Learning with Adaptive Clipping, 2019, https://arxiv.org/abs/1905.03871
    """
    return clip_by(
        thresholds.QuantileTracker(quantile, rate, start), axis_name=axis_name
    )


def zclip(
    deviations: Number | Schedule = 2.5,
    *,
    decay: Number | Schedule = 0.97,
    max_norm: Number | Schedule = float("inf"),
    target: Callable | None = None,
    factor: Number | Schedule = 1.0,
    skip: bool = False,
    warmup: int = 25,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms whose z-score is an outlier's (ZClip).

    z = (n - μ)/σ; T = f·(μ + z*·σ·z*/z) where z > z*, and never above c; then μ and σ²
    move toward min(n, T)

    Use it where spikes are rare and the level of the norms is steady: it touches 1.5 %
    of ordinary steps.

    In the first `warmup` steps only c holds.  The default never releases a lasting rise
    by three, since it remembers the new level as it was clipped; the paper's percentile
    mode, `target=thresholds.at_limit`, does in ten steps.

    Args:
        deviations: z* > 0, the z-score from which on a norm is an outlier.
        decay: d in [0, 1), of the moving mean and variance.
        max_norm: c > 0, a bound at all times; infinity, the default, for none.  The
            published code has 1, which is then the bound of most steps.
        target: the function that says where an outlier is brought:
            `thresholds.reciprocal`, `at_mean` or `at_limit`.
        factor: f > 0, the threshold as a multiple of the target.
        skip: whether an outlier is dropped instead; `max_norm` is then not applied.
        warmup: the number of first norms that only fill the statistics.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.zclip(
        ...     2.0, warmup=2, target=clipjax.thresholds.at_limit
        ... )
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> for norm in [3.0, 1.0, 100.0]:
        ...     updates, state = tx.update({"w": jnp.array([norm])}, state)
        >>> updates["w"]
        Array([4.], dtype=float32)

    Reference:
        Abhay Kumar, Louis Owen, Nilabhra Roy Chowdhury, Fabian Güra, ZClip: Adaptive
        Spike Mitigation for LLM Pre-Training, 2025, https://arxiv.org/abs/2504.02507
    """
    target = thresholds.reciprocal if target is None else target
    check.positive(max_norm=max_norm)
    check.flag(skip=skip)
    feed = thresholds.Winsorized(1.0)
    rule = thresholds.MovingDeviation(deviations, decay, factor, target, feed, warmup)
    if skip:
        bound = Bound(rule, response=responses.zero)
        return clip_by(bound, axis_name=axis_name)
    return clip_by(thresholds.Lowest((rule, max_norm)), axis_name=axis_name)


def adagc(
    factor: Number | Schedule = 1.05,
    *,
    decay: Number | Schedule = 0.98,
    max_norm: Number | Schedule = 1.0,
    warmup: int = 100,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf to a little more than its own mean norm so far (AdaGC).

    u ← u · T / max(T, n), T = λ·γ; then γ ← d·γ + (1-d)·min(n, T), for each leaf

    Use it where leaves have spikes of their own.  It clips 43 % of all ordinary steps,
    and γ grows by 0.1 % a step at most: a lasting rise by three takes about a thousand
    steps to pass.

    In the first `warmup` steps the global norm is clipped to c, and γ is the least norm
    of the leaf.

    Args:
        factor: λ > 0, the threshold as a multiple of the mean; a number, a traced value
            or a schedule.
        decay: d in [0, 1), of the mean; a number, a traced value or a schedule.
        max_norm: c > 0, the bound of the first steps; a number, a traced value or a
            schedule.
        warmup: the number of first steps.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.adagc(2.0, warmup=2, max_norm=4.0)
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> for norm in [3.0, 5.0, 100.0]:
        ...     updates, state = tx.update({"w": jnp.array([norm])}, state)
        >>> updates["w"]
        Array([6.], dtype=float32)

    Reference:
        Guoxia Wang, Shuai Li, Congliang Chen, Jinle Zeng, Jiabin Yang, Dianhai Yu,
        Yanjun Ma, Li Shen, AdaGC: Enhancing LLM Pretraining Stability via Adaptive
        Gradient Clipping, 2025, https://arxiv.org/abs/2502.11034
    """
    check.positive(max_norm=max_norm)
    check.whole(1, warmup=warmup)  # a mean that starts at zero would stay there

    rule = thresholds.MovingMean(factor, decay, thresholds.clipped, warmup)
    first = _FirstSteps(max_norm, warmup)
    return clip_by(first, Bound(rule, _LEAF), axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class _FirstSteps:
    """A bound on the norms of the first steps, and none afterwards."""

    max_norm: Number | Schedule
    steps: int

    def empty(self, norm):
        return jnp.zeros_like(norm, jnp.int32)

    def threshold(self, memory, norm):
        bound = trees.like(self.max_norm, norm)
        return jnp.where(memory < self.steps, bound, jnp.inf)

    def remember(self, memory, norm, threshold, clipped_norm):
        del norm, threshold, clipped_norm
        return jnp.minimum(memory + 1, self.steps)


def aggc(
    label: Callable[[str, Array], str],
    *,
    low: Number | Schedule = 0.65,
    high: Number | Schedule = 0.965,
    decay: Number | Schedule = 0.97,
    least: Number = 0.9,
    most: Number = 1.0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norm of each group within a band round its own mean (AGGC).

    r = min(max(n, α₀·S), α₁·S) / n, in [rₗ, rₕ]; u ← r·u; then S ← d·S + (1-d)·r·n

    Use it to steady groups against each other.  It is no protection from spikes: with
    the default, one of any size is reduced by a tenth only.

    S starts at zero, as in the paper, so `least` alone bounds the first steps.

    Args:
        label: a function of path and leaf that returns the name of the group.
        low: α₀ in [0, α₁], the lower end of the band; without effect if `most` is 1;
            a number, a traced value or a schedule.
        high: α₁ > 0, the upper end of the band; a number, a traced value or a schedule.
        decay: d in [0, 1), of the mean.
        least: rₗ in (0, 1], the smallest factor.
        most: rₕ ≥ 1, the largest factor; above 1, a small norm is raised.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.aggc(lambda path, leaf: path.split("/")[0])
        >>> updates = {"dense": {"kernel": jnp.array([2.0])}}
        >>> tx.update(updates, tx.init(updates))[0]["dense"]["kernel"]
        Array([1.8], dtype=float32)

    Reference:
        Zhiyuan Li, Yuan Wu, Yi Chang, AGGC: Adaptive Group Gradient Clipping for
        Stabilizing Large Language Model Training, 2026,
        https://arxiv.org/abs/2601.11864
    """
    check.not_negative(low=low)
    check.positive(high=high, least=least)

    def share(step):
        return jnp.minimum(trees.value_at(low, step) / trees.value_at(high, step), 1)

    rule = thresholds.MovingMean(high, decay, thresholds.clipped, 0)
    band = responses.Band(share, least, most)
    bound = Bound(rule, scopes.Group(label), response=band)
    return clip_by(bound, axis_name=axis_name)


def clip_by_moving_sigma(
    deviations: Number | Schedule = 3.0,
    *,
    window: int = 128,
    warmup: int = 64,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm to some standard deviations above its recent mean.

    u ← u · T / max(T, n), T = μ + k·σ of the last w norms, as they came

    Use it after the optimizer, for the update: `chain(adam, clip_by_moving_sigma())`.

    Nothing is clipped until there are `warmup` norms.  One spike inflates σ and hides
    every other for as long as it stays in the window: a 10x spike 20 steps after one of
    1000x passes whole.

    Args:
        deviations: k ≥ 0, a number, a traced value or a schedule.
        window: w, the number of norms that are remembered.  Static.
        warmup: the number of first norms without a clip, at most w.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.clip_by_moving_sigma(2.0, window=4, warmup=2)
        >>> state = tx.init({"w": jnp.zeros(1)})
        >>> for norm in [3.0, 1.0, 100.0]:
        ...     updates, state = tx.update({"w": jnp.array([norm])}, state)
        >>> updates["w"]
        Array([4.], dtype=float32)

    Reference:
        The authors of Levanter, `clip_update_norm`, 2025,
        https://github.com/stanford-crfm/levanter
    """
    rule = thresholds.WindowedDeviation(deviations, thresholds.raw, window, warmup)
    return clip_by(rule, axis_name=axis_name)


def spam_clip(
    factor: Number | Schedule = 5000.0,
    *,
    decay: Number | Schedule = 0.999,
    warmup: int = 20,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each entry against its own mean square (SPAM's spike-aware clipping).

    uᵢ ← sign(uᵢ)·min(|uᵢ|, √(θ·vᵢ)); then vᵢ ← d·vᵢ + (1-d)·uᵢ²

    Use it where single entries spike; `clipjax.reset_moments` is the paper's other
    half.

    It keeps a mean square of its own, as large as the parameters and in float32, and so
    needs no Adam.  v is not debiased, as in the paper: an entry may be 10 times its
    root mean square at step 20, and 70 times later.  So a 10x spike passes whole, and
    one of 1000x comes out at 37 times the level after 300 steps.  An entry that is
    zero, as in the unused rows of an embedding, leaves its v as it is; one that was
    never anything else has no bound yet.

    Args:
        factor: θ > 0, a number, a traced value or a schedule.
        decay: d in [0, 1), of the mean square.
        warmup: the number of first steps that are not clipped.  Static.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.spam_clip(4.0, decay=0.0, warmup=1)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> for size in [1.0, 9.0]:
        ...     updates, state = tx.update({"w": jnp.array([size, 1.0])}, state)
        >>> updates["w"]
        Array([2., 1.], dtype=float32)

    Reference:
        Tianjin Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
        Training, 2025, https://arxiv.org/abs/2501.06842
    """
    check.whole(1, warmup=warmup)  # a mean square that starts at zero would stay there
    rule = thresholds.MovingSquare(factor, decay, thresholds.clipped, warmup)
    return clip_by(Bound(rule, scopes.Element()), axis_name=axis_name)


def stable_spam_clip(
    decay: Number | Schedule = 0.999, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales entries above the leaf's usual peak down (Stable-SPAM's AdaClip).

    M = maxᵢ |uᵢ|; uᵢ ← uᵢ · T/M where |uᵢ| > T, T the debiased mean of M, with this one

    Use it where few entries of a leaf spike.  T lies at the mean of the peaks, so half
    of all ordinary steps are touched.

    The first step passes unchanged.  While the mean is young a spike raises it: after
    300 steps one of 1000 times the level comes out at 5 times it, and a lasting rise by
    three takes 800.

    Args:
        decay: d in [0, 1), of the mean; a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.stable_spam_clip(0.0)
        >>> updates = {"w": jnp.array([3.0, -1.0])}
        >>> tx.update(updates, tx.init(updates))[0]["w"]
        Array([ 3., -1.], dtype=float32)

    Reference:
        Tianjin Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit
        Adam, 2025, https://arxiv.org/abs/2502.17055
    """
    rule = thresholds.MovingPeak(decay)
    bound = Bound(rule, _LEAF, norms.inf_norm, responses.lower_peaks)
    return clip_by(bound, axis_name=axis_name)


def gradient_stabilizer(
    mean_decay: Number | Schedule = 0.7,
    *,
    square_decay: Number | Schedule = 0.9,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf a norm of about one (GradientStabilizer, AdaGN).

    u ← u/n · m̂/√v̂, with moving means m of n and v of n², debiased, with this one

    Use it before optimizers that do not need the scale of the gradients: none is left.

    The first spike comes out at 0.95 at most, whatever its norm; but after one of 1000
    times the level, ordinary steps come out near 0.04 for some twenty steps.

    Args:
        mean_decay: the decay of m, in [0, 1); a number, a traced value or a schedule.
        square_decay: the decay of v, in [0, 1); a number, a traced value or a schedule.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.contrib.gradient_stabilizer()
        >>> updates = {"w": jnp.array([0.0, -8.0])}
        >>> jnp.round(tx.update(updates, tx.init(updates))[0]["w"], 5)
        Array([ 0., -1.], dtype=float32)

    Reference:
        Tianjin Huang et al., GradientStabilizer: Fix the Norm, Not the Gradient, 2026,
        https://arxiv.org/abs/2502.17055
    """
    rule = thresholds.MovingRatio(mean_decay, square_decay)
    bound = Bound(rule, _LEAF, response=responses.normalize)
    return clip_by(bound, axis_name=axis_name)
