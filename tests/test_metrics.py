"""Metrics, read from any optimizer's state; reports are next door."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import clipjax
from helpers import assert_same, normal, relaxed

SHAPES = {"dense": {"kernel": (6, 4), "bias": (4,)}}
OF_A_CLIP = {"norm", "clipped_norm", "threshold", "clipped_share", "nonfinite_steps"}


@pytest.fixture(autouse=True)
def promotion():
    with relaxed():
        yield


def stepped(tx, *updates):
    params = normal(SHAPES)
    state, update = tx.init(params), jax.jit(tx.update)
    for incoming in updates or [normal(SHAPES, seed=1)]:
        _, state = update(incoming, state, params)
    return state


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))


@functools.cache
def main_chain():
    return optax.chain(clipjax.adaptive_clip(), optax.adam(1e-3), clipjax.sparsify(0.5))


def test_the_main_chain_tells_all():
    found = clipjax.metrics(stepped(main_chain()))
    assert set(found) == OF_A_CLIP | {"sparsity", "sparsity/dense/kernel"}
    norm = norm_of(normal(SHAPES, seed=1))
    expected = {
        "norm": norm,
        "threshold": 0.01 * norm_of(normal(SHAPES)),
        "clipped_norm": 0.01 * norm_of(normal(SHAPES)),
        "clipped_share": 1,
        "nonfinite_steps": 0,
        "sparsity": 0.5,
        "sparsity/dense/kernel": 0.5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_values_are_scalar_arrays():
    for value in clipjax.metrics(stepped(main_chain())).values():
        assert isinstance(value, jax.Array)
        assert value.shape == ()


@pytest.mark.parametrize(
    "name", ["clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"]
)
def test_every_clip_by_a_norm_is_found(name):
    state = stepped(optax.chain(getattr(clipjax, name)(0.01), optax.sgd(0.1)))
    found = clipjax.metrics(state)
    assert set(found) == OF_A_CLIP
    np.testing.assert_allclose(
        found["norm"], norm_of(normal(SHAPES, seed=1)), rtol=1e-6
    )
    assert found["threshold"] == np.float32(0.01)
    assert found["clipped_norm"] < 0.1 * found["norm"]


def test_shares_and_steps_are_of_all_steps_so_far():
    base = normal(SHAPES, seed=1)
    scaled = [jax.tree.map(lambda x, s=s: x * s, base) for s in (1, 1e-3, np.nan, 1, 9)]
    state = stepped(clipjax.clip_by_global_norm(0.1), *scaled)
    found = clipjax.metrics(state)
    assert found["clipped_share"] == np.float32(3 / 5)
    assert found["nonfinite_steps"] == 1


def test_before_the_first_step_all_is_zero():
    found = clipjax.metrics(main_chain().init(normal(SHAPES)))
    assert {float(value) for value in found.values()} == {0.0}


def test_where_two_measure_the_same_the_place_is_told():
    tx = optax.chain(
        clipjax.clip_by_global_norm(0.5),
        optax.sgd(0.1),
        clipjax.clip_by_block_rms(0.01),
        clipjax.sparsify(0.5),
    )
    found = clipjax.metrics(stepped(tx))
    prefixed = {f"{place}/{name}" for place in (0, 2) for name in OF_A_CLIP}
    assert set(found) == prefixed | {"sparsity", "sparsity/dense/kernel"}
    assert found["0/threshold"] == 0.5
    assert found["2/threshold"] == np.float32(0.01)
    np.testing.assert_allclose(found["2/norm"], 0.05, rtol=1e-6)


def test_the_place_is_that_of_the_measurements():
    tx = optax.chain(clipjax.clip_by_global_norm(2.0), clipjax.adaptive_clip())
    found = clipjax.metrics(stepped(tx))
    assert {"0/norm", "1/norm"} <= set(found)
    np.testing.assert_allclose(found["1/norm"], 2, rtol=1e-6)


def test_places_have_the_names_of_a_named_chain():
    tx = optax.named_chain(
        ("before", clipjax.clip_by_global_norm(0.5)),
        ("after", clipjax.clip_by_global_norm(0.1)),
    )
    found = clipjax.metrics(stepped(tx))
    assert set(found) == {f"{p}/{n}" for p in ("before", "after") for n in OF_A_CLIP}
    np.testing.assert_allclose(found["before/clipped_norm"], found["after/norm"])


WRAPPED = optax.chain(clipjax.clip_by_global_norm(0.5), clipjax.sparsify(0.5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda _: True, tree)),
        lambda tx: optax.inject_hyperparams(
            lambda rate: optax.chain(tx, optax.scale(rate))
        )(0.1),
        lambda tx: optax.partition(
            {"all": tx}, lambda tree: jax.tree.map(lambda _: "all", tree)
        ),
    ],
    ids=["apply_if_finite", "MultiSteps", "masked", "inject_hyperparams", "partition"],
)
def test_wrappers_hide_nothing(wrap):
    expected = clipjax.metrics(stepped(WRAPPED))
    assert_same(clipjax.metrics(stepped(wrap(WRAPPED))), expected)


def test_a_state_of_others_tells_nothing():
    assert clipjax.metrics(stepped(optax.adam(1e-3))) == {}
    assert clipjax.metrics(stepped(clipjax.clip(1.0))) == {}


def test_inside_jit_and_scan():
    tx, params = main_chain(), normal(SHAPES)
    updates = normal(SHAPES, seed=1)

    @jax.jit
    def train(state):
        def body(state, _):
            _, state = tx.update(updates, state, params)
            return state, clipjax.metrics(state)

        return jax.lax.scan(body, state, length=3)

    state, history = train(tx.init(params))
    assert history["norm"].shape == (3,)
    last = jax.tree.map(lambda x: x[-1], history)
    assert_same(last, clipjax.metrics(state), rtol=0)


def test_no_norm_is_computed_again():
    """Only scalars are touched: nothing has the size of a parameter."""
    state = main_chain().init(normal(SHAPES))
    jaxpr = jax.make_jaxpr(clipjax.metrics)(state)
    assert len(jaxpr.eqns) < 10
    assert all(v.aval.shape == () for eqn in jaxpr.eqns for v in eqn.outvars)


def test_from_a_train_state_of_linen():
    params = normal(SHAPES)
    state = TrainState.create(apply_fn=None, params=params, tx=main_chain())
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = step(state, normal(SHAPES, seed=1))
    expected = clipjax.metrics(stepped(main_chain()))
    assert_same(clipjax.metrics(state.opt_state), expected)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 4, rngs=rngs)


def with_params(params):
    model = Net(nnx.Rngs(0))
    nnx.update(model, params)
    return model


def test_from_an_optimizer_of_nnx():
    model = with_params(normal(SHAPES))
    optimizer = nnx.Optimizer(model, main_chain(), wrt=nnx.Param)
    before = clipjax.metrics(optimizer.opt_state)
    assert {float(value) for value in before.values()} == {0.0}
    grads = nnx.state(with_params(normal(SHAPES, seed=1)), nnx.Param)
    update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    update(model, optimizer, grads)
    found = clipjax.metrics(optimizer.opt_state)
    assert all(isinstance(value, jax.Array) for value in found.values())
    assert_same(found, clipjax.metrics(stepped(main_chain())))


def test_inside_a_jitted_step_of_nnx():
    model = with_params(normal(SHAPES))
    optimizer = nnx.Optimizer(model, main_chain(), wrt=nnx.Param)
    grads = nnx.state(with_params(normal(SHAPES, seed=1)), nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)
        return clipjax.metrics(optimizer.opt_state)

    assert_same(step(model, optimizer, grads), clipjax.metrics(stepped(main_chain())))


def test_the_optimizer_itself_is_no_state():
    with pytest.raises(TypeError, match="opt_state must be the state"):
        clipjax.metrics(clipjax.sparsify(0.5))
