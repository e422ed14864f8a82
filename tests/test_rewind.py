"""Iterative magnitude pruning: rounds that start from the same early parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax import contrib, masks
from helpers import assert_same, normal, relaxed

SHAPES = {"a": {"kernel": (6, 8), "bias": (8,)}, "b": {"kernel": (8, 3)}}
ROUND = 4


def gradient(params, target):
    """Of a quadratic, so that every path of the training is another one."""
    return jax.tree.map(lambda p, t: (p - t) * (1 + t * t), params, target)


def train(tx, steps, *, dtype="float32", target=None):
    params = normal(SHAPES, dtype=dtype)
    target = normal(SHAPES, seed=1, dtype=dtype) if target is None else target
    with relaxed():
        state, update, history = tx.init(params), jax.jit(tx.update), []
        for _ in range(steps):
            updates, state = update(gradient(params, target), state, params)
            params = optax.apply_updates(params, updates)
            history.append((params, state))
    return history


def largest(trained, mask, number):
    """The largest of what is left, over all kernels together."""
    names = ("a", "b")
    left = [
        np.where(mask[n], np.abs(np.asarray(trained[n]["kernel"])), -1) for n in names
    ]
    order = np.argsort(-np.concatenate([x.ravel() for x in left]), kind="stable")
    flat = np.zeros(72, bool)
    flat[order[:number]] = True
    return {"a": flat[:48].reshape(6, 8), "b": flat[48:].reshape(8, 3)}


def masked(tree, mask):
    return {
        name: layer | {"kernel": jnp.where(mask[name], layer["kernel"], 0)}
        for name, layer in tree.items()
    }


@pytest.mark.parametrize("rewind_step", [0, 2])
def test_it_is_the_loop_over_rounds(rewind_step):
    """Written out: train, prune, return, restart the optimizer, train again."""
    inner, target = optax.adam(0.1), normal(SHAPES, seed=1)
    tx = contrib.rewinding(
        inner, every=ROUND, rounds=2, rate=0.5, rewind_step=rewind_step
    )
    history = train(tx, 3 * ROUND + 2 * 3)
    params = normal(SHAPES)
    mask = {"a": np.ones((6, 8), bool), "b": np.ones((8, 3), bool)}
    early, now = params, iter(history)
    with relaxed():
        for index in range(3):
            state = inner.init(params)
            for step in range(ROUND):
                if index == 0 and step == rewind_step:
                    early = params
                grads = masked(gradient(params, target), mask)
                updates, state = jax.jit(inner.update)(grads, state, params)
                params = optax.apply_updates(params, updates)
                params = masked(params, mask)
                assert_same(next(now)[0], params, rtol=1e-5, atol=1e-7)
            if index < 2:
                mask = largest(params, mask, [36, 18][index])
                params = masked(early, mask)
                steps = [next(now)[0] for _ in range(3)]
                assert_same(steps[0], params, rtol=1e-5, atol=1e-6)
                assert_same(steps[2], params, rtol=0)  # bit for bit
    assert history[-1][1].rounds_done == 2
    assert history[-1][1].rewinding.total_sparsity == 0.75


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_returns_bit_for_bit_in_narrow_dtypes(dtype):
    target = jax.tree.map(
        lambda t: t * 4, normal(SHAPES, seed=1, dtype=dtype)
    )  # far from where it starts
    tx = contrib.rewinding(optax.sgd(0.01), every=2, rounds=1, rate=0.5)
    history = train(tx, 5, dtype=dtype, target=target)
    start, (after, _) = normal(SHAPES, dtype=dtype), history[-1]
    mask = {name: np.asarray(after[name]["kernel"] != 0) for name in after}
    assert sum(m.sum() for m in mask.values()) == 36
    assert_same(after, masked(start, mask), rtol=0)
    moved = history[1][0]["a"]["kernel"] != start["a"]["kernel"]
    assert moved.mean() > 0.9


def test_the_state_of_the_optimizer_starts_anew():
    tx = contrib.rewinding(optax.adam(0.1), every=2, rounds=1)
    history = train(tx, 6)
    counts = [int(optax.tree.get(s.rewinding_inner, "count")) for _, s in history]
    assert counts[:2] == [1, 2]
    assert counts[-1] == 1  # after three steps of rewinding
    kept = history[-1][0]["a"]["kernel"] != 0
    last, first = (
        optax.tree.get(history[i][1].rewinding_inner, "nu")["a"]["kernel"]
        for i in (-1, 0)
    )
    np.testing.assert_array_equal(last != 0, kept)
    # At the start, the gradient is that of the first step.
    np.testing.assert_allclose(last[kept], first[kept], rtol=1e-5)


def test_it_remembers_one_copy_of_the_parameters_and_a_bit_each():
    params = normal({"kernel": (64, 256), "bias": (256,)})
    state = contrib.rewinding(optax.sgd(0.1), every=9, rounds=1).init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert copy + 64 * 256 / 8 <= size <= copy + 64 * 256 / 8 + 40


def test_a_rewind_waits_for_a_finite_gradient_and_a_wrapper():
    tx = contrib.rewinding(optax.sgd(0.1), every=2, rounds=1, storage=masks.Booleans())
    wrapped = optax.apply_if_finite(tx, 9)
    params = {"kernel": normal((6, 8))}
    with relaxed():
        state, update, done = wrapped.init(params), jax.jit(wrapped.update), []
        for step in range(5):
            grad = {"kernel": params["kernel"] * (jnp.nan if step == 2 else 1.0)}
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
            done.append(int(state.inner_state.rounds_done))
    assert done == [0, 0, 0, 1, 1]
    assert (params["kernel"] == 0).sum() == 10  # ⌈0.2·48⌉


def test_rounds_may_prune_by_a_schedule():
    """Half of all, then a fifth of what is left: 50 and 10 of 100."""
    tx = contrib.rewinding(
        optax.sgd(0.1), every=1, rounds=2, rate=lambda t: jnp.where(t < 3, 0.5, 0.2)
    )
    params = {"kernel": normal((10, 10))}
    state, update, zeros = tx.init(params), jax.jit(tx.update), []
    for _ in range(9):
        updates, state = update({"kernel": jnp.ones((10, 10))}, state, params)
        params = optax.apply_updates(params, updates)
        zeros.append(int((params["kernel"] == 0).sum()))
    assert sorted(set(zeros)) == [0, 50, 60]
    assert zeros == sorted(zeros)


def test_extra_arguments_are_passed_on_and_integers_left_alone():
    seen = []

    def spy(updates, state, params, **extra_args):
        seen.append(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), spy)
    tx = contrib.rewinding(inner, every=1, rounds=1)
    params = {"kernel": normal((2, 4)), "table": jnp.arange(3), "frozen": None}
    update = jax.jit(functools.partial(tx.update, value=3.0))
    updates, _ = update(params, tx.init(params), params)
    assert_same(updates, params, rtol=0)
    assert {"value": 3.0} in seen


def test_it_cannot_return_to_a_later_round():
    with pytest.raises(ValueError, match="rewind_step must be below every, 5, but"):
        contrib.rewinding(optax.sgd(0.1), every=5, rounds=1, rewind_step=5)
