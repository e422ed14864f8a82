"""Proximal: a penalty's own minimum after each step, exactly zero, in every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import prox, scopes
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"a": {"kernel": (9, 11), "bias": (11,)}, "b": {"kernel": (11, 5)}}
SMALL = {"kernel": (9, 11), "bias": (11,)}


def soft(x, bound):
    return np.sign(x) * np.maximum(np.abs(x) - bound, 0)


def train(tx, params, gradient, *, steps):
    """The parameters after so many steps, and the last state."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    with relaxed():
        run = jax.jit(lambda *start: jax.lax.scan(step, start, None, steps)[0])
        return run(params, tx.init(params))


@pytest.mark.parametrize(
    ("param_dtype", "update_dtype"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),  # a rounded -θ is no -θ
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float64", "float32"),
    ],
)
def test_zeros_are_exact_and_the_rest_is_the_operator(param_dtype, update_dtype):
    with x64(param_dtype == "float64"), relaxed():
        params = normal(SMALL, dtype=param_dtype)
        updates = normal(SMALL, seed=1, dtype=update_dtype)
        tx = clipjax.proximal(prox.L1(4.0), 0.1)
        stepped, _ = jax.jit(tx.update)(updates, tx.init(params), params)
        after = optax.apply_updates(params, stepped)
        eps = float(jnp.finfo(param_dtype).eps)
    assert after["kernel"].dtype == param_dtype
    assert stepped["kernel"].dtype == np.promote_types(param_dtype, update_dtype)
    theta, u, new = (
        np.asarray(tree["kernel"], np.float64) for tree in (params, updates, after)
    )
    # θ - (p - θ) is rounded as often as θ + u would be, and 0.1 is a float32.
    rounding = eps * 4 * np.maximum(np.abs(theta), 1) + 1e-8
    assert (np.abs(new - soft(theta + u, 0.4)) <= rounding).all()
    dead = np.abs(theta + u) < 0.4 - 1e-6
    assert 10 < dead.sum() < 90
    assert (new[dead] == 0).all()
    assert not np.signbit(new[new == 0]).any()
    assert_same(stepped["bias"], updates["bias"], rtol=0)


def test_what_the_penalty_leaves_alone_passes_bit_for_bit():
    params, updates = normal(SHAPES), normal(SHAPES, seed=1)
    tx = clipjax.proximal(prox.L0(2.0), 0.1)
    stepped, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    for name in ("a", "b"):
        p, u, s = (np.asarray(x[name]["kernel"]) for x in (params, updates, stepped))
        kept = np.abs(p + u) > np.sqrt(0.4)
        assert 0 < kept.sum() < kept.size
        np.testing.assert_array_equal(s, np.where(kept, u, -p))


def test_training_reaches_the_minimum_of_loss_and_penalty():
    """½‖θ - y‖² + λ‖θ‖₁ is minimal at soft(y, λ), whatever the learning rate."""
    target = normal({"kernel": (9, 11)}, seed=1)
    for rate in (0.3, optax.linear_schedule(0.5, 0.2, 40)):
        tx = optax.chain(optax.sgd(rate), clipjax.proximal(prox.L1(0.6), rate))
        start = normal({"kernel": (9, 11)})
        params, state = train(
            tx, start, lambda p: jax.tree.map(jnp.subtract, p, target), steps=80
        )
        expected = soft(np.asarray(target["kernel"]), 0.6)
        np.testing.assert_allclose(params["kernel"], expected, atol=1e-6)
        np.testing.assert_array_equal(params["kernel"] == 0, expected == 0)
        share = (expected == 0).mean()
        np.testing.assert_allclose(state[-1].prox_total_sparsity, share, rtol=1e-6)


def test_strengths_and_learning_rates_follow_schedules():
    params = {"kernel": jnp.full((2, 2), 10.0)}
    still = {"kernel": jnp.zeros((2, 2))}
    tx = clipjax.proximal(
        prox.ElasticNet(lambda step: 1.0 + step.astype(jnp.float32), ridge=0.0),
        lambda step: 0.5 / (1 + step.astype(jnp.float32)),
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):  # η·λ = ½ in every step
        updates, state = update(still, state, params)
        np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-6)
    assert state.step == 3


@pytest.mark.parametrize(
    ("scope", "axis"),
    [
        (scopes.Unit(), 0),
        (scopes.Unit(axis=1), 1),
        (scopes.Leaf(), (0, 1)),
        (scopes.Layer(0), 1),
    ],
)
def test_groups_are_those_of_the_scope(scope, axis):
    params, updates = normal(SHAPES), normal(SHAPES, seed=1)
    tx = clipjax.proximal(prox.GroupLasso(0.9), 1.0, scope=scope)
    stepped, state = jax.jit(tx.update)(updates, tx.init(params), params)
    after = optax.apply_updates(params, stepped)
    for name in ("a", "b"):
        x = np.asarray(params[name]["kernel"] + updates[name]["kernel"])
        norms = np.linalg.norm(x, axis=axis, keepdims=True)
        bound = 0.9 * np.sqrt(x.size / norms.size)
        expected = x * np.maximum(1 - bound / norms, 0)
        np.testing.assert_allclose(after[name]["kernel"], expected, atol=1e-6)
        share = (expected == 0).mean()
        leaf = state.prox_leaf_sparsity[f"{name}/kernel"]
        np.testing.assert_allclose(leaf, share, atol=1e-6)


def test_the_bias_of_a_layer_tells_its_units():
    """(in, heads, size) beside a bias of (heads, size): a unit spans the first axis."""
    params = {"out": {"kernel": normal((6, 2, 3)), "bias": jnp.zeros((2, 3))}}
    still = jax.tree.map(jnp.zeros_like, params)
    tx = clipjax.proximal(prox.GroupLasso(1.0), 1.0)
    stepped, _ = jax.jit(tx.update)(still, tx.init(params), params)
    expected = prox.GroupLasso(1.0).prox(params["out"]["kernel"], 1.0, axis=0)
    after = optax.apply_updates(params, stepped)["out"]["kernel"]
    np.testing.assert_allclose(after, expected, atol=1e-6)


def test_a_zero_comes_back_when_the_gradient_is_strong():
    params = {"kernel": jnp.zeros((1, 2))}
    tx = optax.chain(optax.sgd(1.0), clipjax.proximal(prox.L1(0.5), 1.0))
    updates, _ = tx.update({"kernel": jnp.array([[0.4, 2.0]])}, tx.init(params), params)
    assert_same(updates, {"kernel": jnp.array([[0.0, -1.5]])})


def test_bad_entries_stay_where_they_are():
    params = {"kernel": jnp.array([[3.0, 1.0, -2.0, 0.1]])}
    updates = {"kernel": jnp.array([[np.nan, np.inf, 0.0, 0.0]])}
    tx = clipjax.proximal(prox.L1(0.5), 1.0)
    stepped, state = tx.update(updates, tx.init(params), params)
    expected = {"kernel": jnp.array([[np.nan, np.inf, 0.5, -0.1]])}
    assert_same(stepped, expected, equal_nan=True)
    assert state.prox_total_sparsity == 0.25


def test_leaves_are_chosen_and_chains_of_two_add_up():
    params, updates = normal(SHAPES), normal(SHAPES, seed=1)
    tx = optax.chain(
        clipjax.proximal(prox.L1(0.9), 1.0, where=lambda path, _: path == "a/kernel"),
        clipjax.proximal(prox.L0(0.9), 1.0, where=lambda path, _: path == "b/kernel"),
    )
    stepped, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    after = optax.apply_updates(params, stepped)
    sums = jax.tree.map(jnp.add, params, updates)
    for name, penalty in [("a", prox.L1(0.9)), ("b", prox.L0(0.9))]:
        expected = penalty.prox(sums[name]["kernel"], 1.0)
        np.testing.assert_allclose(after[name]["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(stepped["a"]["bias"], updates["a"]["bias"])


def test_split_groups_are_whole_inside_shard_map():
    """Along the axis of a group norms are summed over devices, along the other not."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"rows": {"kernel": P("d")}, "columns": {"kernel": P(None, "d")}}
    shapes = {"rows": {"kernel": (16, 6)}, "columns": {"kernel": (6, 16)}}
    params, updates = normal(shapes), normal(shapes, seed=1)

    def make(**options):
        return clipjax.proximal(prox.GroupLasso(1.1), 1.0, **options)

    def spec_of(path, leaf):
        return specs[path.split("/")[0]]["kernel"]

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, P())
    )
    def split(params, updates):
        tx = make(axis_name="d", specs=spec_of)
        stepped, state = tx.update(updates, tx.init(params), params)
        return stepped, state.prox_leaf_sparsity

    tx = make()
    stepped, state = jax.jit(tx.update)(updates, tx.init(params), params)
    assert 0 < state.prox_total_sparsity < 1
    assert_same(
        jax.device_get(split(params, updates)),
        jax.device_get((stepped, state.prox_leaf_sparsity)),
        atol=1e-6,
    )


def test_it_says_what_is_wrong():
    with pytest.raises(
        TypeError, match=r"penalty must be a value with a method `prox`"
    ):
        clipjax.proximal(prox.L1, 0.1)
    with pytest.raises(ValueError, match=r"learning_rate must not be negative"):
        clipjax.proximal(prox.L1(0.1), -0.1)
    with pytest.raises(TypeError, match=r"scope"):
        clipjax.proximal(prox.L1(0.1), 0.1, scope=scopes.Tree())
    params = {"kernel": jnp.ones((2, 3))}
    tx = clipjax.proximal(prox.L1(0.1), 0.1)
    with pytest.raises(ValueError, match=r"at 'kernel' the update has shape \(3, 2\)"):
        tx.update({"kernel": jnp.ones((3, 2))}, tx.init(params), params)
