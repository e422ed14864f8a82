"""Other copies get the zeros of the trained model, and fine-tuning keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import constraints, masks
from helpers import assert_same, normal, relaxed

SHAPES = {"layer": {"kernel": (6, 10), "bias": (10,)}}


def sparse_network(*, seed=0, dtype="float32"):
    params = normal(SHAPES, seed=seed, dtype=dtype)
    kernel = params["layer"]["kernel"]
    kernel = jnp.where(jnp.abs(kernel) > 0.7, kernel, jnp.zeros_like(kernel))
    bias = jnp.zeros_like(params["layer"]["bias"])
    return {"layer": {"kernel": kernel, "bias": bias}}


def assert_zeros_of(actual, like):
    kernel, zeros = actual["layer"]["kernel"], like["layer"]["kernel"] == 0
    np.testing.assert_array_equal(kernel == 0, zeros)
    assert not np.signbit(np.asarray(kernel, np.float32)[np.asarray(zeros)]).any()


# finalize


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_gets_the_zeros_and_keeps_all_else(dtype):
    trained = sparse_network(dtype="bfloat16")
    copy = normal(SHAPES, seed=1, dtype=dtype)
    final = jax.jit(clipjax.finalize)(copy, trained)
    assert_zeros_of(final, trained)
    mask = np.asarray(trained["layer"]["kernel"] != 0)
    kept = np.where(mask, copy["layer"]["kernel"], np.zeros_like(mask, dtype))
    assert_same(final["layer"]["kernel"], jnp.asarray(kept), rtol=0)
    assert_same(final["layer"]["bias"], copy["layer"]["bias"], rtol=0)


def test_masks_and_states_tell_the_same():
    params = normal(SHAPES)
    tx = optax.chain(optax.sgd(0.1), clipjax.sparsify(0.5))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    trained = optax.apply_updates(params, updates)
    copy = normal(SHAPES, seed=1)
    expected = clipjax.finalize(copy, like=trained)
    assert_zeros_of(expected, trained)
    assert_same(clipjax.finalize(copy, like=state), expected, rtol=0)
    boolean = jax.tree.map(masks.nonzero, trained)
    assert_same(clipjax.finalize(copy, like=boolean), expected, rtol=0)


def test_a_state_knows_kept_entries_that_are_zero():
    """Which the parameters themselves cannot tell."""
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    tx = clipjax.sparsify(0.25)
    updates = {"kernel": jnp.array([[1.0, -2.0, 1.0, 1.0]])}
    updates, state = tx.update(updates, tx.init(params), params)
    trained = optax.apply_updates(params, updates)
    assert_same(trained, {"kernel": jnp.array([[0.0, 0.0, 4.0, 5.0]])})
    copy = {"kernel": jnp.full((1, 4), 7.0)}
    expected = {"kernel": jnp.array([[0.0, 7.0, 7.0, 7.0]])}
    assert_same(clipjax.finalize(copy, like=state), expected)
    expected = {"kernel": jnp.array([[0.0, 0.0, 7.0, 7.0]])}
    assert_same(clipjax.finalize(copy, like=trained), expected)


def test_what_is_not_finite_goes_where_a_zero_belongs():
    trained = {"kernel": jnp.array([[0.0, -0.0, 2.0]])}
    copy = {"kernel": jnp.array([[jnp.nan, jnp.inf, 3.0]]), "step": jnp.int32(4)}
    expected = {"kernel": jnp.array([[0.0, 0.0, 3.0]]), "step": jnp.int32(4)}
    assert_same(clipjax.finalize(copy, like=trained), expected, rtol=0)


def test_where_says_which_leaves_are_sparse():
    trained = sparse_network()
    copy = normal(SHAPES, seed=1)
    everything = clipjax.finalize(copy, trained, where=lambda path, leaf: True)
    assert (everything["layer"]["bias"] == 0).all()


def test_a_copy_that_does_not_fit_is_refused():
    trained, copy = sparse_network(), normal(SHAPES)
    with pytest.raises(ValueError, match=r"no leaf at 'layer/kernel'.*params\.slow"):
        clipjax.finalize(copy, like={"slow": trained})
    other = normal({"layer": {"kernel": (10, 6)}})
    with pytest.raises(
        ValueError, match=r"params has shape \(10, 6\) and like \(6, 10"
    ):
        clipjax.finalize(other, like=trained)
    state = clipjax.sparsify(0.5, storage=masks.Zeros()).init(copy)
    with pytest.raises(ValueError, match=r"without stored masks.*masks\.Bits\(\)"):
        clipjax.finalize(copy, like=state)


# keep_zeros


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),  # no rounded -θ is needed, and no wider update
        ("bfloat16", "float32"),
        ("float16", "float16"),
    ],
)
def test_fine_tuning_keeps_every_zero(dtype, grad_dtype):
    start = sparse_network(dtype=dtype)
    grads = normal(SHAPES, seed=1, dtype=grad_dtype)
    tx = optax.chain(optax.adamw(1e-2, mu_dtype="float32"), constraints.keep_zeros())
    with relaxed():
        params, state, update = start, tx.init(start), jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert_zeros_of(params, start)
    moved = params["layer"]["kernel"] != start["layer"]["kernel"]
    np.testing.assert_array_equal(moved, start["layer"]["kernel"] != 0)
    assert (params["layer"]["bias"] != 0).all()
    assert state[-1].step == 4


def test_no_update_revives_a_zero():
    params = {"kernel": jnp.array([[0.0, -0.0, 2.0]])}
    tx = constraints.keep_zeros()
    for bad in (np.nan, np.inf, -np.inf, 5.0):
        updates = {"kernel": jnp.full((1, 3), bad, jnp.bfloat16)}
        kept, _ = tx.update(updates, tx.init(params), params)
        expected = {"kernel": jnp.array([[0.0, 0.0, bad]], jnp.bfloat16)}
        assert_same(kept, expected, rtol=0, equal_nan=True)


def test_it_does_not_widen_what_apply_if_finite_compares():
    params = sparse_network()
    grads = normal(SHAPES, seed=1, dtype="bfloat16")
    tx = optax.apply_if_finite(constraints.keep_zeros(), 3)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    kernels = updates["layer"]["kernel"], params["layer"]["kernel"]
    np.testing.assert_array_equal(kernels[0] == 0, kernels[1] == 0)
