"""Hard-concrete gates: exact zeros and ones, with the probabilities of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax.contrib import gates
from helpers import assert_same, normal, relaxed, x64

LOGITS = np.array([-4.0, -1.5, -0.3, 0.0, 0.8, 2.0, 6.0])
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def below(z, logits):
    """P(gate ≤ z) before clipping: σ(β·log(y/(1-y)) - log α), y = (z-γ)/(ζ-γ)."""
    y = (z - GAMMA) / (ZETA - GAMMA)
    return sigmoid(BETA * np.log(y / (1 - y)) - logits)


@pytest.fixture(scope="module")
def draws():
    logits = jnp.broadcast_to(jnp.float32(LOGITS), (20_000, LOGITS.size))
    return np.asarray(jax.jit(gates.sample)(jax.random.key(0), logits))


def test_samples_follow_the_distribution(draws):
    """Its ends, which have probabilities, and four points between."""
    assert ((draws >= 0) & (draws <= 1)).all()
    np.testing.assert_allclose((draws == 0).mean(0), below(0, LOGITS), atol=0.015)
    np.testing.assert_allclose((draws == 1).mean(0), 1 - below(1, LOGITS), atol=0.015)
    for z in (0.05, 0.3, 0.6, 0.95):
        np.testing.assert_allclose((draws <= z).mean(0), below(z, LOGITS), atol=0.015)


def test_the_expected_number_is_that_of_the_samples(draws):
    logits = jnp.float32(LOGITS)
    np.testing.assert_allclose(
        gates.open_probability(logits), (draws != 0).mean(0), atol=0.015
    )
    expected = sigmoid(LOGITS - BETA * np.log(-GAMMA / ZETA))
    np.testing.assert_allclose(gates.expected_l0(logits), expected.sum(), rtol=1e-6)
    slope = jax.jit(jax.grad(gates.expected_l0))(logits)
    np.testing.assert_allclose(slope, expected * (1 - expected), atol=1e-6)


def test_evaluated_gates_are_the_formula_with_exact_ends():
    expected = np.clip(sigmoid(LOGITS) * (ZETA - GAMMA) + GAMMA, 0, 1)
    result = np.asarray(gates.evaluate(jnp.float32(LOGITS)))
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert (result[0], result[-1]) == (0, 1)
    edge = np.log(-GAMMA / ZETA)  # where log α has a gate of zero
    around = gates.evaluate(jnp.float32([edge - 1e-3, edge + 1e-3]))
    assert around[0] == 0 < around[1]


def test_other_constants_change_all_alike():
    options = {"temperature": 0.5, "low": -0.5, "high": 1.5}
    logits = jnp.zeros(20_000) - 0.5
    drawn = np.asarray(gates.sample(jax.random.key(1), logits, **options))
    probability = sigmoid(-0.5 - 0.5 * np.log(0.5 / 1.5))
    np.testing.assert_allclose((drawn != 0).mean(), probability, atol=0.015)
    opened = gates.open_probability(logits[:1], **options)
    np.testing.assert_allclose(opened, [probability], rtol=1e-6)
    gate = gates.evaluate(logits[:1], low=-0.5, high=1.5)
    np.testing.assert_allclose(gate, [sigmoid(-0.5) * 2 - 0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_stay_and_gradients_are_finite(dtype):
    with x64(dtype == "float64"):
        logits = jnp.asarray([-100.0, -1.0, 0.0, 1.0, 100.0], dtype)

        @jax.jit
        def both(logits):
            drawn = gates.sample(jax.random.key(0), logits)
            return drawn, gates.evaluate(logits), gates.expected_l0(logits)

        drawn, fixed, number = both(logits)
        assert drawn.dtype == fixed.dtype == dtype
        assert number.dtype == ("float64" if dtype == "float64" else "float32")
        assert (drawn[0], drawn[-1], fixed[0], fixed[-1]) == (0, 1, 0, 1)
        slopes = jax.jit(jax.grad(lambda x: both(x)[0].astype("float32").sum()))(logits)
        assert np.isfinite(np.asarray(slopes, np.float64)).all()
        assert (np.asarray(slopes, np.float64) != 0).any()


def test_the_same_key_draws_the_same_and_a_mesh_changes_nothing():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    logits = jax.device_put(normal((16, 3)), jax.NamedSharding(mesh, jax.P("d", None)))
    split = jax.jit(gates.sample)(jax.random.key(3), logits)
    assert split.sharding.is_equivalent_to(logits.sharding, 2)
    whole = gates.sample(jax.random.key(3), normal((16, 3)))
    assert_same(jax.device_get(split), jax.device_get(whole))


def test_gates_of_useless_inputs_shut():
    """Linear regression on ten inputs of which three count."""
    x = normal((256, 10))
    truth = np.zeros(10, np.float32)
    truth[[1, 4, 7]] = 2.0, -1.0, 1.5
    y = x @ jnp.asarray(truth)
    tx = optax.adam(0.05)

    def loss(params, key):
        gate = gates.sample(key, params["log_alpha"])
        error = x @ (params["weight"] * gate) - y
        return jnp.mean(error**2) + 0.02 * gates.expected_l0(params["log_alpha"])

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    with relaxed():
        params = {"log_alpha": jnp.full(10, 1.0), "weight": jnp.full(10, 0.1)}
        keys = jax.random.split(jax.random.key(0), 600)
        run = jax.jit(lambda start: jax.lax.scan(step, start, keys)[0])
        params, _ = run((params, tx.init(params)))
    gate = np.asarray(gates.evaluate(params["log_alpha"]))
    np.testing.assert_array_equal(gate != 0, truth != 0)
    np.testing.assert_allclose(gate * params["weight"], truth, atol=0.05)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"temperature must be positive, but is 0"):
        gates.sample(jax.random.key(0), jnp.zeros(1), temperature=0)
    with pytest.raises(
        ValueError, match=r"low must lie between -inf and 0, but is 0.5"
    ):
        gates.evaluate(jnp.zeros(1), low=0.5)
    with pytest.raises(ValueError, match=r"high must be at least 1, but is 0.5"):
        gates.expected_l0(jnp.zeros(1), high=0.5)
