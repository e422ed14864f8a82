"""Clipping of attention logits: what attention then computes is bounded."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from clipjax.contrib import qk_clip
from helpers import assert_same, normal, relaxed, x64

WIDTH, HEADS, SIZE = 6, 4, 3


def attention(*, heads=HEADS, key_heads=HEADS, dtype="float32", seed=0):
    """Parameters of one layer; logits differ widely between the heads."""
    shapes = {
        "query": {"kernel": (WIDTH, heads, SIZE), "bias": (heads, SIZE)},
        "key": {"kernel": (WIDTH, key_heads, SIZE), "bias": (key_heads, SIZE)},
        "value": {"kernel": (WIDTH, key_heads, SIZE), "bias": (key_heads, SIZE)},
        "out": {"kernel": (heads, SIZE, WIDTH), "bias": (WIDTH,)},
    }
    params = normal(shapes, seed=seed)
    params["query"] = louder(params["query"], heads)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def louder(tree, heads):
    """From head to head, by a factor of 300 in all."""
    scale = np.geomspace(0.3, 100, heads, dtype="float32")[:, None]
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * scale), tree)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def logits(params, x):
    """Every head's logits, in float64: query heads share key heads in order."""
    params = wide(params)
    q, k = (
        np.einsum("...pi,ihd->...hpd", np.float64(x), params[name]["kernel"])
        + params[name]["bias"][:, None]
        for name in ("query", "key")
    )
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    return q @ np.swapaxes(k, -1, -2) / np.sqrt(SIZE)


def largest(params, x):
    return np.max(logits(params, x), axis=(0, 2, 3))


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(qk_clip, **options))


def clip(params, highest, *, threshold=100.0, **options):
    """Clips a tree that is one attention layer, or whose layers are stacked."""
    logits = {"": jnp.asarray(highest, jnp.float32)}
    return compiled(**options)(params, logits, threshold=threshold)


@pytest.fixture
def x():
    return np.random.default_rng(7).normal(size=(2, 5, WIDTH))


# What it is


@pytest.mark.parametrize("threshold", [0.5, 10.0, 100.0])
def test_the_recomputed_logits_are_within_the_threshold(x, threshold):
    params = attention()
    before = largest(params, x)
    assert before.min() < 10 < 100 < before.max()
    clipped = clip(params, before, threshold=threshold)
    after = largest(clipped, x)
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=3e-6)
    gamma = np.minimum(1, threshold / before)[:, None, None]
    np.testing.assert_allclose(
        logits(clipped, x)[0], gamma * logits(params, x)[0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_it_is_its_formula_in_every_dtype(dtype):
    with x64(dtype == "float64"):
        params = attention(dtype=dtype)
        highest = np.array([10.0, 99.0, 400.0, 1e6])
        clipped = clip(params, highest)
        gamma = np.minimum(1, 100 / highest)[:, None]
        rounding = {"bfloat16": 2**-8, "float16": 2**-11}.get(dtype, 1e-6)
        for name, power in [("query", 0.5), ("key", 0.5), ("value", 0), ("out", 0)]:
            for leaf in ("kernel", "bias"):
                factor = gamma**power if power else 1
                expected = wide(params)[name][leaf] * factor
                actual = clipped[name][leaf]
                assert actual.dtype == dtype
                np.testing.assert_allclose(
                    np.float64(actual), expected, rtol=rounding, atol=1e-7
                )


def test_a_head_within_the_threshold_passes_bit_for_bit():
    subnormal = jnp.float32(1e-40)
    params = attention()
    params["query"]["kernel"] = params["query"]["kernel"].at[0].set(subnormal)
    clipped = clip(params, [1.0, 100.0, 101.0, 99.9])
    for name, leaves in params.items():
        for leaf in leaves:
            before, after = (np.asarray(tree[name][leaf]) for tree in (params, clipped))
            axis = before.ndim - 2
            if name in ("query", "key"):
                changed = np.take(before, 2, axis) != np.take(after, 2, axis)
                assert changed.any()
                before, after = (np.delete(v, 2, axis) for v in (before, after))
            np.testing.assert_array_equal(before.view("int32"), after.view("int32"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -500.0])
def test_a_head_without_a_usable_logit_is_left_alone(bad):
    params = attention()
    clipped = clip(params, [bad, 200.0, bad, 1.0])
    assert_same(clipped, clip(params, [1.0, 200.0, 1.0, 1.0]), rtol=0)


def test_weights_that_are_not_finite_stay_as_they_are():
    params = attention()
    kernel = params["query"]["kernel"].at[0, 3, 0].set(jnp.nan)
    params["query"]["kernel"] = kernel
    clipped = clip(params, [1.0, 1.0, 1.0, 400.0])["query"]["kernel"]
    expected = kernel.at[:, 3].multiply(0.5)
    assert_same(clipped, expected, equal_nan=True)


@pytest.mark.parametrize("threshold", [1e-30, 1.0, 1e30])
def test_logits_may_be_any_float32(threshold):
    params = attention()
    highest = np.array([1e-37, 1.0, 1e20, 3e38])
    clipped = clip(params, highest, threshold=threshold)
    factor = np.sqrt(np.minimum(1, threshold / highest))[:, None]
    expected = wide(params)["key"]["kernel"] * factor
    actual = np.float64(clipped["key"]["kernel"])
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# Other kinds of attention


@pytest.mark.parametrize("key_heads", [1, 2])
def test_a_shared_key_takes_the_least_factor_of_its_group(x, key_heads):
    params = attention(key_heads=key_heads)
    before = largest(params, x)
    clipped = clip(params, before, threshold=5.0)
    assert largest(clipped, x).max() <= 5 * (1 + 3e-6)
    least = np.minimum(1, 5 / before).reshape(key_heads, -1).min(axis=1)
    expected = wide(params)["key"]["kernel"] * np.sqrt(least)[:, None]
    np.testing.assert_allclose(clipped["key"]["kernel"], expected, rtol=1e-6)
    shared = np.repeat(least, HEADS // key_heads)
    expected = wide(params)["query"]["kernel"] * np.sqrt(shared)[:, None]
    np.testing.assert_allclose(clipped["query"]["kernel"], expected, rtol=1e-6)


def test_queries_alone_leave_calm_heads_of_a_group_alone(x):
    params = attention(key_heads=2)
    before = largest(params, x)
    clipped = clip(params, before, threshold=5.0, powers=lambda p, _: "query" in p)
    np.testing.assert_allclose(largest(clipped, x), np.minimum(before, 5), rtol=3e-6)
    assert_same(clipped["key"], params["key"], rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_factor_may_be_shared_unevenly(x, alpha):
    params = attention()
    shares = {"query": alpha, "key": 1 - alpha}

    @jax.jit
    def run(params, highest, alpha=None):
        own = shares if alpha is None else {"query": alpha, "key": 1 - alpha}
        powers = lambda path, _: own.get(path.split("/")[0], 0)  # noqa: E731
        return clip(params, highest, threshold=5.0, powers=powers)

    before = largest(params, x)
    for clipped in (run(params, before), run(params, before, jnp.float32(alpha))):
        after = largest(clipped, x)
        np.testing.assert_allclose(after, np.minimum(before, 5.0), rtol=5e-6)
    factor = np.minimum(1, 5.0 / before)[:, None] ** alpha
    expected = wide(params)["query"]["bias"] * factor
    np.testing.assert_allclose(run(params, before)["query"]["bias"], expected, 2e-6)


def latent(seed=0, rank=5, nope=3, rope=2, value=4):
    """Multi-head latent attention, its parts fused as they are in practice."""
    shapes = {
        "wq_b": (rank, HEADS, nope + rope),
        "wkv_b": (rank, HEADS, nope + value),
        "k_rope": (rank, rope),
    }
    params = normal(shapes, seed=seed)
    return params | {"wq_b": louder(params["wq_b"], HEADS)}


def latent_powers(path, leaf, nope=3):
    content = np.arange(leaf.shape[-1]) < nope
    if path.endswith("wq_b"):
        return np.where(content, 0.5, 1.0)
    return np.where(content, 0.5, 0.0) if path.endswith("wkv_b") else 0


def latent_logits(params, x, nope=3):
    params = wide(params)
    q = np.einsum("pi,ihd->hpd", x, params["wq_b"])
    k = np.einsum("pi,ihd->hpd", x, params["wkv_b"])[..., :nope]
    shared = np.broadcast_to(x @ params["k_rope"], (HEADS, len(x), 2))
    k = np.concatenate([k, shared], axis=-1)
    return q @ np.swapaxes(k, -1, -2)


def test_latent_attention_scales_its_parts_by_their_own_powers():
    params, x = latent(), np.random.default_rng(3).normal(size=(6, 5))
    before = latent_logits(params, x)
    highest = before.max(axis=(1, 2))
    clipped = clip(params, highest, threshold=10.0, powers=latent_powers)
    gamma = np.minimum(1, 10 / highest)[:, None, None]
    assert gamma.min() < 0.5
    after = latent_logits(clipped, x)
    np.testing.assert_allclose(after, gamma * before, rtol=1e-5, atol=1e-5)
    assert after.max() <= 10 * (1 + 3e-6)
    assert_same(clipped["k_rope"], params["k_rope"], rtol=0)  # all heads share it
    values = [tree["wkv_b"][..., 3:] for tree in (clipped, params)]
    assert_same(*values, rtol=0)


def test_other_places_of_the_heads(x):
    params = attention()
    highest = largest(params, x)
    expected = clip(params, highest, threshold=5.0)["query"]["kernel"]
    moved = {"query": {"kernel": jnp.moveaxis(params["query"]["kernel"], 1, 0)}}
    for axis in (0, -3):
        actual = clip(moved, highest, threshold=5.0, head_axis=axis)
        assert_same(jnp.moveaxis(actual["query"]["kernel"], 0, 1), expected, rtol=0)


def test_stacked_layers_are_clipped_one_by_one():
    layers = [attention(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    highest = jnp.geomspace(1, 1e4, 12).reshape(3, 4)
    clipped = clip({"attn": stacked}, highest)  # "" holds for what is below it too
    for i, layer in enumerate(layers):
        actual = jax.tree.map(lambda leaf, i=i: leaf[i], clipped["attn"])
        assert_same(actual, clip(layer, highest[i]), rtol=0)


def test_each_layer_has_its_own_logits():
    """The innermost path counts, and a name is no prefix of another."""
    params = {"block": {"a": attention(seed=1), **attention(seed=2)}, "blocks": {}}
    params["blocks"] = {"a": attention(seed=3)}
    calm, wild = jnp.ones(HEADS), jnp.full(HEADS, 400.0)
    clipped = qk_clip(params, {"block": wild, "block/a": calm})
    assert_same(clipped["block"].pop("a"), attention(seed=1), rtol=0)
    assert_same(clipped["block"], clip(attention(seed=2), wild), rtol=0)
    assert_same(clipped["blocks"], params["blocks"], rtol=0)


def captured(module, params, x):
    """Flax's own attention, and the logits that its softmax saw."""
    seen = []

    def watch(query, key, value, **options):
        scaled = jnp.einsum("...qhd,...khd->...hqk", query, key)
        seen.append(scaled / jnp.sqrt(query.shape[-1]))
        return nn.dot_product_attention(query, key, value)

    with relaxed():
        module.copy(attention_fn=watch).apply({"params": params}, x)
    return np.float64(seen[0])


def test_the_attention_of_flax_linen(x):
    module = nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * SIZE)
    x = jnp.asarray(x, jnp.float32) * 10
    with relaxed():
        params = module.init(jax.random.key(0), x)["params"]
    before = captured(module, params, x)
    highest = before.max(axis=(0, 2, 3))
    threshold = float(np.median(highest))
    clipped = clip(params, highest, threshold=threshold)
    after = captured(module, clipped, x).max(axis=(0, 2, 3))
    np.testing.assert_allclose(after, np.minimum(highest, threshold), rtol=1e-5)


def test_the_attention_of_flax_nnx(x):
    with relaxed():
        module = nnx.MultiHeadAttention(
            HEADS, WIDTH, HEADS * SIZE, decode=False, rngs=nnx.Rngs(0)
        )
    state = nnx.state({"attention": module}, nnx.Param)
    highest = jnp.array([1.0, 400.0, 1.0, 400.0])
    clipped = qk_clip(state, {"attention": highest})
    assert jax.tree.structure(clipped) == jax.tree.structure(state)
    for name, factor in [("query", 0.5), ("key", 0.5), ("value", 1.0), ("out", 1.0)]:
        before, after = (
            tree["attention"][name]["kernel"][...] for tree in (state, clipped)
        )
        after, before = np.asarray(after), np.asarray(before)
        loud = (slice(None), slice(1, None, 2))
        np.testing.assert_allclose(after[loud], before[loud] * factor, rtol=1e-6)


# Anywhere


def test_jit_and_a_population_of_thresholds(x):
    params = attention()
    highest = jnp.asarray(largest(params, x), jnp.float32)
    run = jax.jit(lambda t: clip(params, highest, threshold=t))
    thresholds = jnp.array([1.0, 10.0, -1.0, jnp.nan])
    many = jax.jit(jax.vmap(run))(thresholds)
    for i, threshold in enumerate(thresholds):
        one = run(threshold)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], many), one, rtol=1e-6)
        if not threshold > 0:
            assert_same(one, params, rtol=0)
    assert run._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_heads_split_over_devices(kind, key_heads):
    params = attention(heads=8, key_heads=key_heads)
    highest = jnp.geomspace(1, 1e4, 8)
    expected = clip(params, highest)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(
                leaf,
                NamedSharding(
                    mesh,
                    P(*[None] * (leaf.ndim - 2), "model")
                    if path[0].key in ("query", "key")
                    else P(),
                ),
            ),
            params,
        )
        clipped = jax.jit(functools.partial(clip))(split, highest)
        for one, other in zip(*map(jax.tree.leaves, (clipped, split)), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    assert_same(jax.device_get(clipped), jax.device_get(expected), rtol=1e-6)


def test_inside_shard_map_each_device_clips_its_heads():
    params = attention(heads=8, key_heads=8)
    highest = jnp.geomspace(1, 1e4, 8)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    kernel = {"kernel": P(None, "model"), "bias": P("model")}
    specs = {"query": kernel, "key": kernel}
    own = {name: params[name] for name in specs}
    run = jax.shard_map(clip, mesh=mesh, in_specs=(specs, P("model")), out_specs=specs)
    assert_same(jax.jit(run)(own, highest), clip(own, highest), rtol=1e-6)


# Errors


def test_errors_say_what_to_do():
    params = {"attn": attention()}
    highest = jnp.ones(HEADS)
    with pytest.raises(ValueError, match="threshold must be positive"):
        qk_clip(params, {"attn": highest}, threshold=0.0)
    with pytest.raises(ValueError, match="max_logits names 'atn', but no leaf"):
        qk_clip(params, {"atn": highest})
    with pytest.raises(ValueError, match=r"has shape \(3,\).*'attn/.*head_axis"):
        qk_clip(params, {"attn": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"has shape \(2, 4\).*does not fit"):
        qk_clip(params, {"attn": jnp.ones((2, HEADS))})
