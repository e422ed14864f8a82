"""Feature selection: on real digits, constant pixels are never chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import contrib, prox, scopes
from clipjax.examples import data
from helpers import normal, relaxed

RATE = 0.2
PATH = "Dense_0/kernel"


@jax.jit
def forward(params, x):
    hidden = params["Dense_0"]
    x = jax.nn.relu(x @ hidden["kernel"] + hidden["bias"])
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


@pytest.fixture(scope="module")
def digits():
    """Flat images and labels to train on and to test with."""
    sets = data.digits()
    flat = [split.images.reshape(-1, 64) for split in (sets.train, sets.test)]
    return flat, [sets.train.labels, sets.test.labels]


@pytest.fixture(scope="module")
def trained(digits):
    (images, _), (labels, _) = digits
    shapes = {
        "Dense_0": {"kernel": (64, 16), "bias": (16,)},
        "Dense_1": {"kernel": (16, 10), "bias": (10,)},
    }
    params = jax.tree.map(lambda x: x * 0.1, normal(shapes))
    tx = optax.chain(
        optax.sgd(RATE, momentum=0.9),
        clipjax.proximal(
            prox.GroupLasso(0.01),
            RATE,
            scope=scopes.Unit(axis=1),
            where=lambda path, leaf: path == PATH,
        ),
    )

    def loss(params):
        logits = forward(params, images)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return cross.mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    with relaxed():
        run = jax.jit(lambda *start: jax.lax.scan(step, start, None, 200)[0])
        return run(params, tx.init(params))


def test_constant_pixels_are_not_chosen_and_the_digits_are_still_read(trained, digits):
    (images, held_out), (_, labels) = digits
    params, state = trained
    mask = np.asarray(contrib.selected_features(params, PATH))
    constant = images.std(0) == 0
    assert constant.sum() >= 3
    assert not mask[constant].any()
    assert 30 <= mask.sum() <= 55
    share = 1 - mask.mean()
    np.testing.assert_allclose(state[-1].prox_total_sparsity, share, rtol=1e-6)
    with relaxed():
        right = np.asarray(forward(params, held_out)).argmax(1) == labels
    assert right.mean() > 0.93


def test_without_the_other_features_the_network_computes_the_same(trained, digits):
    (_, held_out), _ = digits
    params, _ = trained
    mask = np.asarray(contrib.selected_features(params, PATH))
    first = params["Dense_0"]
    small = params | {"Dense_0": first | {"kernel": first["kernel"][mask]}}
    with relaxed():
        actual, expected = forward(small, held_out[:, mask]), forward(params, held_out)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_features_lie_along_any_axis():
    kernel = np.zeros((3, 3, 4, 8), np.float32)
    kernel[1, 2, 3, 0] = -1
    kernel[0, 0, 1, 5] = np.nan  # not zero
    params = {"conv": {"kernel": jnp.asarray(kernel)}}
    mask = contrib.selected_features(params, "conv/kernel", axis=-2)
    np.testing.assert_array_equal(mask, [False, True, False, True])
    with pytest.raises(ValueError, match=r"but is 'cnv'. There: 'conv/kernel'"):
        contrib.selected_features(params, "cnv")
    with pytest.raises(ValueError, match=r"one of the 4 axes .* but is 4"):
        contrib.selected_features(params, "conv/kernel", axis=4)
