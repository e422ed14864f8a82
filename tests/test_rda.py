"""Dual averaging: the closed form of the paper, steadily and exactly sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import contrib
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"kernel": (9, 11), "bias": (11,)}


def soft(x, bound):
    return np.sign(x) * np.maximum(np.abs(x) - bound, 0)


def run(tx, params, *gradients):
    """The parameters after each step, and the last state."""
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        with relaxed():
            params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float64", "float32"),
    ],
)
def test_parameters_are_the_closed_form(param_dtype, grad_dtype):
    """θₜ₊₁ = soft(θ₁ - η√t·ḡₜ, η√t·λ), from the sum of all gradients in float64."""
    with x64(param_dtype == "float64"):
        params = normal(SHAPES, dtype=param_dtype)
        gradients = [normal(SHAPES, seed=s, dtype=grad_dtype) for s in (1, 2, 3, 4)]
        tx = contrib.regularized_dual_averaging(0.5, 0.6)
        history, state = run(tx, params, *gradients)
        eps = float(jnp.finfo(param_dtype).eps)
    start = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    total = jax.tree.map(np.zeros_like, start)
    for t, (gradient, after) in enumerate(zip(gradients, history, strict=True), 1):
        total = jax.tree.map(
            lambda s, g: s + np.asarray(g, np.float64), total, gradient
        )
        far = 0.5 * np.sqrt(t)
        kernel = start["kernel"] - far * total["kernel"] / t
        expected = {
            "kernel": soft(kernel, far * 0.6),
            "bias": start["bias"] - far * total["bias"] / t,
        }
        assert jax.tree.map(lambda x: x.dtype.name, after) == dict.fromkeys(
            SHAPES, param_dtype
        )
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), after)
        for name in SHAPES:
            np.testing.assert_allclose(new[name], expected[name], atol=16 * eps + 3e-7)
        dead = np.abs(kernel) < far * 0.6 - 1e-5
        assert 10 < dead.sum() < 90
        assert (new["kernel"][dead] == 0).all()
        assert not np.signbit(new["kernel"][dead]).any()
    assert (state.step, state.averaged_steps) == (4, 4)


def test_from_zero_it_is_the_method_of_the_paper():
    """-η√t·soft(ḡₜ, λ)."""
    params = {"kernel": jnp.zeros((9, 11))}
    gradients = [{"kernel": normal((9, 11), seed=s)} for s in (1, 2, 3)]
    tx = contrib.regularized_dual_averaging(0.1, 0.4)
    history, _ = run(tx, params, *gradients)
    mean = np.mean([np.asarray(g["kernel"], np.float64) for g in gradients], axis=0)
    expected = -0.1 * np.sqrt(3) * soft(mean, 0.4)
    np.testing.assert_allclose(history[-1]["kernel"], expected, atol=1e-6)


def test_it_is_sparser_and_steadier_than_proximal_steps():
    """Noisy gradients of a sparse regression, at the same penalty and accuracy."""
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 100), np.float32)
    truth[0, :5] = 1.0
    x = jnp.asarray(rng.normal(size=(600, 4, 100)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(600, 4)), jnp.float32)

    def train(tx):
        def step(carry, batch):
            params, state = carry
            inputs, error = batch
            rest = inputs @ (params["kernel"] - truth)[0] + error
            gradient = {"kernel": (rest @ inputs / 4)[None]}
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["kernel"][0]

        start = {"kernel": jnp.zeros((1, 100))}
        with relaxed():
            scan = jax.jit(lambda *carry: jax.lax.scan(step, carry, (x, noise))[1])
            return np.asarray(scan(start, tx.init(start)))[-100:]

    dual = train(contrib.regularized_dual_averaging(0.2, 0.2))
    step = clipjax.proximal(clipjax.prox.L1(0.2), 0.02)
    plain = train(optax.chain(optax.sgd(0.02), step))
    for history in (dual, plain):
        assert np.abs(history[-1] - truth[0]).max() < 0.35
        assert (history[:, :5] != 0).all()
    zeros, haze = ((history[:, 5:] == 0).mean() for history in (dual, plain))
    assert zeros > 0.99
    assert haze < 0.5
    flips, more = (((h[1:] == 0) != (h[:-1] == 0)).mean() for h in (dual, plain))
    assert flips < more / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_moves_nothing_and_is_not_averaged(bad):
    params = normal(SHAPES)
    first, second = normal(SHAPES, seed=1), normal(SHAPES, seed=2)
    broken = first | {"bias": first["bias"].at[2].set(bad)}
    tx = contrib.regularized_dual_averaging(0.5, 0.6)
    history, state = run(tx, params, broken, first, broken, second)
    assert_same(history[0], params, rtol=0)
    assert_same(history[2], history[1], rtol=0)
    expected, _ = run(tx, params, first, second)
    assert_same([history[1], history[3]], expected, rtol=0)
    assert (state.step, state.averaged_steps) == (4, 2)


def test_the_start_may_be_donated_beside_the_parameters():
    params = {"kernel": normal((9, 11))}
    tx = contrib.regularized_dual_averaging(0.5, 0.1)
    state = tx.init(params)
    gradient = {"kernel": normal((9, 11), seed=1)}
    expected, _ = run(tx, params, gradient)

    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    after, _ = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert_same(after, expected[0])


def test_what_became_of_the_parameters_is_not_read():
    """So that rounding to a narrow dtype does not add up."""
    params = {"kernel": normal((4, 5))}
    moved = {"kernel": normal((4, 5), seed=7)}
    gradient = {"kernel": normal((4, 5), seed=1)}
    tx = contrib.regularized_dual_averaging(0.5, 0.1)
    update = jax.jit(tx.update)
    results = []
    for now in (params, moved):
        updates, _ = update(gradient, tx.init(params), now)
        results.append(optax.apply_updates(now, updates))
    assert_same(*results, atol=1e-6)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"l1 must not be negative, but is -1"):
        contrib.regularized_dual_averaging(0.1, -1)
    tx = contrib.regularized_dual_averaging(0.1, 0.1)
    params = {"kernel": jnp.zeros((1, 2))}
    with pytest.raises(ValueError, match=r"regularized_dual_averaging reads the param"):
        tx.update(params, tx.init(params))
