"""Greedy clipping: the threshold that lowers the loss most, and its state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from clipjax._clipping._carry import carry_clipped
from clipjax._clipping._norm import clip_by_global_norm
from clipjax.contrib._greedy import greedy_clip
from helpers import assert_same, normal, relaxed, spec

CANDIDATES = [0.1, 1.0, 4.0, np.inf]


def loss(params, x=1.0):
    return sum(jnp.sum(leaf.astype("float32") ** 2) * x for leaf in params.values())


def test_it_is_its_rule():
    """SGD with momentum on a badly scaled quadratic, against plain loops."""
    scales, rate, decay = np.array([1.0, 10.0, 0.1]), 0.15, 0.9
    tx = greedy_clip(optax.sgd(rate, momentum=decay), CANDIDATES)

    def value_fn(w):
        return jnp.sum(jnp.asarray(scales, jnp.float32) * w**2)

    @jax.jit
    def step(w, state):
        u, state = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        return w + u, state

    w = jnp.array([3.0, -2.0, 1.0])
    state, plain, trace, winners = tx.init(w), np.float64(w), np.zeros(3), set()
    for _ in range(15):
        w, state = step(w, state)
        g = 2 * scales * plain
        tried = []
        for bound in CANDIDATES:
            moment = decay * trace + g * min(1, bound / np.linalg.norm(g))
            new = plain - rate * moment
            tried.append((np.sum(scales * new**2), moment, new))
        best = int(np.argmin([value for value, _, _ in tried]))
        value, trace, plain = tried[best]
        winners.add(best)
        assert state.winner == best
        np.testing.assert_allclose(state.winner_value, value, rtol=1e-3)
        np.testing.assert_allclose(w, plain, rtol=1e-3, atol=1e-4)
    assert len(winners) >= 3


def test_relative_thresholds_are_shares_of_the_norm():
    tx = greedy_clip(optax.sgd(1.0), [0.25, 0.5, 1.0], relative=True)
    params = {"w": jnp.array([3.0, 4.0])}
    updates, state = tx.update(
        jax.grad(loss)(params), tx.init(params), params, value_fn=loss
    )
    assert_same(updates, {"w": jnp.array([-3.0, -4.0])})
    assert (state.winner, state.greedy.threshold) == (1, 5.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zero, state, params, value_fn=loss)
    assert_same(updates, zero)
    chex.assert_tree_all_finite(state)


def test_of_equals_the_first_wins():
    tx = greedy_clip(optax.identity(), [7.0, 8.0, 9.0])
    params = {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params, value_fn=loss)
    assert state.winner == 0


def test_the_arguments_are_those_of_a_line_search():
    """Also for a line search inside, which takes the same."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    tx = greedy_clip(optax.chain(optax.sgd(1.0), search), [1.0, jnp.inf])
    params = {"w": jnp.array([3.0, 4.0])}
    with relaxed():
        value, grad = jax.value_and_grad(loss)(params, x=2.0)
        updates, state = tx.update(
            grad, tx.init(params), params, value=value, grad=grad, value_fn=loss, x=2.0
        )
    assert state.winner_value < value
    assert state.winner_value == loss({"w": params["w"] + updates["w"]}, 2.0)


def test_only_what_the_loss_names_is_passed_to_it():
    tx = greedy_clip(optax.identity(), [1.0])
    params = {"w": jnp.ones(2)}
    _, state = tx.update(
        params, tx.init(params), params, value_fn=loss, x=3.0, batch=None
    )
    assert state.winner_value > 3 * 2


# Losses that are not finite


def edge(params):
    """Defined below 2 only."""
    return jnp.where(params["w"][0] < 2, -params["w"][0], jnp.nan)


def test_a_loss_that_is_not_finite_never_wins():
    tx = greedy_clip(optax.trace(0.5), [8.0, 0.5, 0.25])
    params = {"w": jnp.ones(1)}
    updates, state = tx.update(
        {"w": jnp.full(1, 9.0)}, tx.init(params), params, value_fn=edge
    )
    assert_same(updates, {"w": jnp.array([0.5])})
    assert (state.winner, state.winless_steps) == (1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_with_no_finite_loss_nothing_moves(value):
    tx = greedy_clip(optax.adam(0.1), CANDIDATES)
    params = {"w": jnp.ones(2)}
    update = jax.jit(tx.update, static_argnames="value_fn")
    with relaxed():
        _, state = update(params, tx.init(params), params, value_fn=loss)
        updates, after = update(
            params, state, params, value_fn=lambda p: jnp.sum(p["w"]) * value
        )
    assert_same(updates, {"w": jnp.zeros(2)}, rtol=0)
    assert_same(after.greedy_inner, state.greedy_inner, rtol=0)
    assert after.winless_steps == 1
    chex.assert_tree_all_finite(after)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_never_wins(bad):
    """Even where the loss does not feel it."""
    tx = greedy_clip(optax.adam(0.1), CANDIDATES)
    params = {"w": jnp.ones(2), "unused": jnp.ones(1)}
    with relaxed():
        state = tx.init(params)
        updates, after = tx.update(
            params | {"unused": jnp.array([bad])},
            state,
            params,
            value_fn=lambda p: jnp.sum(p["w"]),
        )
    assert_same(updates, jax.tree.map(jnp.zeros_like, params), rtol=0)
    assert_same(after.greedy_inner, state.greedy_inner, rtol=0)
    assert (after.winless_steps, after.greedy.nonfinite_steps) == (1, 1)
    chex.assert_tree_all_finite(after)


# Trees, dtypes, compilation


@pytest.mark.parametrize("inner", ["sgd", "carry"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_updates_and_parameters_may_differ_in_dtype(dtypes, inner):
    """Under strict promotion too; as if both were float32, but for rounding."""
    make = {
        "sgd": lambda: optax.sgd(0.5),
        "carry": lambda: carry_clipped(clip_by_global_norm(0.7)),
    }[inner]
    tx = greedy_clip(make(), CANDIDATES)
    update = jax.jit(lambda u, p: tx.update(u, tx.init(p), p, value_fn=loss))
    params = normal({"a": (3,), "b": (2,)}, dtype=dtypes[0])
    updates = normal({"a": (3,), "b": (2,)}, seed=1, dtype=dtypes[1])
    actual, state = update(updates, params)
    assert spec(actual) == spec(updates)
    wide = jax.tree.map(lambda x: x.astype("float32"), (updates, params))
    expected, same = update(*wide)
    assert state.winner == same.winner
    actual = jax.tree.map(lambda x: x.astype("float32"), actual)
    assert_same(actual, expected, rtol=2**-8)


def test_leaves_that_are_missing():
    tx = greedy_clip(optax.identity(), [1.0])
    params = {"a": jnp.ones(2), "n": None, "b": jnp.ones(2)}
    updates, _ = tx.update(
        params | {"b": None},
        tx.init(params),
        params,
        value_fn=lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"]),
    )
    assert updates["b"] is updates["n"] is None
    updates, _ = tx.update({}, tx.init({}), {}, value_fn=lambda p: 0.0)
    assert updates == {}


def test_thresholds_may_be_traced_or_schedules():
    params = {"w": jnp.array([3.0, 4.0])}

    def bound(first):
        tx = greedy_clip(optax.sgd(1.0), [first, lambda step: step + 2])
        updates, state = tx.update(params, tx.init(params), params, value_fn=loss)
        del updates
        return state.greedy.threshold

    assert_same(jax.vmap(bound)(jnp.array([1.0, 3.0])), jnp.array([2.0, 3.0]))


def test_errors_name_the_argument():
    params = {"w": jnp.ones(2)}
    tx = greedy_clip(optax.identity(), [1.0])
    state = tx.init(params)
    with pytest.raises(ValueError, match="thresholds must not be empty"):
        greedy_clip(optax.identity(), [])
    with pytest.raises(ValueError, match=r"thresholds must not be negative.*-1"):
        greedy_clip(optax.identity(), [1.0, -1.0])
    with pytest.raises(ValueError, match=r"^greedy_clip .* params is None"):
        tx.update(params, state, value_fn=loss)
    with pytest.raises(TypeError, match="value_fn is not given"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=r"value_fn must return a scalar.*\(2,\)"):
        tx.update(params, state, params, value_fn=lambda p: p["w"])


def test_nnx_trains():
    with relaxed():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        graph, own = nnx.split(model, nnx.Param)
        optimizer = nnx.Optimizer(
            model, greedy_clip(optax.adam(0.5), [0.01, 1.0]), wrt=nnx.Param
        )
        x = normal((4, 3))

        def value_fn(params):
            return jnp.mean((nnx.merge(graph, params)(x) - 1) ** 2)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(
                model
            )
            optimizer.update(model, grads, value_fn=value_fn)
            return value

        del own
        values = [float(step(model, optimizer)) for _ in range(6)]
    assert values[-1] < values[0]
