"""Sparsity around an optimizer: nothing of what is pruned reaches it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax import P

import clipjax
from clipjax import masks, patterns
from clipjax.scores import Magnitude
from helpers import assert_same, normal, relaxed, spec
from test_contract import MOST_BYTES, collectives, devices

SMALL = {"kernel": (6, 8)}
STORAGES = {
    "bits": masks.Bits(),
    "booleans": masks.Booleans(),
    "zeros": masks.Zeros(),
}
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def largest_gradient(param, update):
    """A score that lets what is pruned return."""
    del param
    return jnp.abs(update)


class Sorted:
    """As `Unstructured` does it, but compiled in no time."""

    def masks(self, scores, sparsity, *, allocation, axis_name=None):
        def one(x):
            kept = x.size - jnp.ceil(sparsity * x.size).astype(jnp.int32)
            place = jnp.argsort(jnp.argsort(-x.ravel(), stable=True))
            return (place < kept).reshape(x.shape)

        return {
            p: one(x.x if isinstance(x, Magnitude) else x) for p, x in scores.items()
        }


def quick(inner, sparsity, **options):
    return clipjax.sparse(inner, sparsity, pattern=Sorted(), **options)


def train(tx, params, grads):
    """The parameters and states after each step."""
    history = []
    with relaxed():
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
            history.append((params, state))
    return history


def gradients(shapes, steps):
    return [normal(shapes, seed=1 + step) for step in range(steps)]


# The same zeros as those of the projection


@each_storage
def test_without_moments_it_is_the_projection_at_the_end_of_a_chain(storage):
    ramp = optax.polynomial_schedule(0.1, 0.8, 3, 8)
    options = {"every": 2, "storage": storage}
    params, grads = normal(SMALL), gradients(SMALL, 10)
    around = train(clipjax.sparse(optax.sgd(0.1), ramp, **options), params, grads)
    behind = optax.chain(optax.sgd(0.1), clipjax.sparsify(ramp, **options))
    for (actual, state), (expected, other) in zip(
        around, train(behind, params, grads), strict=True
    ):
        assert_same(actual, expected, rtol=0)
        assert_same(state.sparse, other[-1], rtol=0)
    assert (actual["kernel"] == 0).sum() == 39  # ⌈0.8·48⌉


def test_every_storage_trains_alike():
    ramp = optax.polynomial_schedule(0.1, 0.8, 3, 8)
    params, grads = normal(SMALL), gradients(SMALL, 10)
    runs = [
        train(quick(optax.adamw(0.1), ramp, every=3, storage=s), params, grads)
        for s in STORAGES.values()
    ]
    for (first, state), *others in zip(*runs, strict=True):
        for other, its_state in others:
            assert_same(other, first, rtol=0)
            assert_same(its_state.sparse_inner, state.sparse_inner, rtol=0)


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float32")],
)
def test_zeros_are_exact_in_every_dtype(param_dtype, grad_dtype):
    params = normal(SMALL, dtype=param_dtype)
    grads = [normal(SMALL, seed=seed, dtype=grad_dtype) for seed in (1, 2, 3)]
    tx = quick(optax.sgd(0.1, momentum=0.9), 0.7, every=2)
    for after, _ in train(tx, params, grads):
        kernel = np.asarray(after["kernel"].astype(jnp.float32))
        assert (kernel == 0).sum() == 34  # ⌈0.7·48⌉
        assert not np.signbit(kernel[kernel == 0]).any()
        assert after["kernel"].dtype == param_dtype


def test_a_pattern_may_be_structured():
    tx = clipjax.sparse(optax.adam(0.1), 0.5, pattern=patterns.NofM(2, 4))
    ((after, _),) = train(tx, normal(SMALL), gradients(SMALL, 1))
    groups = np.asarray(after["kernel"]).reshape(6, 2, 4)
    np.testing.assert_array_equal((groups != 0).sum(-1), 2)


# What the optimizer sees


def test_the_optimizer_sees_zeros_where_parameters_are_pruned():
    def init(params):
        return params, params, jnp.int32(0)

    def spy(updates, state, params, *, value, **others):
        assert list(others) == ["other"]
        return updates, (updates, params, jnp.asarray(value, jnp.int32))

    tx = quick(optax.GradientTransformationExtraArgs(init, spy), 0.5)
    params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
    grads = {"kernel": jnp.array([[5.0, jnp.inf], [jnp.nan, 6.0]])}
    state = tx.init(params)
    for grad, value in [(params, 7), (grads, 8)]:
        updates, state = tx.update(grad, state, params, value=value, other=2)
    hidden = {"kernel": jnp.array([[5.0, 0.0], [0.0, 6.0]])}
    visible = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]])}
    assert_same(state.sparse_inner, (hidden, visible, jnp.int32(8)), rtol=0)
    expected = {"kernel": jnp.array([[5.0, 1.0], [-2.0, 6.0]])}
    assert_same(updates, expected, rtol=0)


def test_a_clip_inside_measures_what_is_kept():
    tx = quick(optax.clip_by_global_norm(1.0), 0.5)
    params = {"kernel": jnp.array([[1.0, 2.0, 30.0, 40.0]])}
    grads = {"kernel": jnp.array([[100.0, 100.0, 3.0, 4.0]])}
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = {"kernel": jnp.array([[-1.0, -2.0, 0.6, 0.8]])}
    assert_same(updates, expected, rtol=1e-6)


def test_a_score_sees_raw_gradients():
    tx = quick(optax.sgd(1.0), 0.5, score=largest_gradient)
    params = {"kernel": jnp.array([[1.0, 1.0, 1.0, 1.0]])}
    grads = [
        {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])},
        {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])},
    ]
    (first, _), (second, _) = train(tx, params, grads)
    assert_same(first["kernel"], jnp.array([[-3.0, -2.0, 0.0, 0.0]]), rtol=0)
    assert_same(second["kernel"], jnp.array([[0.0, 0.0, -3.0, -4.0]]), rtol=0)


def test_a_score_with_a_memory_is_tracked_in_every_step():
    class Total:
        def init(self, path, param):
            assert path == "kernel"
            return jnp.zeros_like(param)

        def track(self, memory, param, update):
            return memory + jnp.abs(update)

        def score(self, memory, param, update):
            return memory

    tx = quick(optax.sgd(0.1), 0.5, score=Total(), every=3)
    grads = gradients(SMALL, 4)
    history = train(tx, normal(SMALL), grads)
    total = sum(np.abs(np.asarray(grad["kernel"], np.float64)) for grad in grads)
    kept = np.asarray(history[-1][0]["kernel"]) != 0
    assert kept.sum() == 24
    assert total[kept].min() > total[~kept].max()


# What the optimizer remembers


def kernels_only(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


INNER = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1, initial_scale=0.5),
    "adagrad": optax.adagrad(0.1),
    "rprop": optax.rprop(0.1),
    "chain": optax.chain(clipjax.adaptive_clip(), optax.adam(0.1)),
    "masked": optax.masked(optax.adam(0.1), kernels_only),
    "partition": optax.partition(
        {True: optax.adam(0.1), False: optax.sgd(0.1)}, kernels_only
    ),
    "inject": optax.inject_hyperparams(optax.adam)(0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "carry": clipjax.carry_clipped(optax.clip(0.1)),
    "reset": clipjax.reset_moments(optax.adam(0.1), every=3),
    "adabelief": optax.adabelief(0.1, eps_root=1e-2),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1, momentum=0.9)),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
}


@pytest.mark.parametrize("name", INNER)
def test_with_a_new_mask_what_it_or_the_last_hides_has_new_moments(name):
    """The scores are random, and so entries come and go with every mask."""
    inner = optax.with_extra_args_support(INNER[name])
    tx = quick(inner, 0.6, score=largest_gradient, every=2)
    params = normal({"kernel": (6, 8), "bias": (8,)})
    steps = gradients({"kernel": (6, 8), "bias": (8,)}, 5)
    known, kept, returned, differ = inner.init(params), np.ones((6, 8), bool), 0, 0
    for number, (after, state) in enumerate(train(tx, params, steps)):
        last = kept
        kept = np.asarray(masks.unpack(state.sparse.mask_bits["kernel"], 8))
        assert kept.sum() == 19
        returned += (kept & ~last).sum()
        visible = seen(params, kept)
        with relaxed():
            if number % 2 == 0:
                fresh = inner.init(visible)
                pairs = zip(*map(own, (known, fresh)), strict=True)
                differ += sum((old != new).sum() for old, new in pairs)
                stays = last & kept & np.asarray(params["kernel"] != 0)
                known = anew(known, fresh, stays)
            _, known = jax.jit(inner.update)(seen(steps[number], kept), known, visible)
        assert_same(state.sparse_inner, known, rtol=1e-5, atol=1e-6)
        params = after
    assert returned > 0
    assert differ > 0


def seen(tree, mask):
    return tree | {"kernel": jnp.where(mask, tree["kernel"], 0)}


def anew(known, fresh, stays):
    """The moments of the kernel, new where they do not stay."""
    return jax.tree.map(
        lambda old, new: jnp.where(stays, old, new) if own(old) else old, known, fresh
    )


def own(tree):
    """Returns the leaves that are moments of the kernel."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if x.shape == (6, 8) and x.dtype == jnp.float32]


def test_the_moments_of_a_returning_entry_are_those_of_a_first_step():
    tx = quick(optax.adam(0.1), 0.5, score=largest_gradient)
    grads = [
        {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])},
        {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])},
    ]
    history = train(tx, {"kernel": jnp.ones((1, 4))}, grads)
    adam = history[-1][1].sparse_inner[0]
    assert_same(adam.mu["kernel"], jnp.array([[0, 0, 0.3, 0.4]], jnp.float32))
    squares = jnp.array([[0, 0, 0.009, 0.016]], jnp.float32)
    assert_same(adam.nu["kernel"], squares, rtol=1e-5)


def test_moments_that_are_not_the_parameters_own_are_left_alone():
    shapes = {"kernel": (128, 160)}  # large enough for Adafactor's rows and columns
    for inner in (optax.adafactor(0.1), optax.flatten(optax.adam(0.1))):
        tx = quick(inner, 0.9)
        ((after, state),) = train(tx, normal(shapes), gradients(shapes, 1))
        alone = inner.init(normal(shapes))
        assert jax.tree.structure(state.sparse_inner) == jax.tree.structure(alone)
        assert (after["kernel"] != 0).sum() == 2048


def test_leaves_of_one_name_are_told_apart_by_their_whole_path():
    """`kernel` is the end of the path of all three."""
    shapes = {"kernel": (4, 4), "a": {"kernel": (4, 4)}, "b": {"a": {"kernel": (4, 4)}}}
    tx = quick(optax.sgd(0.1, momentum=0.9), 0.5)
    ((after, state),) = train(tx, normal(shapes), gradients(shapes, 1))
    trace = optax.tree.get(state, "trace")
    for param, moment in zip(*map(jax.tree.leaves, (after, trace)), strict=True):
        np.testing.assert_array_equal(moment != 0, param != 0)


# An elementwise optimizer need not be shown zeros

MOVING = {"score": largest_gradient, "every": 2}
ELEMENTWISE = (
    "momentum adam adamw amsgrad lion rmsprop rprop inject multi_steps schedule_free"
)


@pytest.mark.parametrize("name", ELEMENTWISE.split())
def test_an_elementwise_optimizer_gives_the_same_parameters(name):
    params, steps = normal({"kernel": (6, 8)}), gradients({"kernel": (6, 8)}, 5)
    shown, raw = (
        train(quick(INNER[name], 0.6, elementwise=is_raw, **MOVING), params, steps)
        for is_raw in (False, True)
    )
    for (expected, one), (actual, other) in zip(shown, raw, strict=True):
        assert_same(actual, expected, rtol=1e-6, atol=1e-7)
        assert_same(other.sparse, one.sparse, rtol=0)
    assert not np.array_equal(shown[0][0]["kernel"] == 0, actual["kernel"] == 0)


def test_what_an_elementwise_optimizer_sees_is_as_it_is():
    """No NaN of a pruned entry comes back with it."""
    tx = quick(optax.sgd(1.0, momentum=0.5), 0.5, elementwise=True, **MOVING)
    grads = [
        {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])},
        {"kernel": jnp.array([[4.0, 3.0, jnp.nan, 1.0]])},
        {"kernel": jnp.array([[4.0, 1.0, 3.0, 2.0]])},
    ]
    history = train(tx, {"kernel": jnp.full((1, 4), 8.0)}, grads)
    trace = history[1][1].sparse_inner[0].trace["kernel"]
    np.testing.assert_array_equal(trace, [[6.0, 4.5, np.nan, 1.5]])
    after = history[2][0]["kernel"]
    np.testing.assert_array_equal(after, [[8 - 4 - 6 - 7.0, 0, -3.0, 0]])


def test_what_returns_is_forgotten_though_nobody_set_it_to_zero():
    params, steps = normal({"kernel": (6, 8)}), gradients({"kernel": (6, 8)}, 6)
    ends = []
    for is_raw in (False, True):
        tx = quick(optax.adam(0.1), 0.6, elementwise=is_raw, **MOVING)
        halved = optax.chain(tx, optax.scale(0.5))
        ends.append(train(halved, params, steps)[-1][0])
    assert_same(*ends, rtol=1e-5, atol=1e-6)
    assert (ends[0]["kernel"] != 0).all()


# Due until it is made


def test_a_step_that_is_not_finite_makes_no_mask():
    level = lambda step: 0.1 + 0.1 * step.astype(jnp.float32)  # noqa: E731
    tx = quick(optax.sgd(0.1), level, every=3)
    grads = gradients(SMALL, 7)
    for bad in (0, 3, 4):
        grads[bad] = jax.tree.map(lambda g: g.at[1, 2].set(jnp.nan), grads[bad])
    history = train(tx, normal(SMALL), grads)
    made = [float(state.sparse.total_sparsity) for _, state in history]
    steps = [None, 1, 1, 1, 1, 5, 5]  # at which each mask was made
    expected = [0 if step is None else 0.1 + 0.1 * step for step in steps]
    np.testing.assert_allclose(made, expected, atol=0.02)
    assert [int(state.masks_made) for _, state in history] == [0, 1, 1, 1, 1, 2, 2]


def test_a_mask_that_a_wrapper_discards_is_made_up_for():
    tx = quick(optax.adam(0.1), 0.5, every=100)
    wrapped = optax.apply_if_finite(tx, 10)
    shapes = SMALL | {"bias": (8,)}  # whose gradient the wrapper sees alone
    grads = gradients(shapes, 3)
    for bad in (0, 1):
        grads[bad] = grads[bad] | {"bias": grads[bad]["bias"] * jnp.nan}
    history = train(wrapped, normal(shapes), grads)
    assert [(int((p["kernel"] == 0).sum())) for p, _ in history] == [0, 0, 24]


# Everywhere


def test_it_trains_alike_inside_optax():
    tx = quick(optax.adamw(0.1), 0.6, score=largest_gradient, every=2)
    params, grads = normal(SMALL), gradients(SMALL, 4)
    expected = train(tx, params, grads)
    for around in (
        optax.chain(optax.identity(), tx),
        optax.apply_if_finite(tx, 3),
        optax.masked(tx, kernels_only),
        optax.partition({True: tx, False: optax.sgd(0.1)}, kernels_only),
        optax.MultiSteps(tx, 1),
    ):
        for (actual, _), (after, _) in zip(
            train(around, params, grads), expected, strict=True
        ):
            assert_same(actual, after)


def test_a_scan_gives_what_a_loop_gives():
    tx = quick(optax.adamw(0.1), 0.6, score=largest_gradient, every=2)
    params, grads = normal(SMALL), gradients(SMALL, 4)

    def step(carry, grad):
        updates, state = tx.update(grad, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    with relaxed():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
        scan = jax.jit(lambda start: jax.lax.scan(step, start, stacked)[0])
        actual = scan((params, tx.init(params)))
    assert_same(actual, train(tx, params, grads)[-1])
    assert spec(actual[1]) == spec(tx.init(params))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="dense")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 8, rngs=rngs)


def test_flax_and_nnx_get_the_same_bits():
    tx = quick(optax.adam(0.1), 0.6, score=largest_gradient, every=2)
    with relaxed():
        params = Linen().init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
        grads = [jax.tree.map(lambda p, s=s: p * 2 + s, params) for s in range(4)]
        expected = train(tx, params, grads)[-1]

        model = NNX(nnx.Rngs(0))
        nnx.update(model, params)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        apply = nnx.jit(lambda model, optimizer, grad: optimizer.update(model, grad))
        for grad in grads:
            own = jax.tree.map(lambda leaf: leaf, nnx.state(model, nnx.Param))
            nnx.replace_by_pure_dict(own, grad)
            apply(model, optimizer, own)
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected[0], rtol=0)
    moment = optax.tree.get(expected[1], "mu")["dense"]["kernel"]
    assert ((moment == 0) == (expected[0]["dense"]["kernel"] == 0)).all()
    found = jax.tree.leaves(optimizer.opt_state)
    assert any(leaf.shape == moment.shape and (leaf == moment).all() for leaf in found)


SPLIT = {"rows": {"kernel": (16, 24)}, "columns": {"kernel": (8, 64), "bias": (64,)}}
SPECS = {
    "rows": {"kernel": P("devices")},
    "columns": {"kernel": P(None, "devices"), "bias": P()},
}


def test_a_mesh_changes_nothing_and_gathers_nothing():
    """With moments and a score; the contract has neither, but both kinds of mesh."""
    tx = clipjax.sparse(optax.adam(0.1), 0.6, score=largest_gradient)
    params, *grads = [normal(SPLIT, seed=seed) for seed in range(4)]
    expected = train(tx, params, grads)[-1]
    mesh = devices("Explicit")
    places = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    params, *grads = (jax.device_put(tree, places) for tree in (params, *grads))
    with relaxed():
        state = jax.jit(tx.init, keep_unused=True)(params)
        compiled = jax.jit(tx.update).lower(grads[0], state, params).compile()
        for exchange, size in collectives(compiled):
            assert exchange == "all-reduce"
            assert size <= MOST_BYTES
        for grad in grads:
            arguments = jax.device_put(
                (grad, state, params), compiled.input_shardings[0]
            )
            updates, state = compiled(*arguments)
            params = optax.apply_updates(params, updates)
    assert_same(jax.device_get((params, state)), jax.device_get(expected), rtol=1e-5)


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must lie between 0 and 1"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        clipjax.sparse(**({"inner": optax.sgd(0.1), "sparsity": 0.5} | arguments))


def test_elementwise_is_a_flag():
    with pytest.raises(TypeError, match="elementwise must be True or False, but is 1"):
        clipjax.sparse(optax.sgd(0.1), 0.5, elementwise=1)


def test_it_says_that_it_needs_parameters():
    tx = clipjax.sparse(optax.sgd(0.1), 0.5)
    state = tx.init(normal(SMALL))
    with pytest.raises(ValueError, match=r"^sparse reads the parameters, but"):
        tx.update(normal(SMALL), state)


def test_a_leaf_that_shares_the_end_of_a_path_keeps_its_moments():
    params = {"kernel": jnp.ones((4, 4)), "head": {"kernel": jnp.ones((4, 4))}}
    tx = clipjax.sparse(
        optax.trace(0.9), 0.75, where=lambda path, leaf: path == "kernel"
    )
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    trace = state.sparse_inner.trace
    assert jnp.count_nonzero(trace["kernel"]) == 4
    assert jnp.count_nonzero(trace["head"]["kernel"]) == 16
