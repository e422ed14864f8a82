"""The loop: every network alike, every step in the log, nothing changed in place."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax._core import trees
from clipjax.examples import data, linen_nets, nets, nnx_nets, train


@pytest.fixture(autouse=True)
def relaxed():
    """Flax and optax promote dtypes and ranks in their own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def chain(steps):
    ramp = optax.polynomial_schedule(0.0, 0.8, 3, steps // 2, steps // 10)
    return optax.chain(
        clipjax.adaptive_clip(), optax.adam(3e-3), clipjax.sparsify(ramp, every=5)
    )


def fitted(dataset, net, tx, *, run=None, epochs=1, seed=0):
    """The states and logs of a training."""
    run = run or train.loop(net, tx, shift=1)
    count = len(dataset.train.labels)
    orders = train.shuffles(count, batch_size=50, epochs=epochs, seed=seed)
    key = jax.random.key(seed)
    state = train.start(net, tx, shape=dataset.shape, key=key)
    return list(train.fit(run, state, dataset.train, orders=orders, key=key))


@pytest.fixture(scope="module")
def plain():
    """A network, an optimizer that clips nothing, and their loop, compiled once."""
    net, tx = linen_nets.lenet_300_100(), optax.with_extra_args_support(optax.sgd(0.1))
    return net, tx, train.loop(net, tx, shift=1)


def test_a_network_comes_out_accurate_and_exactly_sparse(digits):
    net = linen_nets.lenet_300_100()
    parts = fitted(digits, net, chain(20 * 24), epochs=20)
    history = train.joined([log for _, log in parts])
    params = parts[-1][0].params
    assert history["loss"].shape == (20 * 24,)
    assert history["loss"][-24:].mean() < history["loss"][:24].mean() / 4
    assert history["sparsity"][0] < 0.01
    assert history["sparsity"][-1] == pytest.approx(0.8, abs=1e-3)
    kernels = [x for p, x in trees.by_path(params).items() if p.endswith("kernel")]
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
    assert zeros / sum(kernel.size for kernel in kernels) > 0.799
    assert train.accuracy(net, params, digits.validation) > 0.9


def test_linen_and_nnx_train_alike(digits):
    """From the same parameters, so that only the frameworks differ."""
    in_linen, in_nnx = linen_nets.lenet_300_100(), nnx_nets.lenet_300_100()
    tx = optax.chain(clipjax.clip_by_global_norm(0.5), optax.sgd(0.1))
    (one, log), (other, same) = (
        fitted(digits, nets.Net(in_linen.init, net.apply), tx)[-1]
        for net in (in_linen, in_nnx)
    )
    assert {"norm", "clipped_norm", "threshold"} <= set(log)
    chex.assert_trees_all_equal_shapes_and_dtypes(one.params, other.params)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(log, same, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers(digits, plain):
    net, tx, run = plain
    first, same, other = (
        fitted(digits, net, tx, run=run, seed=seed)[-1][1]["loss"] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_who_stops_taking_keeps_a_whole_state(digits, plain):
    """An earlier state is still what it was after later steps."""
    net, tx, run = plain
    (first, _), (second, _) = fitted(digits, net, tx, run=run, epochs=2)
    scores = [
        train.accuracy(net, state.params, digits.validation)
        for state in (first, second)
    ]
    assert 0.1 < scores[0] < scores[1]


def test_the_norm_is_logged_without_a_clip(digits, plain):
    net, tx, run = plain
    [(_, log)] = fitted(digits, net, tx, run=run)
    assert set(log) == {"loss", "accuracy", "norm"}
    assert log["norm"].shape == (24,)
    assert (log["norm"] > 0).all()


def test_smoothed_labels_bound_the_loss_from_below():
    """Uniform logits cost log 10 with and without; certain ones cost more with."""
    certain = nets.Net(
        init=lambda key, shape: {"scale": jnp.full((1, 1), 20.0, jnp.float32)},
        apply=lambda params, x: (
            params["scale"] * jax.nn.one_hot(x.ravel().astype(int), 10)
        ),
    )
    labels = np.arange(10, dtype=np.int32)
    images = labels.reshape(10, 1, 1, 1).astype(np.float32)
    split = data.Split(images, labels)
    tx = optax.with_extra_args_support(optax.sgd(0.0))
    state = train.start(certain, tx, shape=(1, 1, 1), key=jax.random.key(0))
    order = np.arange(10, dtype=np.int32)[None]
    plain, smooth = (
        train.loop(certain, tx, smoothing=share)(state, split, order, jax.random.key(0))
        for share in (0.0, 0.1)
    )
    assert plain[1]["accuracy"] == smooth[1]["accuracy"] == 1
    np.testing.assert_allclose(plain[1]["loss"], 0, atol=1e-6)
    np.testing.assert_allclose(smooth[1]["loss"], 0.09 * 20, rtol=1e-4)


def test_every_epoch_shows_every_image_once():
    first, second = train.shuffles(1000, batch_size=10, epochs=2, seed=0)
    assert first.shape == second.shape == (2, 50, 10)  # 2 parts of 50 steps
    for order in (first, second):
        np.testing.assert_array_equal(np.sort(order, axis=None), np.arange(1000))
    assert (first != second).any()


@pytest.mark.parametrize("count", [64, 1200, 5040, 55_000])
def test_steps_are_counted_as_they_are_taken(count):
    [order] = train.shuffles(count, batch_size=64, epochs=1, seed=0)
    steps = order.shape[0] * order.shape[1]
    assert steps == train.steps_per_epoch(count, batch_size=64)
    assert order.shape[1] <= 50
    assert steps > 0.98 * (count // 64)  # hardly anything is left out
    assert np.unique(order).size == order.size


def test_accuracy_counts_the_last_batch_too():
    """Of 1,203 images one in three is judged right."""
    net = nets.Net(
        lambda key, shape: {}, lambda params, x: jnp.eye(3)[jnp.zeros(1, int)]
    )
    labels = np.arange(1203, dtype=np.int32) % 3
    split = data.Split(np.zeros((1203, 2, 2, 1), np.float32), labels)
    assert train.accuracy(net, {}, split) == pytest.approx(1 / 3)


def test_shifted_images_are_the_same_image_somewhere_else():
    images = jnp.zeros((200, 7, 7, 1), jnp.float32).at[:, 3, 3].set(1.0)
    moved = train.shifted(images, jax.random.key(0), pixels=2)
    places = np.argwhere(np.asarray(moved))
    assert len(places) == 200  # each keeps its one bright pixel
    assert {*places[:, 1]} == {*places[:, 2]} == {1, 2, 3, 4, 5}


def test_what_is_shifted_out_does_not_come_back():
    moved = train.shifted(
        jnp.ones((50, 4, 4, 1), jnp.float32), jax.random.key(0), pixels=1
    )
    assert {*np.asarray(moved.sum(axis=(1, 2, 3))).tolist()} == {9.0, 12.0, 16.0}


def test_no_shift_leaves_the_images_alone():
    images = jnp.ones((2, 4, 4, 1), jnp.float32)
    assert train.shifted(images, jax.random.key(0), pixels=0) is images
