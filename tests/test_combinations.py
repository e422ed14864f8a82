"""Exact zeros with every optimizer and wrapper of Optax: what works, and what does not.

What does not is found by `lint` and repaired by `finalize`, or raises.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from helpers import normal, relaxed

SHAPES = {"kernel": (8, 8), "bias": (8,)}
ZEROS = 32
GRADS = normal(SHAPES, seed=1)
ADAM = optax.adam(1e-2)


class Half:
    """Keeps the larger half by sorting, which compiles in no time, or everything."""

    def masks(self, scores, sparsity, *, allocation, axis_name=None):
        del allocation, axis_name

        def half(x):
            middle = jnp.sort(jnp.ravel(x))[x.size // 2 - 1]
            return (x > middle) | (sparsity == 0)

        return {path: half(x) for path, x in scores.items()}


S = clipjax.sparsify(0.5, pattern=Half())
LATE = clipjax.sparsify(lambda step: 0.5 * (step > 1), pattern=Half())
INSIDE = optax.chain(ADAM, S)


def loss(params):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def train(tx, params=None, *, steps=2, dtype="float32", grads=GRADS):
    """The parameters after some steps, and the state."""
    params = normal(SHAPES, dtype=dtype) if params is None else params

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with relaxed():
        state = tx.init(params)
        for _ in range(steps):
            params, state = step(params, state)
    return params, state


def assert_exact(params, number=ZEROS):
    """That many zeros, none of them negative, and everything else has moved."""
    kernel = np.asarray(params["kernel"], np.float64)
    assert (kernel == 0).sum() == number
    assert not np.signbit(kernel[kernel == 0]).any()
    assert np.isfinite(kernel).all()
    assert (params["bias"] != 0).all()


def assert_dense(params):
    assert (params["kernel"] == 0).sum() == 0


# Every optimizer before the projection

OPTIMIZERS = {
    "adabelief": optax.adabelief(1e-2),
    "adadelta": optax.adadelta(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "adagrad": optax.adagrad(1e-2),
    "adam": optax.adam(1e-2),
    "adamax": optax.adamax(1e-2),
    "adamaxw": optax.adamaxw(1e-2),
    "adamw": optax.adamw(1e-2),
    "adan": optax.adan(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "fromage": optax.fromage(1e-2),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "lbfgs": optax.lbfgs(1e-2, linesearch=None),
    "lion": optax.lion(1e-2),
    "nadam": optax.nadam(1e-2),
    "nadamw": optax.nadamw(1e-2),
    "noisy_sgd": optax.noisy_sgd(1e-2, key=0),
    "novograd": optax.novograd(1e-2),
    "optimistic_adam_v2": optax.optimistic_adam_v2(1e-2),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent(1e-2),
    "polyak_sgd": optax.polyak_sgd(1e-2),
    "radam": optax.radam(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "rprop": optax.rprop(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "sign_sgd": optax.sign_sgd(1e-2),
    "signum": optax.signum(1e-2),
    "sm3": optax.sm3(1e-2),
    "yogi": optax.yogi(1e-2),
    "ademamix": optax.contrib.ademamix(1e-2),
    "acprop": optax.contrib.acprop(1e-2),
    "adopt": optax.contrib.adopt(1e-2),
    "cocob": optax.contrib.cocob(),
    "dadapt_adamw": optax.contrib.dadapt_adamw(),
    "dog": optax.contrib.dog(),
    "dowg": optax.contrib.dowg(),
    "madgrad": optax.contrib.madgrad(1e-2),
    "momo": optax.contrib.momo(),
    "momo_adam": optax.contrib.momo_adam(),
    "muon": optax.contrib.muon(1e-2),
    "prodigy": optax.contrib.prodigy(),
    "sophia": optax.contrib.sophia(1e-2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(1e-2),
    "lbfgs with line search": optax.lbfgs(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_any_optimizer_zeros_are_exact(name):
    tx, params = OPTIMIZERS[name], normal(SHAPES)
    extra = {"value": jnp.float32(2.0), "grad": GRADS, "value_fn": loss}
    if name == "sophia":
        extra["obj_fn"] = loss
    with relaxed():
        update = optax.with_extra_args_support(tx).update
        moved, _ = jax.jit(lambda s: update(GRADS, s, params, **extra))(tx.init(params))
        updates, _ = PROJECT(moved, REAL.init(params), params)
    assert_exact(optax.apply_updates(params, updates))


REAL = clipjax.sparsify(0.5)
PROJECT = jax.jit(REAL.update)  # compiled once for all optimizers


@pytest.mark.parametrize(
    ("name", "dtype"), [("adam", "float32"), ("lion", "bfloat16"), ("muon", "bfloat16")]
)
def test_in_one_program_with_it_too(name, dtype):
    params, _ = train(optax.chain(OPTIMIZERS[name], REAL), dtype=dtype)
    assert params["kernel"].dtype == dtype
    assert_exact(params)


# Wrappers in which, and after which, zeros are exact


def everywhere(label):
    return lambda tree: jax.tree.map(lambda _: label, tree)


EXACT = {
    "MultiSteps around it": optax.MultiSteps(INSIDE, 2),
    "MultiSteps before it": optax.chain(optax.MultiSteps(ADAM, 2), S),
    "apply_if_finite around it": optax.apply_if_finite(INSIDE, 3),
    "apply_if_finite before it": optax.chain(optax.apply_if_finite(ADAM, 3), S),
    "masked": optax.masked(INSIDE, everywhere(True)),
    "partition": optax.partition({"x": INSIDE}, everywhere("x")),
    "conditionally_mask": optax.conditionally_mask(INSIDE, lambda step, **_: step > 0),
    "mechanize before it": optax.chain(optax.contrib.mechanize(ADAM), S),
    "sam before it": optax.chain(optax.contrib.sam(ADAM, optax.sgd(0.1)), S),
    "keep_params_nonnegative after it": optax.chain(
        INSIDE, optax.keep_params_nonnegative()
    ),
    "skip_spikes around it": clipjax.skip_spikes(INSIDE),
    "reset_moments around adam": optax.chain(clipjax.reset_moments(ADAM), S),
}


@pytest.mark.parametrize("name", EXACT)
def test_zeros_are_exact(name):
    params = normal(SHAPES)
    if "nonnegative" in name:
        params = jax.tree.map(jnp.abs, params)
    params, _ = train(EXACT[name], params)
    assert_exact(params)


def test_in_an_nnx_optimizer():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, INSIDE, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.cos, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)

    with relaxed():
        for _ in range(2):
            step(model, optimizer)
    assert_exact(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


# What cannot work is linted, and repaired


FREE = optax.contrib.schedule_free
BROKEN = {
    "scale after it": optax.chain(INSIDE, optax.scale(0.5)),
    "decay after it": optax.chain(INSIDE, optax.add_decayed_weights(0.01)),
    "noise after it": optax.chain(INSIDE, optax.add_noise(0.1, 0.1, 0)),
    "ema after it": optax.chain(INSIDE, optax.ema(0.9, debias=False)),
    "before the optimizer": optax.chain(S, ADAM),
    "in schedule_free": FREE(optax.chain(optax.sgd(0.1), LATE), 0.1),
    "in mechanize": optax.contrib.mechanize(INSIDE),
    "in flatten": optax.flatten(INSIDE),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_zeros_is_linted(name):
    tx = BROKEN[name]
    params, _ = train(tx, steps=3)
    assert_dense(params)
    with relaxed():
        (finding,) = clipjax.lint(tx)
    assert finding.message
    with relaxed():
        repaired = {str(found) for found in clipjax.lint(optax.chain(tx, S))}
    assert not any("follows" in message for message in repaired)


def test_schedule_free_before_it_leaves_what_is_evaluated_dense():
    tx = optax.chain(FREE(optax.sgd(0.1), 0.1), S)
    params, state = train(tx, steps=3)
    assert_exact(params)
    evaluated = optax.contrib.schedule_free_eval_params(state[0], params)
    assert_dense(evaluated)
    (finding,) = clipjax.lint(state)
    assert "finalize" in finding.message
    assert_exact(clipjax.finalize(evaluated, like=params))


def test_lookahead_around_it_refills_and_before_it_does_not():
    start = optax.LookaheadParams.init_synced(normal(SHAPES))
    inside = optax.lookahead(optax.chain(optax.sgd(0.1), S), 2, 0.5)
    params, state = train(inside, start, steps=2)  # the second is a sync
    assert_dense(params.fast)
    assert_dense(params.slow)
    assert "slow ones that are dense" in clipjax.lint(state)[0].message
    params, state = train(optax.chain(optax.lookahead(ADAM, 2, 0.5), S), start, steps=3)
    assert_exact(params.fast)
    assert_exact(params.slow)
    assert "masks of its own" in clipjax.lint(state)[0].message
    slow = clipjax.finalize(params.slow, like=params.fast)
    np.testing.assert_array_equal(
        slow["kernel"] == 0, (params.slow["kernel"] == 0) | (params.fast["kernel"] == 0)
    )


def test_sam_around_it_is_exact_after_a_sync():
    tx = optax.contrib.sam(optax.chain(optax.sgd(0.1), S), optax.sgd(0.1))
    assert_dense(train(tx, steps=1)[0])
    assert_exact(train(tx, steps=2)[0])
    assert "after these only" in clipjax.lint(tx)[0].message


def test_an_average_of_the_parameters_is_finalized():
    params, average = normal(SHAPES), normal(SHAPES)
    for _ in range(2):
        params, _ = train(INSIDE, params, steps=1)
        average = optax.incremental_update(params, average, 0.1)
    assert_dense(average)
    final = clipjax.finalize(average, like=params)
    assert_exact(final)
    np.testing.assert_array_equal(final["kernel"] == 0, params["kernel"] == 0)


def masters(inner):
    """Keeps float32 masters: the parameters are what they round to."""

    def wide(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params):
        return wide(params), inner.init(wide(params))

    def update(updates, state, params=None, **extra_args):
        master, inner_state = state
        moved, inner_state = inner.update(
            wide(updates), inner_state, master, **extra_args
        )
        master = optax.apply_updates(master, moved)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), master, params)
        change = jax.tree.map(jnp.subtract, wide(rounded), wide(params))
        return change, (master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def test_bfloat16_parameters_of_float32_masters():
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    params, (master, _) = train(masters(INSIDE), dtype="bfloat16", grads=grads)
    assert (params["kernel"].dtype, master["kernel"].dtype) == ("bfloat16", "float32")
    assert_exact(params)
    assert_exact(master)
    np.testing.assert_array_equal(master["kernel"] == 0, params["kernel"] == 0)


def test_masters_inside_of_the_projection_are_finalized():
    tx = optax.chain(masters(ADAM), S)
    params, ((master, _), _) = train(tx, dtype="bfloat16")
    assert_exact(params)
    assert_dense(master)
    assert_exact(clipjax.finalize(master, like=params))


# What raises


def test_narrow_gradients_within_apply_if_finite_raise():
    """Its branches have to have one dtype; a rounded -θ would leave a rest."""
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), S), 3)
    with pytest.raises(TypeError, match="bfloat16"):
        train(tx, grads=grads)
    cast = optax.stateless(lambda u, p: jax.tree.map(lambda a: a.astype("float32"), u))
    assert_exact(train(optax.chain(cast, tx), grads=grads)[0])


def test_a_cast_after_it_leaves_a_rest():
    def narrow(updates, params=None):
        del params
        return jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)

    tx = optax.chain(optax.sgd(0.1), S, optax.stateless(narrow))
    params, _ = train(tx, steps=1)
    assert 0 < (params["kernel"] == 0).sum() + 1 < ZEROS
    assert "follows" in clipjax.lint(tx)[0].message
