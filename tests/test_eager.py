"""Outside of `jax.jit` an update is compiled once, and inside it is as it was."""

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._core.eager import compiled
from helpers import assert_same


def tripled_later():
    """An update with a branch on its state, which counts how often it is traced."""
    traced = []

    def update(updates, state, params=None, **extra_args):
        traced.append(sorted(extra_args))
        factor = jax.lax.cond(state > 1, lambda: 3 + 0 * state, lambda: 1 + 0 * state)
        scaled = jax.tree.map(
            lambda u: u if u.dtype == jax.dtypes.float0 else u * factor.astype(u.dtype),
            updates,
        )
        return scaled, state + 1

    return update, traced


def test_the_second_eager_call_traces_nothing():
    plain, traced = tripled_later()
    update = compiled(plain)
    integers = np.zeros(2, jax.dtypes.float0)
    updates = {"w": jnp.ones(3), "numpy": np.ones(2, "f4"), "none": None, "i": integers}
    state = jnp.int32(0)
    for step in range(4):
        new, state = update(updates, state, None, value=0.5)
        assert_same(new["w"], jnp.full(3, 3.0 if step > 1 else 1.0))
        assert new["none"] is None
        assert new["i"].dtype == jax.dtypes.float0
    assert len(traced) == 1


def test_functions_among_the_extra_arguments_reach_it():
    plain, traced = tripled_later()
    update = compiled(plain)
    for name in ("value_fn", "other"):  # only of the first it is known what it is
        for _ in range(2):
            new, _ = update(jnp.ones(2), jnp.int32(2), **{name: len})
            assert_same(new, jnp.full(2, 3.0))
    assert traced == [["value_fn"], ["other"], ["other"]]


def test_inside_a_trace_it_adds_nothing():
    plain, _ = tripled_later()
    jaxprs = [
        str(jax.make_jaxpr(update)(jnp.ones(2), jnp.int32(2)))
        for update in (plain, compiled(plain))
    ]
    assert jaxprs[0] == jaxprs[1]
