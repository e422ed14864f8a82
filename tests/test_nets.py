"""The networks: sizes from the literature, and one network in two frameworks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax._core import trees
from clipjax.examples import linen_nets, nets, nnx_nets

KITS = {"linen": linen_nets, "nnx": nnx_nets}
NETS = ["cnn", "lenet_300_100", "lenet_5", "transformer"]
each_kit = pytest.mark.parametrize("kit", KITS.values(), ids=KITS.keys())
each_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture(autouse=True)
def relaxed():
    """The networks are flax's own code, which promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def shapes(net, shape=(28, 28, 1)):
    made = jax.eval_shape(lambda: net.init(jax.random.key(0), shape))
    return {path: leaf.shape for path, leaf in trees.by_path(made).items()}


@each_kit
@pytest.mark.parametrize(
    ("name", "size"), [("lenet_300_100", 266_610), ("lenet_5", 431_080)]
)
def test_the_size_is_that_of_the_literature(kit, name, size):
    made = shapes(getattr(kit, name)())
    assert sum(np.prod(shape) for shape in made.values()) == size


@each_net
def test_both_frameworks_have_the_same_parameters(name):
    in_linen, in_nnx = (shapes(getattr(kit, name)(7)) for kit in KITS.values())
    assert in_linen == in_nnx


@each_net
def test_both_frameworks_compute_the_same(name):
    in_linen, in_nnx = (getattr(kit, name)(7) for kit in KITS.values())
    images = jax.random.uniform(jax.random.key(1), (3, 28, 28, 1))
    params = jax.jit(in_linen.init, static_argnums=1)(jax.random.key(0), (28, 28, 1))
    logits = jax.jit(in_linen.apply)(params, images)
    chex.assert_shape(logits, (3, 7))
    chex.assert_type(logits, jnp.float32)
    np.testing.assert_allclose(
        jax.jit(in_nnx.apply)(params, images), logits, rtol=1e-4, atol=1e-5
    )


@each_kit
def test_parameters_are_plain_arrays_made_from_the_key(kit):
    init = jax.jit(kit.cnn().init, static_argnums=1)
    first, same, other = (
        trees.by_path(init(jax.random.key(seed), (8, 8, 1))) for seed in (0, 0, 1)
    )
    assert {type(leaf) for leaf in first.values()} == {type(jnp.zeros(1))}
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, same[path])
    assert any((leaf != other[path]).any() for path, leaf in first.items())


@each_kit
def test_only_kernels_are_pruned(kit):
    params = {
        path: jnp.ones(shape) for path, shape in shapes(kit.transformer()).items()
    }
    found = clipjax.metrics(clipjax.sparsify(0.5).init(params))
    pruned = {name for name in found if name.startswith("sparsity/")}
    kernels = {path for path in params if path.endswith("/kernel")}
    assert pruned == {f"sparsity/{path}" for path in kernels}


@each_kit
def test_images_too_small_for_lenet_5_are_refused(kit):
    with pytest.raises(ValueError, match=r"8 by 8 pixels.*at least 16 by 16"):
        kit.lenet_5().init(jax.random.key(0), (8, 8, 1))


@each_kit
def test_images_that_cannot_be_cut_are_refused(kit):
    with pytest.raises(ValueError, match=r"10 by 8 pixels.*multiples of 4"):
        kit.transformer().init(jax.random.key(0), (10, 8, 1))


def test_patches_are_cut_from_left_to_right_and_down():
    image = jnp.arange(64, dtype=jnp.float32).reshape(1, 8, 8, 1)
    cut = nets.patches(image)
    np.testing.assert_array_equal(cut[0, 0], [0, 1, 8, 9])
    np.testing.assert_array_equal(cut[0, 1], [2, 3, 10, 11])
    np.testing.assert_array_equal(cut[0, 4], [16, 17, 24, 25])
