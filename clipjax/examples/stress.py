"""Short trainings that need a clip: the rate is too high, and some batches are bad.

All knobs and seeds of a method are compiled once and run side by side.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, PyTree

from .. import norms
from . import data, nets

Make = Callable[..., optax.GradientTransformation]


class Plan(NamedTuple):
    """What to train, and how badly.

    Args:
        net: the network.
        dataset: the images.
        rate: the learning rate of stochastic gradient descent.
        steps: the number of steps.
        batch_size: the number of images in a step.
        bad: the share of the steps whose images are too bright.
        brighter: how many times too bright they are.
    """

    net: nets.Net
    dataset: data.Dataset
    rate: float
    steps: int = 300
    batch_size: int = 32
    bad: float = 0.02
    brighter: float = 30.0


def sweep(
    plan: Plan, make: Make, *, knobs: Sequence[float] = (1.0,), seeds: int = 4
) -> Float[np.ndarray, "knobs seeds"]:
    """Returns the test accuracies, for every knob and seed.

    Args:
        plan: what to train.
        make: a function from a knob, a traced value, to an optimizer, which is given
            the loss of the batch as `value_fn`.
        knobs: the knobs, one for each row of the result.
        seeds: the number of seeds, for the first parameters and the batches.
    """

    def final(knob, key):
        tx = optax.with_extra_args_support(make(knob))
        first, later = jax.random.split(key)
        params = plan.net.init(first, plan.dataset.shape)

        def step(state, key):
            params, opt_state = state
            loss = functools.partial(_loss, plan, batch=_batch(plan, train, key))
            grads = jax.grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), opt_state), None

        keys = jax.random.split(later, plan.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return _accuracy(plan, params, test)

    train, test = jax.device_put((plan.dataset.train, plan.dataset.test))
    each = jax.vmap(jax.vmap(final, (None, 0)), (0, None))
    keys = jax.random.split(jax.random.key(0), seeds)
    return np.asarray(jax.jit(each)(jnp.asarray(knobs, jnp.float32), keys))


def mixed(
    plan: Plan, clip: Make, bound: float, *, dtype: str, loss_scale: float = 1.0
) -> tuple[float, Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Trains in mixed precision: gradients and clip in `dtype`, parameters in float32.

    Returns the test accuracy, and for every step the norm of the gradient and what the
    clip left of it, both in float32 and without the scale of the loss.

    Args:
        plan: what to train.
        clip: a function from the bound to the clip.
        bound: the bound on the norm of the gradient.
        dtype: the dtype of the gradients, and of the loss and the network.
        loss_scale: the factor of the loss, so that small gradients do not underflow.
    """
    tx = clip(bound * loss_scale)

    def step(state, key):
        params, opt_state = state
        batch = _cast(_batch(plan, train, key), dtype)
        grads = jax.grad(lambda p: loss_scale * _loss(plan, p, batch=batch))(
            _cast(params, dtype)
        )
        updates, opt_state = tx.update(grads, opt_state)
        updates = jax.tree.map(lambda u: u.astype(jnp.float32) / loss_scale, updates)
        params = jax.tree.map(lambda p, u: p - plan.rate * u, params, updates)
        sizes = norms.global_norm(grads) / loss_scale, norms.global_norm(updates)
        return (params, opt_state), sizes

    @jax.jit
    def run(key):
        first, later = jax.random.split(key)
        params = plan.net.init(first, plan.dataset.shape)
        state = params, tx.init(_cast(params, dtype))
        keys = jax.random.split(later, plan.steps)
        (params, _), sizes = jax.lax.scan(step, state, keys)
        return _accuracy(plan, params, plan.dataset.test), *sizes

    train = jax.device_put(plan.dataset.train)
    right, norm, left = jax.device_get(run(jax.random.key(0)))
    return float(right), norm, left


def _batch(plan: Plan, train: data.Split, key: Any) -> data.Split:
    """Draws a batch, now and then a bad one."""
    which, spoil = jax.random.split(key)
    rows = jax.random.randint(which, (plan.batch_size,), 0, len(train.labels))
    by = jnp.where(jax.random.uniform(spoil) < plan.bad, plan.brighter, 1.0)
    return data.Split(train.images[rows] * by, train.labels[rows])


def _loss(plan: Plan, params: PyTree, *, batch: data.Split) -> Any:
    logits = plan.net.apply(params, batch.images).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return each.mean()


def _accuracy(plan: Plan, params: PyTree, split: data.Split) -> Any:
    logits = plan.net.apply(params, split.images)
    right = (logits.argmax(axis=1) == split.labels).mean()
    return jnp.where(jnp.isfinite(logits).all(), right, jnp.float32(0.1))  # a guess


def _cast(tree: PyTree, dtype: str) -> PyTree:
    """Returns the tree with its floating leaves in a dtype."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)
