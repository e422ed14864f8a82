"""The axes of a unit, for the layers of Flax as they really are."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx

from clipjax import scopes
from clipjax._core import trees
from helpers import relaxed

DENSE = {"kernel": (0,), "bias": (0,)}
WITHOUT_BIAS = {"kernel": (0,)}
ATTENTION = {
    **{f"{name}/kernel": (0,) for name in ("query", "key", "value")},
    **{f"{name}/bias": (0, 1) for name in ("query", "key", "value")},  # (heads, size)
    "out/kernel": (0, 1),
    "out/bias": (0,),
}
ATTENTION_WITHOUT_BIAS = {
    path: axes for path, axes in ATTENTION.items() if path.endswith("kernel")
}

LINEN = {  # layer, shape of an input, axes by path
    "Dense": (nn.Dense(5), (7,), DENSE),
    "Dense without bias": (nn.Dense(5, use_bias=False), (7,), WITHOUT_BIAS),
    "Conv 1-D": (nn.Conv(5, (3,)), (8, 4), {"kernel": (0, 1), "bias": (0,)}),
    "Conv 1-D without bias": (
        nn.Conv(5, (3,), use_bias=False),
        (8, 4),
        {"kernel": (0, 1)},
    ),
    "Conv 2-D": (nn.Conv(5, (3, 2)), (8, 8, 4), {"kernel": (0, 1, 2), "bias": (0,)}),
    "Conv 3-D": (
        nn.Conv(5, (3, 2, 1)),
        (8, 8, 8, 4),
        {"kernel": (0, 1, 2, 3), "bias": (0,)},
    ),
    "Conv with groups": (
        nn.Conv(6, (3, 3), feature_group_count=2),
        (8, 8, 4),
        {"kernel": (0, 1, 2), "bias": (0,)},
    ),
    "ConvTranspose": (
        nn.ConvTranspose(5, (3, 3)),
        (8, 8, 4),
        {"kernel": (0, 1, 2), "bias": (0,)},
    ),
    "DenseGeneral to several axes": (
        nn.DenseGeneral((3, 5)),
        (7,),
        {"kernel": (0,), "bias": (0, 1)},
    ),
    "DenseGeneral from several axes": (
        nn.DenseGeneral(5, axis=(-2, -1)),
        (3, 7),
        {"kernel": (0, 1), "bias": (0,)},
    ),
    "DenseGeneral between several axes": (
        nn.DenseGeneral((2, 5), axis=(-2, -1)),
        (3, 7),
        {"kernel": (0, 1), "bias": (0, 1)},
    ),
    "attention": (
        nn.MultiHeadDotProductAttention(4, qkv_features=16),
        (6, 12),
        ATTENTION,
    ),
    "attention without bias": (
        nn.MultiHeadDotProductAttention(4, qkv_features=16, use_bias=False),
        (6, 12),
        ATTENTION_WITHOUT_BIAS,
    ),
    "LayerNorm": (nn.LayerNorm(), (7,), {"scale": (0,), "bias": (0,)}),
}

NNX = {
    "Linear": (partial(nnx.Linear, 7, 5), DENSE),
    "Linear without bias": (partial(nnx.Linear, 7, 5, use_bias=False), WITHOUT_BIAS),
    "Conv 1-D": (partial(nnx.Conv, 4, 5, (3,)), {"kernel": (0, 1), "bias": (0,)}),
    "Conv 2-D": (
        partial(nnx.Conv, 4, 5, (3, 2)),
        {"kernel": (0, 1, 2), "bias": (0,)},
    ),
    "Conv 3-D": (
        partial(nnx.Conv, 4, 5, (3, 2, 1)),
        {"kernel": (0, 1, 2, 3), "bias": (0,)},
    ),
    "LinearGeneral to several axes": (
        partial(nnx.LinearGeneral, 7, (3, 5)),
        {"kernel": (0,), "bias": (0, 1)},
    ),
    "LinearGeneral from several axes": (
        partial(nnx.LinearGeneral, (3, 7), 5, axis=(-2, -1)),
        {"kernel": (0, 1), "bias": (0,)},
    ),
    "attention": (
        partial(nnx.MultiHeadAttention, 4, 12, 16, decode=False),
        ATTENTION,
    ),
    "attention without bias": (
        partial(nnx.MultiHeadAttention, 4, 12, 16, use_bias=False, decode=False),
        ATTENTION_WITHOUT_BIAS,
    ),
    "Embed": (partial(nnx.Embed, 9, 4), {"embedding": (1,)}),
    "LayerNorm": (partial(nnx.LayerNorm, 7), {"scale": (0,), "bias": (0,)}),
}


def axes_by_path(params):
    leaves = {path: jnp.zeros(x.shape) for path, x in trees.by_path(params).items()}
    return {
        path: scopes.unit_axes(path, leaf, scopes.bias_of(path, leaves))
        for path, leaf in leaves.items()
    }


@pytest.mark.parametrize(("layer", "shape", "expected"), LINEN.values(), ids=LINEN)
def test_units_of_linen(layer, shape, expected):
    with relaxed():
        init = partial(jax.eval_shape, layer.init, jax.random.key(0))
        params = init(jnp.ones((2, *shape)))["params"]
    assert axes_by_path(params) == expected
    assert axes_by_path({"block": {"0": params}}) == {
        f"block/0/{path}": axes for path, axes in expected.items()
    }


@pytest.mark.parametrize(("layer", "expected"), NNX.values(), ids=NNX)
def test_units_of_nnx(layer, expected):
    with relaxed():
        abstract = nnx.eval_shape(lambda: layer(rngs=nnx.Rngs(0)))
    assert axes_by_path(nnx.state(abstract, nnx.Param)) == expected


def test_units_of_a_linen_embedding_are_tokens():
    layer = nn.Embed(9, 4)
    params = layer.init(jax.random.key(0), jnp.zeros(2, jnp.int32))["params"]
    assert axes_by_path(params) == {"embedding": (1,)}


def test_a_unit_feeds_one_output():
    """The gradient of one output is zero outside of one unit, and covers it."""
    layer, x = nn.DenseGeneral((3, 5), axis=(-2, -1)), jnp.ones((2, 7))
    params = layer.init(jax.random.key(0), x)["params"]
    gradient = jax.jacobian(
        lambda kernel: layer.apply({"params": params | {"kernel": kernel}}, x)
    )(params["kernel"])
    touched = (gradient != 0).sum(axis=(-4, -3))  # over the axes of a unit
    assert axes_by_path(params)["kernel"] == (0, 1)
    expected = 14 * jnp.eye(15, dtype=jnp.int32).reshape(3, 5, 3, 5)
    assert (touched == expected).all()


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("gain", (), ()),
        ("gate", (4,), (0,)),
        ("kernel", (4, 3), (0,)),
        ("attention/qkv/kernel", (4, 3, 2, 5), (0,)),
        ("scale", (2, 3), (0, 1)),
    ],
)
def test_units_of_other_leaves(path, shape, axes):
    assert scopes.unit_axes(path, jnp.ones(shape)) == axes


def test_a_bias_that_does_not_fit_says_nothing():
    kernel = jnp.ones((3, 64, 32))
    assert scopes.unit_axes("kernel", kernel, jnp.ones(5)) == (0, 1)
    assert scopes.unit_axes("kernel", kernel, jnp.ones((64, 32))) == (0,)
    assert scopes.unit_axes("kernel", kernel, jnp.ones(())) == (0, 1)


def test_the_bias_is_that_of_the_same_layer():
    paths = ["bias", "a/bias", "a/b/bias", "a/b/kernel"]
    leaves = {path: jnp.full(2, i) for i, path in enumerate(paths)}
    assert scopes.bias_of("kernel", leaves) is leaves["bias"]
    assert scopes.bias_of("a/w", leaves) is leaves["a/bias"]
    assert scopes.bias_of("a/b/kernel", leaves) is leaves["a/b/bias"]
    assert scopes.bias_of("c/kernel", leaves) is None
