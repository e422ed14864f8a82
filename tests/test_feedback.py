"""Compression with feedback: nothing is lost, and each device keeps its own rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType

from clipjax import allocations, compression as compressors, contrib
from helpers import assert_same, normal, x64

SHAPES = {"a": (9, 11), "b": (40,)}
STEP = jnp.int32(0)


def leaves(seed=0, **options):
    return normal(SHAPES, seed=seed, **options)


def largest(x, number):
    """NumPy's mask of the largest magnitudes, the first of equal ones."""
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    mask = np.zeros(x.size, bool)
    mask[order[:number]] = True
    return mask.reshape(x.shape)


def kept(size, sparsity):
    return max(size - int(np.ceil(sparsity * size - 1e-5)), 1)


# Compressors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_top_k_sends_the_largest_of_each_leaf(dtype):
    with x64(dtype == "float64"):
        incoming = jax.tree.map(lambda x: jnp.round(2 * x) / 2, leaves(dtype=dtype))
        sent = jax.jit(compressors.top_k(0.8))(incoming, STEP)
        for path, after in sent.items():
            before = np.asarray(incoming[path])  # with many ties
            mask = largest(before.astype(np.float64), kept(before.size, 0.8))
            np.testing.assert_array_equal(after, np.where(mask, before, 0))
            assert after.dtype == before.dtype


def test_top_k_of_all_leaves_compares_them():
    incoming = leaves()
    incoming["b"] = incoming["b"] * 3
    allocation = functools.partial(allocations.global_, floor=0)
    compress = compressors.top_k(0.8, allocation=allocation)
    sent = jax.jit(compress)(incoming, STEP)
    flat = np.concatenate([np.ravel(x) for x in incoming.values()])
    expected = np.where(largest(flat, kept(flat.size, 0.8)), flat, 0)
    actual = np.concatenate([np.ravel(x) for x in sent.values()])
    np.testing.assert_array_equal(actual, expected)


def test_top_k_takes_an_allocation_by_path():
    half_of_a = allocations.by_path(lambda path, s: 0.5 if path == "a" else s)
    sent = jax.jit(compressors.top_k(0.9, allocation=half_of_a))(leaves(), STEP)
    numbers = {path: int((x != 0).sum()) for path, x in sent.items()}
    assert numbers == {"a": kept(99, 0.5), "b": kept(40, 0.9)}


def test_random_k_draws_anew_an_exact_number():
    compress = jax.jit(compressors.random_k(0.7, jax.random.key(3)))
    incoming = leaves()
    drawn = []
    for step in range(40):
        sent = compress(incoming, jnp.int32(step))
        for path, after in sent.items():
            before = incoming[path]
            assert (after != 0).sum() == kept(before.size, 0.7)
            np.testing.assert_array_equal(after[after != 0], before[after != 0])
        drawn.append(np.asarray(sent["b"] != 0))
    often = np.sum(drawn, axis=0)  # of 40 times 12 in the mean, with deviation 2.9
    assert often.min() >= 1
    assert often.max() <= 24
    same = compress(incoming, jnp.int32(39))
    np.testing.assert_array_equal(drawn[-1], same["b"] != 0)


@pytest.mark.parametrize("check_vma", [True, False])
def test_random_k_of_a_split_leaf_is_exact_and_differs_by_block(check_vma):
    compress = compressors.random_k(0.5, jax.random.key(0))
    run = jax.shard_map(
        lambda x: compress({"x": x}, STEP, "devices")["x"],
        mesh=jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,)),
        in_specs=P("devices"),
        out_specs=P("devices"),
        check_vma=check_vma,
    )
    blocks = np.asarray(jax.jit(run)(jnp.ones((8, 50)))) != 0
    assert blocks.sum() == 200
    assert len(np.unique(blocks, axis=0)) == 8


def test_sign_sends_the_mean_magnitude():
    compress = jax.jit(compressors.sign)
    for scale in (1e-30, 1.0, 1e38):  # the sum of the last is no float32
        incoming = {p: jnp.clip(x, -3, 3) * scale for p, x in leaves().items()}
        for path, after in compress(incoming, STEP).items():
            wide = np.asarray(incoming[path], np.float64)
            expected = np.sign(wide) * np.abs(wide).mean()
            np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert_same(compress({"x": jnp.zeros(3)}, STEP), {"x": jnp.zeros(3)})


def test_a_sparsity_may_follow_the_step():
    compress = jax.jit(compressors.top_k(lambda step: step.astype(jnp.float32) / 4))
    four = {"x": jnp.arange(1.0, 5.0)}
    sent = [compress(four, jnp.int32(step))["x"] for step in range(4)]
    assert [int((x != 0).sum()) for x in sent] == [4, 3, 2, 1]


# Feedback


def naive_feedback(compress, grads, decay):
    residual, sent = [np.zeros(g.shape) for g in grads[0]], []
    for grad in grads:
        total = [decay * e + g for e, g in zip(residual, grad, strict=True)]
        sent.append([compress(t) for t in total])
        residual = [t - s for t, s in zip(total, sent[-1], strict=True)]
    return sent, residual


RULES = {
    "top_k": (
        compressors.top_k(0.8),
        lambda x: np.where(largest(x, kept(x.size, 0.8)), x, 0),
    ),
    "sign": (compressors.sign, lambda x: np.sign(x) * np.abs(x).mean()),
}


@pytest.mark.parametrize(("rule", "decay"), [("top_k", 0.5), ("sign", 1.0)])
def test_what_is_left_out_comes_with_the_next(rule, decay):
    compress, plain = RULES[rule]
    tx = compressors.error_feedback(compress, decay=decay)
    grads = [normal(SHAPES, seed=seed) for seed in range(6)]
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    results = []
    for grad in grads:
        sent, state = update(grad, state)
        results.append(sent)
    wide = [[np.asarray(x, np.float64) for x in jax.tree.leaves(g)] for g in grads]
    expected, residual = naive_feedback(plain, wide, decay)
    for actual, wanted in zip(results, expected, strict=True):
        for one, other in zip(jax.tree.leaves(actual), wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(state.residual), residual, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert (state.step, jax.tree.leaves(state.residual)[0].dtype) == (6, jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nothing_is_lost_in_narrow_dtypes(dtype):
    """Not what rounding takes off, nor what a dtype is too small for."""
    tx = compressors.error_feedback(compressors.top_k(0.9))
    state, update = tx.init(jnp.zeros(40, dtype)), jax.jit(tx.update)
    arrived, gone = np.zeros(40), np.zeros(40)
    for seed in range(8):
        grad = jnp.clip(jnp.abs(normal((40,), seed=seed)), 0.1, 3) * 15_000
        grad = grad.astype(dtype)  # five of them are too much for float16
        sent, state = update(grad, state)
        assert sent.dtype == grad.dtype
        assert jnp.isfinite(sent).all()
        gone += np.asarray(sent, np.float64)
        arrived += np.asarray(grad, np.float64)
    np.testing.assert_allclose(gone + state.residual, arrived, rtol=1e-5, atol=0.1)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize(
    "make",
    [
        lambda: compressors.error_feedback(compressors.top_k(0.8)),
        lambda: contrib.deep_gradient_compression(0.8),
    ],
    ids=["error_feedback", "deep_gradient_compression"],
)
def test_a_bad_update_passes_and_is_not_remembered(make):
    tx, grads = make(), normal(SHAPES)
    state, update = tx.init(grads), jax.jit(tx.update)
    _, before = update(grads, state)
    for bad in BAD:
        broken = grads | {"b": grads["b"].at[7].set(bad)}
        sent, after = update(broken, before)
        assert_same(sent, broken, rtol=0, equal_nan=True)
        assert_same(after[1:], before[1:], rtol=0)


def test_it_reaches_what_the_compressor_alone_misses():
    """Sign descent on |x₁ + x₂| and |x₁ - x₂|: without feedback it stands still.

    From the paper's counterexamples: f(x) = ε·|x₁ + x₂| + |x₁ - x₂|, ε = 0.5.
    """

    def grad(x):
        plus, minus = jnp.sign(x[0] + x[1]), jnp.sign(x[0] - x[1])
        return jnp.stack([0.5 * plus + minus, 0.5 * plus - minus])

    def last(tx):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(grad(x), state)
            return (x + updates, state), x

        x = jnp.array([1.0, 1.5])
        return jax.lax.scan(step, (x, tx.init(x)), length=2000)[1][-1]

    signs = optax.stateless(lambda u, _: compressors.sign({"u": u})["u"])
    without = last(optax.chain(signs, optax.sgd(0.002)))
    np.testing.assert_allclose(without.sum(), 2.5, rtol=1e-3)  # as it was
    fed = compressors.error_feedback(compressors.sign)
    assert abs(last(optax.chain(fed, optax.sgd(0.002))).sum()) < 0.1


# Deep gradient compression


def naive_deep(grads, sparsity, momentum, bound=np.inf):
    u = v = np.zeros(grads[0].shape)
    sent = []
    for g in grads:
        g = g * min(1, bound / np.linalg.norm(g))
        u = momentum * u + g
        v = v + u
        mask = largest(v, kept(v.size, sparsity))
        sent.append(np.where(mask, v, 0))
        u, v = np.where(mask, 0, u), np.where(mask, 0, v)
    return sent, u, v


@pytest.mark.parametrize("max_norm", [None, 5.0])
def test_deep_compression_is_the_papers(max_norm):
    tx = contrib.deep_gradient_compression(0.8, momentum=0.7, max_norm=max_norm)
    grads = [normal((40,), seed=seed) for seed in range(8)]
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    results = []
    for grad in grads:
        sent, state = update(grad, state)
        results.append(sent)
    wide = [np.asarray(g, np.float64) for g in grads]
    expected, u, v = naive_deep(wide, 0.8, 0.7, max_norm or np.inf)
    np.testing.assert_allclose(results, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.local_velocity, u, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.local_sum, v, rtol=1e-5, atol=1e-6)


def test_deep_compression_takes_an_allocation_by_path():
    half_of_a = allocations.by_path(lambda path, s: 0.5 if path == "a" else s)
    tx = contrib.deep_gradient_compression(0.9, allocation=half_of_a)
    updates = normal(SHAPES)
    sent, _ = jax.jit(tx.update)(updates, tx.init(updates))
    assert (sent["a"] != 0).sum() == kept(99, 0.5)
    assert (sent["b"] != 0).sum() == kept(40, 0.9)


def test_a_dense_one_is_momentum():
    """Sent whole, v is u, and its momentum starts anew: plain gradients."""
    tx = contrib.deep_gradient_compression(0.0)
    grads = normal(SHAPES)
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(2):
        sent, state = update(grads, state)
        assert_same(sent, grads, rtol=0)


def test_the_warm_up_goes_in_quarters():
    tx = contrib.deep_gradient_compression(stage_steps=2)
    grads = normal((100, 100))
    state, update = tx.init(grads), jax.jit(tx.update)
    shares = []
    for _ in range(12):
        sent, state = update(grads, state)
        shares.append(float((sent == 0).mean()))
    expected = [0.75, 0.9375, 0.9844, 0.9961, 0.999, 0.999]
    np.testing.assert_allclose(shares, np.repeat(expected, 2), atol=1e-4)


# Many devices


def on_devices(tx, workers=8):
    """One step of the transform in `jax.shard_map`, each device with its gradient."""
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((workers,), ("workers",), axis_types=axis_types)

    def step(grads, state):
        own = jax.tree.map(lambda x: x[0], (grads, state))
        sent, state = tx.update(*own)
        return sent, jax.tree.map(lambda x: x[None], state)

    specs = {"in_specs": P("workers"), "out_specs": (P(), P("workers"))}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))


def each(workers, tree):
    return jax.tree.map(lambda x: jnp.stack([x] * workers), tree)


def stacked(seed, workers=8):
    trees = [normal(SHAPES, seed=100 * seed + i) for i in range(workers)]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *trees)


TRANSFORMS = {
    "error_feedback": functools.partial(
        compressors.error_feedback, compressors.top_k(0.9)
    ),
    "deep_gradient_compression": functools.partial(
        contrib.deep_gradient_compression, 0.9, momentum=0.5
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_devices_keep_their_own_rest_and_exchange_the_mean(name):
    alone, tx = TRANSFORMS[name](), TRANSFORMS[name](mean_over="workers")
    step, single = on_devices(tx), jax.jit(jax.vmap(alone.update))
    state = own = each(8, tx.init(normal(SHAPES)))
    for seed in range(3):
        grads = stacked(seed)
        mean, state = step(grads, state)
        sent, own = single(grads, own)
        expected = jax.tree.map(lambda x: x.mean(0), sent)
        assert_same(jax.device_get(mean), jax.device_get(expected), atol=1e-6)
        assert_same(jax.device_get(state), jax.device_get(own), atol=1e-6)
    rests = state[1]["b"]  # of every device, none like another
    assert len(np.unique(np.asarray(rests), axis=0)) == 8


def test_one_bad_device_spoils_no_rest():
    """Else the others would have sent what the step that is left out loses."""
    tx = TRANSFORMS["error_feedback"](mean_over="workers")
    step, state = on_devices(tx), each(8, tx.init(normal(SHAPES)))
    _, state = step(stacked(0), state)
    grads = stacked(1)
    broken = grads | {"b": grads["b"].at[3, 0].set(jnp.nan)}
    mean, after = step(broken, state)
    assert jnp.isnan(mean["b"][0])
    assert_same(after.residual, state.residual, rtol=0)


def test_each_device_clips_its_share_by_the_root():
    """‖g/N‖ ≤ c/√N: eight orthogonal gradients of that length have a mean of c."""
    options = {"momentum": 0.0, "max_norm": 1.0, "mean_over": "workers"}
    tx = contrib.deep_gradient_compression(0.0, **options)
    grads = 50 * jnp.eye(8, dtype=jnp.float32)
    mean, _ = on_devices(tx)(grads, each(8, tx.init(jnp.zeros(8))))
    np.testing.assert_allclose(np.linalg.norm(mean), 1.0, rtol=1e-5)


def test_a_training_step_with_gradients_of_each_device():
    """As the documentation says: params made varying, then the mean of what is sent."""
    tx = optax.chain(
        compressors.error_feedback(compressors.sign, mean_over="workers"),
        optax.sgd(0.05),
    )
    target = jnp.arange(1.0, 5.0)
    inputs = normal((32, 4))
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("workers",), axis_types=axis_types)

    def loss(params, inputs):
        return jnp.mean((inputs @ params - inputs @ target) ** 2)

    def train(inputs):
        def step(carry, _):
            params, state = carry
            varying = jax.lax.pcast(params, "workers", to="varying")
            grads = jax.grad(loss)(varying, inputs)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.zeros(4)
        state = tx.init(jax.lax.pcast(params, "workers", to="varying"))
        (params, state), _ = jax.lax.scan(step, (params, state), length=200)
        return params, state[0].residual[None]

    if not hasattr(jax.lax, "pcast"):
        pytest.skip("named `pvary` in this version")
    split = {"in_specs": P("workers"), "out_specs": (P(), P("workers"))}
    params, rests = jax.jit(jax.shard_map(train, mesh=mesh, **split))(inputs)
    np.testing.assert_allclose(params, target, atol=0.05)
    assert len(np.unique(np.asarray(rests), axis=0)) == 8


def test_the_state_costs_one_or_two_copies():
    params = normal(SHAPES, dtype="bfloat16")
    entries = 99 + 40

    def stored(tx):
        after = jax.eval_shape(tx.update, params, tx.init(params))[1]
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(
            jnp.shape, tx.init(params)
        )
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params))) - 4

    assert stored(compressors.error_feedback(compressors.sign)) == 4 * entries
    assert stored(contrib.deep_gradient_compression()) == 8 * entries


def test_arguments_that_cannot_be_right():
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        compressors.error_feedback(compressors.sign, decay=1.5)
    with pytest.raises(ValueError, match="sparsity must lie between 0 and 1"):
        compressors.top_k(99)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        contrib.deep_gradient_compression(momentum=1.0)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        contrib.deep_gradient_compression(max_norm=0.0)


def test_float64_is_clipped_in_float64():
    with x64():
        tx = contrib.deep_gradient_compression(0.0, momentum=0.0, max_norm=1.0)
        grads = jnp.array([3e60, 4e60])
        sent, state = jax.jit(tx.update)(grads, tx.init(grads))
        assert sent.dtype == state.local_sum.dtype == jnp.float64
        np.testing.assert_allclose(sent, [0.6, 0.8], rtol=1e-12)
