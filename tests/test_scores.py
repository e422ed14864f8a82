"""Scores: the formulas of the papers, and what those with a memory remember."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import patterns, scores
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"a": {"kernel": (6, 8), "bias": (8,)}, "b": {"kernel": (8, 3)}}
DTYPES = ["float32", "bfloat16", "float16", "float64"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
TRACKED = {
    "movement": scores.Movement(),
    "fisher": scores.Fisher(0.9),
    "random": scores.Random(jax.random.key(3)),
}
each_tracked = pytest.mark.parametrize("score", TRACKED.values(), ids=TRACKED)


def wide(x):
    return np.asarray(x, np.float64)


@each_dtype
def test_saliency_is_the_product(dtype):
    with x64(dtype == "float64"):
        param, update = normal([(5, 7), (5, 7)], dtype=dtype)
        result = scores.saliency(param, update)
        assert result.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(result, abs(wide(param) * wide(update)), rtol=1e-6)


def test_saliency_does_not_overflow_in_float16():
    assert scores.saliency(jnp.float16(300), jnp.float16(-300)) == 90000


def test_saliency_needs_an_update():
    with pytest.raises(ValueError, match=r"^saliency reads the update.*scores.snip"):
        scores.saliency(jnp.ones(3))


@each_dtype
def test_movement_adds_up(dtype):
    with x64(dtype == "float64"):
        param, *updates = normal([(5, 7)] * 4, dtype=dtype)
        for score, sign in [(scores.Movement(), 1), (scores.Movement(True), -1)]:
            memory = score.init("w", param)
            assert memory.dtype == jnp.float32
            for update in updates:
                memory = score.track(memory, param, update)
            expected = sign * sum(wide(param) * wide(u) for u in updates)
            result = score.score(memory, param, updates[-1])
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_moves_away_from_zero_stays():
    """In `sparsify` an update is what is added, so no sign has to be turned."""
    params = {"kernel": jnp.array([[1.0, -1.0, 3.0, -3.0]])}
    grads = {"kernel": jnp.array([[-1.0, 1.0, 1.0, -1.0]])}  # SGD subtracts them
    tx = optax.chain(optax.sgd(0.1), clipjax.sparsify(0.5, score=scores.Movement()))
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)["kernel"]
    assert_same(after, jnp.array([[1.1, -1.1, 0.0, 0.0]]))


@each_dtype
def test_fisher_is_half_the_square_times_the_average(dtype):
    with x64(dtype == "float64"):
        param, *updates = normal([(5, 7)] * 4, dtype=dtype)
        score, expected = scores.Fisher(0.8), np.zeros((5, 7))
        memory = score.init("w", param)
        for update in updates:
            memory = score.track(memory, param, update)
            expected = 0.8 * expected + 0.2 * wide(update) ** 2
        np.testing.assert_allclose(memory, expected, rtol=1e-6)
        result = score.score(memory, param, updates[-1])
        np.testing.assert_allclose(result, wide(param) ** 2 / 2 * expected, rtol=1e-5)


def test_an_impossible_decay_is_refused():
    with pytest.raises(ValueError, match=r"^decay must be at least 0 and below 1"):
        scores.Fisher(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("score", [scores.Movement(), scores.Fisher(0.9)])
def test_nothing_that_is_not_finite_is_remembered(score, bad):
    param, update = jnp.full(3, 3e38), jnp.array([bad, 1e-30, 0.0])
    memory = score.track(score.init("w", param), param, update)
    assert np.isfinite(memory).all()
    assert np.isfinite(score.track(memory, param * bad, update)).all()


def test_random_numbers_go_by_key_path_and_step():
    param = jnp.ones((40, 50)).at[:, :10].set(0)
    raw, typed = (scores.Random(k(3)) for k in (jax.random.PRNGKey, jax.random.key))
    first = raw.init("a", param)
    drawn = [raw.score(first, param, param), typed.score(first, param, param)]
    assert_same(drawn[0], drawn[1], rtol=0)
    key = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"a"))
    values = jax.random.uniform(key, param.shape)
    assert_same(drawn[0], jnp.where(param != 0, 1 - values, -values), rtol=0)
    later = raw.score(raw.track(first, param, param), param, param)
    other = raw.score(raw.init("b", param), param, param)
    assert (later != drawn[0]).mean() > 0.99 < (other != drawn[0]).mean()
    assert (later[:, 10:] > 0).all() and (later[:, :10] <= 0).all()  # noqa: PT018
    assert abs(float(later[:, 10:].mean()) - 0.5) < 0.03


@each_tracked
def test_they_satisfy_the_protocol(score):
    assert isinstance(score, scores.Tracked)
    assert not isinstance(scores.magnitude, scores.Tracked)


@each_tracked
def test_a_memory_is_one_array_a_leaf_and_outlives_bad_steps(score):
    params, first, second = (normal(SHAPES, seed=s) for s in range(3))
    tx = clipjax.sparsify(0.5, score=score, every=2)
    update, state = jax.jit(tx.update), tx.init(params)
    assert list(state.score_memory) == ["a/kernel", "b/kernel"]
    _, state = update(first, state, params)
    bad = jax.tree.map(lambda u: u.at[(0,) * u.ndim].set(jnp.nan), second)
    _, after = update(bad, state, params)
    assert_same(after.score_memory, state.score_memory, rtol=0)
    _, later = update(second, state, params)
    for path, memory in later.score_memory.items():
        assert (memory != state.score_memory[path]).any()
    missing = first | {"b": {"kernel": None}}
    _, after = update(missing, state, params)
    assert_same(after.score_memory["b/kernel"], state.score_memory["b/kernel"], rtol=0)


def test_a_score_without_memory_stores_none():
    tx = clipjax.sparsify(0.5, score=scores.saliency)
    assert tx.init(normal(SHAPES)).score_memory == {}


@each_tracked
def test_a_mesh_changes_no_random_number_and_no_memory(score):
    params, update = ({"kernel": normal((16, 24), seed=s)} for s in range(2))
    tx = clipjax.sparsify(0.5, score=score)
    expected, known = jax.jit(tx.update)(update, tx.init(params), params)
    for kind in ("Auto", "Explicit"):
        axis_types = (getattr(jax.sharding.AxisType, kind),)
        mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
        sharding = jax.NamedSharding(mesh, P("d"))
        there, moves = jax.device_put((params, update), sharding)
        state = jax.jit(tx.init, keep_unused=True)(there)
        step = jax.jit(tx.update).lower(moves, state, there).compile()
        assert "all-gather" not in step.as_text()
        arguments = jax.device_put((moves, state, there), step.input_shardings[0])
        actual, after = step(*arguments)
        assert_same(jax.device_get(actual), jax.device_get(expected), rtol=0)
        memory, alone = after.score_memory["kernel"], known.score_memory["kernel"]
        assert_same(jax.device_get(memory), jax.device_get(alone))
        if memory.ndim == 2:
            assert memory.sharding.is_equivalent_to(sharding, 2)


# One shot


def loss(params, batch, temperature=1.0):
    x, y = batch
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    logits = hidden @ params["b"]["kernel"] / temperature
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def batch_of(count=20):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(count, 6)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 3, count), jnp.int32)


def test_snip_is_what_the_loss_loses_and_sums_to_one():
    params, batch = normal(SHAPES) | {"table": jnp.arange(3)}, batch_of()
    with relaxed():
        result = jax.jit(functools.partial(scores.snip, loss))(params, batch)
        trained = {name: params[name] for name in "ab"}
        slope = jax.grad(loss)(trained, batch)
    raw = jax.tree.map(lambda p, g: abs(wide(p) * wide(g)), trained, slope)
    total = sum(x.sum() for x in jax.tree.leaves(raw))
    for actual, expected in zip(
        jax.tree.leaves({name: result[name] for name in "ab"}),
        jax.tree.leaves(raw),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected / total, rtol=1e-4, atol=1e-8)
    assert_same(result["table"], params["table"])


def test_grasp_is_the_change_of_the_gradient_norm():
    """By finite differences: θ·(H·g), along g."""
    params, batch = normal(SHAPES), batch_of()
    with x64(), relaxed():
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        batch = (batch[0].astype(jnp.float64), batch[1])
        result = jax.jit(lambda p: scores.grasp(loss, p, batch, 5.0))(params)
        slope = jax.jit(jax.grad(lambda p: loss(p, batch, 5.0)))
        g = slope(params)
        size = 1e-5
        ahead, behind = (
            slope(jax.tree.map(lambda p, d, s=s: p + s * d, params, g))
            for s in (size, -size)
        )
        expected = jax.tree.map(
            lambda p, a, b: p * (a - b) / (2 * size), params, ahead, behind
        )
        for one, other in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-10)


def test_wanda_prunes_within_each_output():
    params = normal({"kernel": (8, 5), "bias": (5,)})
    norms = {"kernel": jnp.arange(1.0, 9.0)}
    result = scores.wanda(params, norms)
    expected = abs(wide(params["kernel"])) * np.arange(1.0, 9.0)[:, None]
    np.testing.assert_allclose(result["kernel"], expected, rtol=1e-6)
    assert result["bias"] is None
    pruned = clipjax.prune(params, 0.5, score=result, pattern=patterns.FanIn())
    for column in range(5):
        best = np.argsort(-expected[:, column])[:4]
        assert set(np.flatnonzero(pruned["kernel"][:, column])) == set(best)


def test_wanda_takes_convolutions():
    kernel = normal((3, 2, 4, 5))
    whole, channels = normal((3, 2, 4), seed=1), normal((4,), seed=2)
    for norm in (whole, channels):
        result = scores.wanda({"k": kernel}, {"k": norm})["k"]
        expected = abs(wide(kernel)) * wide(norm)[..., None]
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_sparse_gpt_is_the_error_that_is_left():
    """The least squares that remain if one weight is zero and the others adapt."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(50, 6)), rng.normal(size=(6, 2))
    x[:, 4] = 0  # an input that was never on
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    grams = {"kernel": jnp.asarray(x.T @ x, jnp.float32)}
    result = scores.sparse_gpt(params, grams, damping=0.0)["kernel"]
    for unit in (0, 1, 2, 3, 5):
        others = np.delete(x, [unit, 4], axis=1)
        for output in range(2):
            target = x[:, unit] * kernel[unit, output]
            fit = others @ np.linalg.lstsq(others, target, rcond=None)[0]
            error = np.sum((target - fit) ** 2)
            np.testing.assert_allclose(result[unit, output], error, rtol=1e-3)
    assert (result[4] == 0).all()
    damped = scores.sparse_gpt(params, grams)["kernel"]
    gram = x.T @ x + 0.01 * np.mean(np.diag(x.T @ x)) * np.eye(6)
    gram[4, 4] += 1
    expected = kernel**2 / np.diag(np.linalg.inv(gram))[:, None]
    np.testing.assert_allclose(
        np.delete(damped, 4, 0), np.delete(expected, 4, 0), rtol=1e-4
    )


def test_measurements_have_to_fit():
    params = {"kernel": jnp.ones((4, 3))}
    with pytest.raises(
        ValueError, match=r"^input_norms .* at 'kernel' has shape \(3,\)"
    ):
        scores.wanda(params, {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"^grams needs a matrix of 4 by 4 inputs"):
        scores.sparse_gpt(params, {"kernel": jnp.eye(3)})
    with pytest.raises(ValueError, match=r"no parameter at 'other'.*\['kernel'\]"):
        scores.wanda(params, {"other": jnp.ones(4)})


def test_random_scores_go_by_path():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5)), "n": jnp.arange(2)}
    key = jax.random.key(0)
    result = scores.random(key, params)
    assert_same(result["b"], scores.random(key, {"b": params["b"]})["b"], rtol=0)
    assert (result["a"] != result["b"]).all()


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicas_draw_the_same_numbers(check_vma):
    """Also where JAX cannot tell a replica from a block."""
    random = scores.Random(jax.random.key(3))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def draw(x):
        return random.score(random.init("kernel", x), x, x)[None]

    mapped = jax.shard_map(
        draw, mesh=mesh, in_specs=P(), out_specs=P("d"), check_vma=check_vma
    )
    rows = np.asarray(jax.jit(mapped)(jnp.ones((3, 5))))
    assert (rows == rows[:1]).all()
    assert len(np.unique(rows[0])) == 15
