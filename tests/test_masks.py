"""Masks: made, counted, packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from clipjax import masks
from helpers import assert_same, normal

SHAPES = [(1,), (7,), (8,), (9,), (64,), (5, 3), (3, 16), (2, 3, 17), (4, 0), (0, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.4)


@each_shape
def test_unpacking_undoes_packing(shape):
    mask = draw(shape)
    assert_same(masks.unpack(masks.pack(mask), shape[-1]), mask)


@each_shape
def test_bits_are_those_of_numpy(shape):
    mask = draw(shape)
    expected = np.packbits(np.asarray(mask), axis=-1, bitorder="little")
    assert_same(masks.pack(mask), jnp.asarray(expected), rtol=0)
    assert masks.pack(mask).nbytes <= -(-shape[-1] // 8) * np.prod(
        shape[:-1], dtype=int
    )


@each_shape
def test_counting_is_that_of_numpy(shape):
    mask = draw(shape)
    assert_same(masks.count(mask), jnp.int32(np.count_nonzero(mask)), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_full_mask_keeps_all_there_is(dtype):
    x = normal((3, 4)).at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).astype(dtype)
    assert_same(masks.full(x), jnp.ones((3, 4), bool))


def test_zeros_of_either_sign_are_zeros():
    x = jnp.array([0.0, -0.0, 1e-30, jnp.nan, jnp.inf])
    assert_same(masks.nonzero(x), jnp.array([False, False, True, True, True]))


def test_what_is_not_kept_becomes_zero_whatever_it_was():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -2.0, jnp.nan])
    kept = masks.apply(jnp.array([False, False, False, False, True]), x)
    expected = jnp.array([0.0, 0.0, 0.0, 0.0, jnp.nan])
    assert_same(kept, expected, rtol=0, equal_nan=True)
    assert not jnp.signbit(kept[:4]).any()


def test_applying_keeps_the_dtype():
    for dtype in ("bfloat16", "float16", "int32"):
        x = jnp.ones(3, dtype)
        assert masks.apply(jnp.array([True, False, True]), x).dtype == dtype


@pytest.mark.parametrize(
    ("path", "leaf", "expected"),
    [
        ("Dense_0/kernel", jnp.ones((2, 3)), True),
        ("kernel", jnp.ones((2, 3), jnp.bfloat16), True),
        ("", jnp.ones((2, 3)), True),
        ("conv/kernel", jnp.ones((3, 3, 2, 4)), True),
        ("attention/query/bias", jnp.ones((2, 3)), False),
        ("norm/scale", jnp.ones((2, 3)), False),
        ("Embed_0/embedding", jnp.ones((9, 3)), False),
        ("embedding/kernel", jnp.ones((9, 3)), True),
        ("gate", jnp.ones(3), False),
        ("table", jnp.ones((2, 3), jnp.int32), False),
    ],
)
def test_weights_are_kernels(path, leaf, expected):
    assert masks.weights(path, leaf) is expected


@pytest.mark.parametrize(
    "path",
    [
        *("cls_token", "mask_token", "pos_emb", "pos_embed", "class_embedding"),
        *("relative_position_bias_table", "wte/embedding", "wpe/weight"),
        *("stack/linear/b", "stack/layer_norm/offset", "ln_1/weight", "norm1/weight"),
        *("tok_embeddings/weight", "blocks/0/attn_norm/weight"),
    ],
)
def test_biases_scales_and_tokens_are_no_weights_in_any_library(path):
    assert not masks.weights(path, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    "path",
    [
        *("linear/w", "layers/0/weight", "attn/c_attn/weight", "lstm/weight_ih"),
        *("patch_embed/proj/kernel", "lm_head/weight", "embedder/dense/kernel"),
    ],
)
def test_weights_are_weights_in_any_library(path):
    assert masks.weights(path, jnp.ones((2, 3)))


def test_masks_lie_as_their_arrays_do():
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("d",), axis_types=explicit)
    for spec in (P("d"), P(None, "d")):
        x = jax.device_put(normal((16, 64)), jax.NamedSharding(mesh, spec))
        for mask in (masks.full(x), masks.nonzero(x)):
            assert jax.typeof(mask).sharding == jax.typeof(x).sharding
        packed = jax.jit(lambda x: masks.pack(masks.full(x)))(x)
        assert packed.sharding.is_equivalent_to(x.sharding, 2)
        again = jax.jit(lambda bits: masks.unpack(bits, 64))(packed)
        assert again.sharding.is_equivalent_to(x.sharding, 2)


def test_in_shard_map_devices_count_together():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mask = draw((16, 5))
    count = functools.partial(masks.count, axis_name="d")
    for spec in (P("d"), P()):
        mapped = jax.shard_map(count, mesh=mesh, in_specs=spec, out_specs=P())
        assert jax.jit(mapped)(mask) == masks.count(mask)
