"""One training loop for every network: a jitted scan over steps, fed part by part.

The loop knows nothing of clipping or sparsity: both sit in the optax chain, and what
they did comes back through `clipjax.metrics`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from .. import metrics, norms
from . import data, nets

_LONGEST_PART = 50  # steps in one compiled call: how soon a bar moves, Ctrl-C answers


History = dict[str, np.ndarray]
Run = Callable[..., tuple["State", dict[str, Array]]]


class State(NamedTuple):
    """All that changes while training."""

    params: PyTree
    opt_state: PyTree


class Trained(NamedTuple):
    """What came out of a training.

    Args:
        params: the parameters after `steps` steps.
        history: for every name in the logs, an array with an entry for each step.
        validation: the accuracy on the validation split, by the number of steps.
        steps: how many steps made `params`: all of them, unless the training failed.
    """

    params: PyTree
    history: History
    validation: dict[int, float]
    steps: int


def start(
    net: nets.Net,
    tx: optax.GradientTransformation,
    *,
    shape: tuple[int, ...],
    key: Key[Array, ""],
) -> State:
    """Makes the state of a network that has not been trained.

    Args:
        net: the network.
        tx: the optimizer.
        shape: the shape of one image, as `Dataset.shape`.
        key: the key for the first parameters.
    """
    params = jax.jit(net.init, static_argnums=1)(key, shape)
    return State(params, jax.jit(tx.init)(params))


def loop(
    net: nets.Net,
    tx: optax.GradientTransformationExtraArgs,
    *,
    shift: int = 0,
    smoothing: float = 0.0,
) -> Run:
    """Compiles `run(state, split, order, key)`: one step for every row of `order`.

    A row of `order` holds the indices of a batch of images.  `run` returns the new
    state and a log, a dict of arrays with one entry for each step: `loss`, `accuracy`
    on the batch, and all of `clipjax.metrics`.

    Args:
        net: the network.
        tx: the optimizer.
        shift: move each image by up to this many pixels, down and across, at random.
        smoothing: how much of each label is spread over all the classes.
    """

    def objective(params, images, labels):
        logits = net.apply(params, images)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[1]), smoothing
        )
        right = (logits.argmax(axis=1) == labels).mean()
        return optax.softmax_cross_entropy(logits, targets).mean(), right

    def step(split, state, now):
        rows, key = now
        images = shifted(split.images[rows], key, pixels=shift)
        graded = jax.value_and_grad(objective, has_aux=True)
        (loss, right), grads = graded(state.params, images, split.labels[rows])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        log = {"loss": loss, "accuracy": right, "norm": norms.global_norm(grads)}
        log |= metrics(opt_state)  # where it has the norm, ours is never computed
        return State(params, opt_state), log

    @jax.jit
    def run(state, split, order, key):
        keys = jax.random.split(key, len(order))
        return jax.lax.scan(functools.partial(step, split), state, (order, keys))

    return run


def shuffles(
    count: int, *, batch_size: int, epochs: int, seed: int
) -> Iterator[Int[np.ndarray, "parts steps batch"]]:
    """Yields, for every epoch, the order of the images in parts of at most 50 steps.

    All epochs have the same shape, so that `run` compiles once.  The few images that do
    not fill a step are left out, different ones in every epoch.

    Args:
        count: the number of images.
        batch_size: the number of images in a step, at most `count`.
        epochs: the number of passes over all images.
        seed: the seed of the order.
    """
    shape = _parts(count, batch_size)
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(count)[: math.prod(shape)]
        yield order.astype(np.int32).reshape(shape)


def steps_per_epoch(count: int, *, batch_size: int) -> int:
    """How many steps `shuffles` makes of `count` images.

    Example:
        >>> from clipjax.examples import train
        >>> train.steps_per_epoch(55_000, batch_size=100)  # 11 parts of 50
        550
    """
    parts, length, _ = _parts(count, batch_size)
    return parts * length


def fit(
    run: Run,
    state: State,
    split: data.Split,
    *,
    orders: Iterable[Int[np.ndarray, "parts steps batch"]],
    key: Key[Array, ""],
) -> Iterator[tuple[State, History]]:
    """Trains, and yields the state and the log after every part.

    You may stop at any part and keep its state: nothing is donated or changed.

    Args:
        run: the function that `loop` returned.
        state: the state to start from.
        split: the images to train on.
        orders: the orders of the images, as `shuffles` yields them.
        key: the key for the shifts of the images.
    """
    split = jax.device_put(split)
    for order in itertools.chain.from_iterable(orders):
        key, now = jax.random.split(key)
        state, log = run(state, split, order, now)
        yield state, jax.device_get(log)


def joined(logs: Sequence[History]) -> History:
    """Concatenates the logs of the parts.

    Args:
        logs: one or more logs, as `fit` yields them.
    """
    return {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}


def accuracy(net: nets.Net, params: PyTree, split: data.Split) -> float:
    """The share of images whose largest logit is that of their label.

    Args:
        net: the network.
        params: the parameters of the network.
        split: the images and their labels.
    """
    right = _right(net, params, split.images, split.labels)
    return float(np.mean(np.asarray(right)))


def shifted(
    images: Float[Array, "n height width c"], key: Key[Array, ""], *, pixels: int
) -> Float[Array, "n height width c"]:
    """Moves every image by its own random number of pixels, down and across.

    Pixels that come in from outside are 0.

    Args:
        images: a batch of images.
        key: the key for the moves.
        pixels: the largest move; 0 leaves the images as they are.
    """
    if not pixels:
        return images
    room = ((pixels, pixels), (pixels, pixels), (0, 0))
    moves = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

    def move(image, by):
        start = (by[0], by[1], jnp.zeros_like(by[0]))
        return jax.lax.dynamic_slice(jnp.pad(image, room), start, image.shape)

    return jax.vmap(move)(images, moves)


@functools.partial(jax.jit, static_argnums=0)
def _right(net, params, images, labels):
    def judge(now):
        image, label = now
        return net.apply(params, image[None])[0].argmax() == label

    return jax.lax.map(judge, (images, labels), batch_size=500)


def _parts(count: int, batch_size: int) -> tuple[int, int, int]:
    """The shape of an epoch: parts, steps in a part, images in a step."""
    steps = count // batch_size
    parts = -(-steps // _LONGEST_PART)
    return parts, steps // parts, batch_size
