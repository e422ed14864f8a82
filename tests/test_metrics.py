"""`metrics` finds what was measured, wherever the state of a transform ends up."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from helpers import relaxed

PARAMS = {
    "Dense_0": {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.zeros(4)}
}
UPDATES = jax.tree.map(jnp.ones_like, PARAMS)  # 12 ones
NORM = np.float32(np.sqrt(12))


def chain():
    return optax.chain(
        clipjax.clip_by_global_norm(1.0), optax.sgd(0.1), clipjax.sparsify(0.75)
    )


def test_a_chain_reports_its_last_step():
    tx = chain()
    _, state = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    found = {name: float(value) for name, value in clipjax.metrics(state).items()}
    assert found == {
        "norm": pytest.approx(NORM, rel=1e-6),
        "clipped_norm": pytest.approx(1, rel=1e-6),
        "threshold": 1.0,
        "clipped_share": 1.0,
        "nonfinite_steps": 0.0,
        "sparsity": 0.75,
        "sparsity/Dense_0/kernel": 0.75,
    }


def test_shares_and_counts_go_over_all_steps():
    tx = clipjax.clip_by_global_norm(2.0)
    state = tx.init(PARAMS)
    for size in (1.0, 0.1, 0.1, jnp.nan):
        updates = jax.tree.map(lambda u, size=size: size * u, UPDATES)
        _, state = tx.update(updates, state)
    found = clipjax.metrics(state)
    assert found["clipped_share"] == 0.25
    assert found["nonfinite_steps"] == 1
    assert found["norm"] == pytest.approx(0.1 * NORM, rel=1e-6)


def test_before_the_first_step_everything_is_zero():
    found = clipjax.metrics(chain().init(PARAMS))
    assert set(map(float, found.values())) == {0.0}


def test_nothing_is_computed_anew():
    jaxpr = jax.make_jaxpr(clipjax.metrics)(chain().init(PARAMS))
    largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest == 1
    assert not re.search(r"\b(reduce_sum|dot_general|sqrt)\b", str(jaxpr))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.named_chain(("ours", tx)),
        lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda _: True, tree)),
        lambda tx: optax.inject_hyperparams(
            lambda rate: optax.chain(tx, optax.sgd(rate))
        )(rate=1.0),
    ],
    ids=["MultiSteps", "apply_if_finite", "named_chain", "masked", "inject"],
)
def test_it_looks_inside_wrappers(wrap):
    tx = wrap(clipjax.clip_by_global_norm(1.0))
    with relaxed():
        _, state = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    assert clipjax.metrics(state)["norm"] == pytest.approx(NORM, rel=1e-6)


def test_two_of_a_kind_are_told_apart_by_their_place():
    tx = optax.chain(clipjax.clip_by_global_norm(2.0), clipjax.adaptive_clip())
    _, state = tx.update(UPDATES, tx.init(PARAMS), PARAMS)
    found = clipjax.metrics(state)
    assert found["0/norm"] == pytest.approx(NORM, rel=1e-6)
    assert found["1/clip/norm"] == pytest.approx(2, rel=1e-6)
    assert "norm" not in found


def test_a_chain_without_ours_reports_nothing():
    assert clipjax.metrics(optax.adam(1.0).init(PARAMS)) == {}


def test_nnx_optimizers_report_the_same_inside_and_outside_of_jit():
    class Model(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(PARAMS["Dense_0"]["kernel"])

    model = Model()
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model.kernel[...]))(model)
        optimizer.update(model, grads)
        return clipjax.metrics(optimizer.opt_state)

    with relaxed():
        inside = step(model, optimizer)
    outside = clipjax.metrics(optimizer.opt_state)
    assert {name: float(value) for name, value in inside.items()} == {
        name: float(value) for name, value in outside.items()
    }
    assert inside["norm"] == pytest.approx(np.sqrt(8), rel=1e-6)
    assert inside["sparsity/kernel"] == 0.75
