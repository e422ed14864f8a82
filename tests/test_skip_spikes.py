"""Skipping spikes: what is skipped, what is not, and that nothing poisons the rule."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from clipjax import metrics
from clipjax._clipping._skip import skip_spikes
from helpers import assert_same, normal, relaxed

INNER = optax.trace(0.5)
DEFAULT = skip_spikes(INNER)


@functools.cache
def feeding(tx, with_values):
    @jax.jit
    def feed(norms, values):
        def step(state, pair):
            norm, value = pair
            given = {"value": value} if with_values else {}
            updates = {"w": norm * jnp.array([0.6, 0.8])}
            updates, state = tx.update(updates, state, **given)
            return state, jnp.sqrt(jnp.sum(updates["w"] ** 2))

        return jax.lax.scan(step, tx.init({"w": jnp.zeros(2)}), (norms, values))

    return feed


PLAIN = skip_spikes(optax.identity())


def skipped(norms, values=None, *, tx=PLAIN):
    """Which steps were skipped, and the last state."""
    norms = jnp.asarray(norms, jnp.float32)
    losses = jnp.zeros_like(norms) if values is None else jnp.asarray(values, "float32")
    state, out = feeding(tx, values is not None)(norms, losses)
    return np.asarray((out == 0) & (norms != 0)), state


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), tree)


def usual(count=300, *, level=1.0, seed=0):
    return level * np.exp(np.random.default_rng(seed).normal(0, 0.1, count))


def reference(norms, values, *, factor=3.0, value_factor=5.0, window=64, most=10):
    """The rule in plain Python."""
    past, losses, row, skips = [], [], 0, []
    for norm, loss in zip(norms, values, strict=True):
        known = np.isfinite(norm) and np.isfinite(loss)
        bound = factor * np.quantile(past[-window:], 0.9) if past else np.inf
        recent = sorted(losses[-window:])
        highest = cap = np.inf
        if len(recent) >= min(16, window):
            last = len(recent) - 1
            middle = recent[last // 2]
            spread = max(recent[int(np.ceil(0.9 * last))] - middle, abs(middle) / 100)
            highest, cap = middle + value_factor * spread, np.inf
            if spread > 0:
                cap = middle + 3 * value_factor * spread
        spike = known and (norm > bound or loss > highest)
        row = row + 1 if spike else 0 if known else row
        skips.append(not known or (spike and row <= most))
        if known:
            losses.append(min(loss, cap))
            if norm > 0:
                past.append(min(norm, 3 * bound))
    return np.array(skips)


def rough(seed):
    norms = usual(400, seed=seed)
    norms[250:] *= 20
    norms[[50, 120, 121, 200]] = [1e3, 1e6, 40, 0]
    norms[[3, 90, 91]] = [np.inf, np.nan, np.nan]
    losses = np.random.default_rng(seed).normal(1, 0.1, 400)
    losses[[60, 122, 210, 211, 230]] = [50, 1e9, np.nan, 9, -40]
    losses[300:] += 30
    return norms, losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 2.0, "value_factor": 3.0, "window": 8},
        {"window": 2},
        {"max_consecutive": 0},
    ],
)
def test_it_is_its_rule(options):
    norms, losses = rough(seed=7)
    tx = skip_spikes(optax.identity(), **options)
    names = {"max_consecutive": "most"}
    expected = reference(
        norms, losses, **{names.get(k, k): v for k, v in options.items()}
    )
    actual, state = skipped(norms, losses, tx=tx)
    np.testing.assert_array_equal(actual, expected & (norms != 0))
    chex.assert_tree_all_finite(state)


def test_ordinary_steps_are_taken():
    taken, state = skipped(usual(2000))
    assert not taken.any()
    assert state.skip.clipped_steps == 0


def test_one_spike_costs_one_step():
    norms = usual()
    norms[200] = 1000
    steps, state = skipped(norms)
    assert np.flatnonzero(steps).tolist() == [200]
    assert state.skip.clipped_steps == 1


# The defects of other implementations


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_step_that_is_not_finite_costs_one_step_and_not_129(bad):
    norms = usual()
    norms[150] = bad
    steps, state = skipped(norms)
    assert np.flatnonzero(steps).tolist() == [150]
    assert state.skip.nonfinite_steps == 1
    losses = np.ones(300)
    losses[160] = bad
    steps, _ = skipped(usual(), losses)
    assert np.flatnonzero(steps).tolist() == [160]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_times_zero_reaches_neither_parameters_nor_moments(bad):
    tx = skip_spikes(optax.adamw(0.1))
    with relaxed():
        params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)
        broken = params | {"b": jnp.array([1.0, bad])}
        updates, after = update(broken, state, params)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params), rtol=0)
    assert_same(after.skip_inner, state.skip_inner, rtol=0)


def test_the_norm_is_that_before_the_clip():
    tx = skip_spikes(optax.chain(optax.clip_by_global_norm(1.0), optax.identity()))
    norms = usual()
    norms[200] = 1000
    steps, _ = skipped(norms, tx=tx)
    assert np.flatnonzero(steps).tolist() == [200]


@pytest.mark.parametrize("rise", [4, 20, 1000])
def test_a_lasting_rise_is_followed(rise):
    norms = np.concatenate([usual(200), usual(200, level=rise, seed=1)])
    steps, state = skipped(norms)
    assert 1 <= steps.sum() <= 10
    assert not steps[220:].any()
    assert state.skip.threshold > rise  # by the rule, not by patience alone


def test_a_lasting_rise_is_followed_with_no_end_of_patience():
    tx = skip_spikes(optax.identity(), max_consecutive=10**6)
    norms = np.concatenate([usual(200), usual(200, level=20, seed=1)])
    steps, _ = skipped(norms, tx=tx)
    assert 1 <= steps.sum() <= 15


def test_a_lasting_rise_of_the_loss_is_followed():
    losses = np.random.default_rng(0).normal(1, 0.1, 400)
    losses[200:] += 20
    steps, _ = skipped(usual(400), losses)
    assert 1 <= steps.sum() <= 10
    assert not steps[230:].any()


@pytest.mark.parametrize("gap", [1, 2, 20])
def test_a_spike_does_not_hide_the_next(gap):
    norms = usual()
    norms[[200, 200 + gap]] = 1000, 10
    steps, _ = skipped(norms)
    assert np.flatnonzero(steps).tolist() == [200, 200 + gap]


def test_constant_norms_have_a_threshold_that_is_a_number():
    """The root of a variance that rounds below zero is none."""
    steps, state = skipped(np.full(300, 0.1))
    assert not steps.any()
    assert state.skip.threshold == pytest.approx(0.3)


# Rows of spikes


def test_rows_of_spikes_are_bounded():
    tx = skip_spikes(optax.identity(), max_consecutive=3)
    norms = usual(100)
    norms[50:55] = 1e6
    norms[60] = 1e6
    steps, state = skipped(norms, tx=tx)
    assert np.flatnonzero(steps).tolist() == [50, 51, 52, 60]
    assert state.skip.clipped_steps == 4
    assert state.skipped_in_row == state.spikes_in_row == 0


def test_what_is_not_finite_is_never_taken_and_outside_of_rows():
    tx = skip_spikes(optax.identity(), max_consecutive=2)
    norms = usual(100)
    norms[50:90] = np.nan
    norms[[50, 52, 54]] = 1e6
    steps, state = skipped(norms[:90], tx=tx)
    assert np.flatnonzero(~steps[50:]).tolist() == [4]
    assert state.skipped_in_row == 35
    assert state.spikes_in_row == 3
    assert state.skip.nonfinite_steps == 37


def test_the_second_step_is_guarded_already():
    steps, _ = skipped([1.0, 1e6, 1.0, 1.0])
    assert steps.tolist() == [False, True, False, False]


def test_parameters_schedules_and_moments_stand_still():
    tx = skip_spikes(optax.adamw(optax.linear_schedule(0.1, 0.0, 10)))
    with relaxed():
        params = normal({"w": (3,)})
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)
        spike = jax.tree.map(lambda u: u * 1e4, params)
        updates, after = update(spike, state, params)
        again, _ = update(params, after, params)
        expected, _ = update(params, state, params)
    assert_same(updates, {"w": jnp.zeros(3)}, rtol=0)
    assert_same(after.skip_inner, state.skip_inner, rtol=0)
    assert_same(again, expected, rtol=0)


# The loss


def test_a_loss_may_be_negative():
    losses = np.random.default_rng(0).normal(-50, 0.1, 200)
    losses[150] = -10
    steps, _ = skipped(usual(200), losses)
    assert np.flatnonzero(steps).tolist() == [150]


def test_losses_that_were_all_zero_lock_nothing():
    losses = np.zeros(200)
    losses[100:] = np.random.default_rng(0).uniform(1, 2, 100)
    steps, _ = skipped(usual(200), losses)
    assert steps.sum() <= 10
    assert not steps[120:].any()


def test_the_loss_is_passed_on():
    def update(updates, state, params=None, *, value, batch, **extra_args):
        return {"w": updates["w"] * value * batch}, state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = skip_spikes(inner)
    params = {"w": jnp.ones(2)}
    updates, state = tx.update(params, tx.init(params), params, value=1.5, batch=2)
    assert_same(updates, {"w": jnp.full(2, 3.0)})
    with pytest.raises(ValueError, match=r"^value must be the loss.*\(3,\)"):
        tx.update(params, state, value=jnp.ones(3), batch=2)


def test_the_update_may_have_another_dtype_than_the_gradient():
    inner = optax.stateless(lambda u, p: jax.tree.map(lambda x: x.astype("float32"), u))
    tx = skip_spikes(inner)
    ones = {"w": jnp.ones(2, jnp.bfloat16)}
    state, update = tx.init(ones), jax.jit(tx.update)
    for grad in (ones, {"w": jnp.full(2, jnp.nan, jnp.bfloat16)}):
        updates, state = update(grad, state)
        assert updates["w"].dtype == jnp.float32


def test_the_factor_may_follow_a_schedule():
    tx = skip_spikes(optax.identity(), factor=lambda step: 2 + step)
    steps, _ = skipped([1.0, 3.5, 3.5, 1.0], tx=tx)
    assert steps.tolist() == [False, True, False, False]


def test_metrics_count_what_was_skipped():
    _, state = skipped([1.0, 1.0, 100.0, np.nan])
    assert metrics(state)["clipped_share"] == 0.25
    assert metrics(state)["nonfinite_steps"] == 1


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="inner"):
        skip_spikes(0.1)
    with pytest.raises(ValueError, match="factor must be at least 1"):
        skip_spikes(INNER, factor=0.5)
    with pytest.raises(TypeError, match="max_consecutive"):
        skip_spikes(INNER, max_consecutive=1.5)


def test_shard_map_is_as_one_device():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = skip_spikes(optax.trace(0.5), axis_name="d")
    params = normal({"a": (16, 4)})

    def train(params, losses):
        state, outs = tx.init(params), []
        for i, scale in enumerate((1.0, 100.0, 2.0)):
            u = scaled(params, scale)
            out, state = tx.update(u, state, value=losses[0] + i)
            outs.append(out)
        return outs

    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d")
    )
    alone, state, update = [], DEFAULT.init(params), jax.jit(DEFAULT.update)
    for scale in (1.0, 100.0, 2.0):
        out, state = update(scaled(params, scale), state)
        alone.append(out)
    assert_same(
        jax.device_get(jax.jit(mapped)(params, jnp.ones(8))), jax.device_get(alone)
    )
