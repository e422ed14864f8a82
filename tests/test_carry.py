"""Error feedback: nothing is lost, and the mean comes back."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax._clipping._adaptive import adaptive_clip
from clipjax._clipping._carry import carry_clipped
from clipjax._clipping._norm import clip_by_global_norm
from helpers import assert_same, normal, relaxed, spec, x64

CLIPS = {
    "entries": optax.clip(0.7),
    "norm": clip_by_global_norm(1.0),
    "adaptive": adaptive_clip(),
}


def run(tx, stream, params):
    update, state, outs = jax.jit(tx.update), tx.init(params), []
    for updates in stream:
        out, state = update(updates, state, params)
        outs.append(out)
    return outs, state


def test_it_is_its_rule():
    stream = np.random.default_rng(0).normal(size=(30, 4))
    tx, carry = carry_clipped(clip_by_global_norm(1.0)), np.zeros(4)
    outs, state = run(tx, jnp.float32(stream), jnp.zeros(4))
    for g, out in zip(stream, outs, strict=True):
        u = (g + carry) / max(1, np.linalg.norm(g + carry))
        carry = g + carry - u
        np.testing.assert_allclose(out, u, atol=2e-6)
    np.testing.assert_allclose(state.carry, carry, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_went_in_has_come_out_or_is_carried(clip, dtype):
    shapes = {"a": (3,), "b": (2, 2)}
    stream = [normal(shapes, seed=seed, dtype=dtype) for seed in range(20)]
    outs, state = run(carry_clipped(CLIPS[clip]), stream, normal(shapes, dtype=dtype))

    def total(trees):
        return jax.tree.map(lambda *leaves: np.sum(np.float64(leaves), 0), *trees)

    everything = total([*outs, state.carry])
    chex.assert_trees_all_close(everything, total(stream), atol=2e-5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.carry))
    assert spec(outs) == spec(stream)
    assert any((out["a"] != u["a"]).any() for out, u in zip(outs, stream, strict=True))


def test_the_mean_comes_back():
    """11 in one step of ten and -0.1 in the others: 1.01, of which a clip leaves 0.01.

    The bound has to be above the mean for anything to be carried off.
    """
    rare = np.random.default_rng(0).random(4000) < 0.1
    stream = jnp.asarray(np.where(rare, 11, -0.1), jnp.float32)

    def mean(tx):
        def step(state, g):
            u, state = tx.update(g, state)
            return state, u

        return float(jnp.mean(jax.lax.scan(step, tx.init(stream[0]), stream)[1]))

    truth = float(jnp.mean(stream))
    assert mean(optax.clip(1.0)) < 0.05
    assert mean(carry_clipped(optax.clip(1.0))) > 0.95  # at most the bound itself
    assert mean(carry_clipped(optax.clip(2.0))) == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_enters(clip, bad):
    tx, params = carry_clipped(CLIPS[clip]), {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = run(tx, [jax.tree.map(lambda p: 5 * p, params)] * 2, params)
    broken = params | {"b": jnp.array([1.0, bad])}
    update = jax.jit(tx.update)
    out, after = update(broken, state, params)
    assert_same(after.carry, state.carry, rtol=0)
    chex.assert_tree_all_finite(after)
    alone, _ = CLIPS[clip].update(broken, state.carry_inner, params)
    assert_same(out, alone, equal_nan=True)
    assert_same(update(params, after, params)[0], update(params, state, params)[0])


def test_sums_that_overflow_are_not_carried():
    tx = carry_clipped(clip_by_global_norm(1.0))
    _, state = run(tx, [jnp.full(2, 3e38)] * 3, jnp.zeros(2))
    chex.assert_tree_all_finite(state)
    inner = optax.stateless(lambda u, p: u * 1e6)
    outs, state = run(carry_clipped(inner), [jnp.ones(2, "float16")] * 2, jnp.zeros(2))
    assert not np.isfinite(outs[0]).any()
    assert_same(state.carry, jnp.zeros(2), rtol=0)


def test_an_update_within_the_bound_passes_bit_for_bit():
    updates = normal({"a": (50,)}, dtype="bfloat16")
    tx = carry_clipped(clip_by_global_norm(100.0))
    out, state = tx.update(updates, tx.init(updates))
    assert_same(out, updates, rtol=0)
    assert_same(state.carry, {"a": jnp.zeros(50)}, rtol=0)


def test_leaves_that_are_missing_or_no_real_numbers():
    tx = carry_clipped(clip_by_global_norm(1.0))
    params = {"a": jnp.ones(2), "b": jnp.ones(()), "n": None, "i": jnp.arange(3)}
    state = tx.init(params)
    _, state = tx.update({k: params[k] for k in params}, state)
    kept = state.carry["b"]
    out, after = tx.update(params | {"b": None}, state)
    assert out["b"] is None
    assert_same(out["i"], params["i"])
    assert_same(after.carry["b"], kept, rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_dtypes_may_be_mixed(clip, dtypes):
    """In a tree, and between parameters and updates."""
    with x64():
        names = {"a": dtypes[0], "b": "float64", "c": "bfloat16"}
        params = {name: jnp.ones(3, dtype) for name, dtype in names.items()}
        names["a"] = dtypes[1]
        rng = np.random.default_rng(0)
        stream = [
            {name: jnp.asarray(rng.normal(size=3), d) for name, d in names.items()}
            for _ in range(5)
        ]
        with relaxed() if clip == "entries" else contextlib.nullcontext():
            outs, state = run(carry_clipped(CLIPS[clip]), stream, params)
        assert spec(outs) == spec(stream)
        assert [x.dtype for x in jax.tree.leaves(state.carry)] == [
            *(dtypes[0], "float64", "float32")
        ]
        for name in names:
            went_in = sum(np.float64(u[name]) for u in stream)
            came_out = sum(np.float64(u[name]) for u in outs)
            np.testing.assert_allclose(
                came_out + np.float64(state.carry[name]), went_in, atol=2e-6
            )


def test_not_a_transform():
    with pytest.raises(TypeError, match="inner"):
        carry_clipped(1.0)
