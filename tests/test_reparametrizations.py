"""Reparametrizations: curves, their inverses and slopes, penalties, thresholds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from clipjax import latents as reparametrizations
from clipjax.latents import Curve, Identity, Power, Sets, SoftThreshold
from helpers import assert_same, normal, x64

CURVES = {
    "identity": (Identity(), None),
    "power": (Power(2.0), None),
    "root": (Power(1.25), None),
    "soft": (SoftThreshold(-1.0), jnp.float32(-1.0)),
}
each_curve = pytest.mark.parametrize(("curve", "level"), CURVES.values(), ids=CURVES)
STEP = jnp.int32(0)


@each_curve
def test_a_curve_meets_its_protocol_and_undoes_its_inverse(curve, level):
    assert isinstance(curve, Curve)
    weights = normal((5, 7))
    assert_same(curve.weights(curve.latent(weights, level), level), weights, rtol=1e-5)


@each_curve
def test_a_gradient_is_that_of_the_curve(curve, level):
    with x64():
        latent, gradient = normal((5, 7), dtype="float64"), normal((5, 7), seed=1)
        gradient = gradient.astype(jnp.float64)
        level = None if level is None else level.astype(jnp.float64)
        actual, of_level = curve.pull_back(gradient, latent, level)
        _, pull_back = jax.vjp(curve.weights, latent, level)
        expected, expected_level = pull_back(gradient)
        assert_same(actual, expected, rtol=1e-12)
        assert (of_level is None) == (level is None)
        if level is not None:
            assert_same(jnp.sum(of_level), expected_level, rtol=1e-12)


@pytest.mark.parametrize("exponent", [1.01, 1.5, 2.0, 5.0])
def test_a_power_has_a_finite_slope_at_zero_and_near_it(exponent):
    """Where the derivative of |z|^(α-1) by itself is infinite."""
    latent = jnp.array([0.0, -0.0, 1e-45, -1e-38, 1e-20])
    slope, _ = Power(exponent).pull_back(jnp.ones(5), latent, None)
    assert np.isfinite(slope).all()
    assert (slope[:2] == 0).all()


def test_an_exponent_of_one_changes_nothing():
    weights = normal((3, 4))
    assert_same(Power(1.0).weights(weights, None), weights, rtol=0)
    slope, _ = Power(1.0).pull_back(weights, weights.at[0, 0].set(0), None)
    assert_same(slope, weights, rtol=0)


def test_far_below_zero_a_soft_threshold_is_none():
    weights = normal((3, 4))
    level = jnp.float32(reparametrizations.soft_threshold().curve.level)
    assert_same(SoftThreshold(0.0).weights(weights, level), weights, rtol=0)


def test_a_soft_threshold_zeroes_what_is_below_and_its_gradient():
    curve, latent = SoftThreshold(0.0), jnp.array([[0.4, -0.5, 0.6, -2.0]])
    level = jnp.float32(0)  # half
    assert_same(curve.weights(latent, level), jnp.array([[0, 0, 0.1, -1.5]]), atol=1e-7)
    slope, of_level = curve.pull_back(jnp.ones((1, 4)), latent, level)
    assert_same(slope, jnp.array([[0.0, 0.0, 1.0, 1.0]]))
    assert_same(of_level, jnp.array([[0.0, 0.0, -0.25, 0.25]]))


# Penalties


def sets(kept, explored):
    kept, explored = jnp.array(kept) > 0, jnp.array(explored) > 0
    return Sets(kept, explored, jnp.mean(kept.astype(jnp.float32)))


LATENT = jnp.array([1.0, -2.0, 3.0, -4.0])
SETS = sets([0, 0, 0, 1], [0, 1, 1, 1])  # a quarter is kept


def test_sr_ste_draws_what_is_masked_to_zero():
    penalty = reparametrizations.sr_ste().penalty(LATENT, SETS, STEP)
    assert_same(penalty, 2e-4 * jnp.array([1.0, -2.0, 3.0, 0.0]))


def test_top_kast_holds_back_what_explores_most():
    penalty = reparametrizations.top_kast(0.25, 0.5).penalty(LATENT, SETS, STEP)
    assert_same(penalty, jnp.array([0.0, -4.0, 6.0, -2.0]))


def test_top_kast_stays_finite_where_nothing_is_kept():
    nothing = sets([0, 0, 0, 0], [1, 1, 0, 0])
    penalty = reparametrizations.top_kast(0.5, 0.5).penalty(LATENT, nothing, STEP)
    assert_same(penalty, jnp.array([0.5, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_penalty_may_follow_a_schedule(dtype):
    def schedule(step):
        return 0.5 * step.astype(jnp.float32)

    with x64(dtype == "float64"):
        for rule, expected in [
            (reparametrizations.sr_ste(schedule), [1.0, -2.0, 3.0, 0.0]),
            (reparametrizations.top_kast(0.5, schedule), [0.0, -8.0, 12.0, -4.0]),
        ]:
            penalty = rule.penalty(LATENT.astype(dtype), SETS, jnp.int32(2))
            assert_same(penalty, jnp.array(expected, dtype))


# Thresholds


def test_a_threshold_is_the_mean_and_some_deviations():
    weights = np.asarray(normal((20, 30)))
    rule = reparametrizations.surgery(deviations=0.7)
    size = np.abs(weights.astype(np.float64))
    expected = size.mean() + 0.7 * size.std()
    bound = rule.threshold(jnp.asarray(weights), None)
    np.testing.assert_allclose(bound, expected, rtol=1e-6)
    lower = reparametrizations.surgery(deviations=-9.0)
    assert lower.threshold(jnp.asarray(weights), None) == 0
    huge = rule.threshold(jnp.full((3, 3), 3e38), None)
    assert np.isfinite(huge)


def test_a_threshold_is_that_of_the_whole_leaf_inside_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = normal((16, 3)) * jnp.arange(16, dtype=jnp.float32)[:, None]
    threshold = reparametrizations.surgery(deviations=0.5).threshold
    mapped = jax.shard_map(
        functools.partial(threshold, axis_name="d"),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P(),
    )
    assert_same(jax.jit(mapped)(weights), threshold(weights, None), rtol=1e-5)


# What a user may get wrong


def test_parts_combine():
    rule = dataclasses.replace(
        reparametrizations.top_kast(0.5), curve=Power(2.0), hysteresis=0.2
    )
    assert (rule.backward_sparsity, rule.hysteresis, rule.curve.exponent) == (
        0.5,
        0.2,
        2.0,
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Power(0.5), ValueError, "^exponent must be at least 1"),
        (lambda: reparametrizations.sr_ste(-1.0), ValueError, "^decay must not be"),
        (lambda: reparametrizations.top_kast(1.5), ValueError, "^backward_sparsity"),
        (lambda: reparametrizations.top_kast(0.5, -1), ValueError, "^decay must not"),
        (lambda: reparametrizations.surgery(1.0), ValueError, "^hysteresis must be"),
        (
            lambda: reparametrizations.Reparametrization(curve=Power),
            TypeError,
            "^curve must be a value with a method `pull_back`.*Pass an instance",
        ),
        (
            lambda: reparametrizations.Reparametrization(penalty=0.1),
            TypeError,
            "^penalty must be a function",
        ),
    ],
)
def test_errors_name_the_argument(make, error, message):
    """Without jaxtyping's checks, which the suite turns on, and users do not."""
    jaxtyping = pytest.importorskip("jaxtyping")
    off = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            make()
    finally:
        jaxtyping.config.update("jaxtyping_disable", off)
