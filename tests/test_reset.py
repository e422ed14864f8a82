"""Resets: moments restart, schedules go on, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipjax._clipping._adaptive import adaptive_clip
from clipjax._clipping._reset import reset_moments
from clipjax.thresholds import WindowedQuantile
from helpers import assert_same, normal, relaxed, spec

SHAPES = {"a": (3,), "b": (2, 2)}


def run(tx, stream, params):
    update, state, outs = jax.jit(tx.update), tx.init(params), []
    with relaxed():
        for updates in stream:
            out, state = update(updates, state, params)
            outs.append(out)
    return outs, state


def wave(age, warmup):
    if age is None or age >= warmup:
        return 1.0
    return 1 - 0.99 * (1 + np.cos(np.pi * age / warmup)) / 2


def adam(stream, *, every, warmup, rate, decay=0.0, param=1.0):
    """Adam, or AdamW with a schedule of rates, in plain Python."""
    m = v = np.zeros(stream.shape[1])
    count, age, since, outs = 0, None, 0, []
    for step, g in enumerate(stream):
        if since == every:
            m = v = np.zeros(stream.shape[1])
            count = age = since = 0
        count += 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        unit = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
        outs.append(-rate(step) * (unit + decay * param) * wave(age, warmup))
        age, since = None if age is None else age + 1, since + 1
    return np.array(outs)


STREAM = np.random.default_rng(0).normal(size=(25, 4))


def test_adam_restarts():
    tx = reset_moments(optax.adam(0.1), every=7, warmup=3)
    outs, state = run(tx, jnp.float32(STREAM), jnp.ones(4))
    expected = adam(STREAM, every=7, warmup=3, rate=lambda step: 0.1)
    np.testing.assert_allclose(outs, expected, rtol=1e-4, atol=1e-6)
    assert state.resets == 3


def test_the_schedule_of_adamw_goes_on():
    """Only the count beside the moments restarts, not that of the learning rate."""
    rate = optax.linear_schedule(0.1, 0.01, 20)
    tx = optax.adamw(rate, weight_decay=0.3)
    tx = optax.chain(reset_moments(tx, every=7, warmup=3), optax.scale(1.0))
    outs, state = run(tx, jnp.float32(STREAM), jnp.ones(4))
    expected = adam(STREAM, every=7, warmup=3, rate=rate, decay=0.3)
    np.testing.assert_allclose(outs, expected, rtol=1e-4, atol=1e-6)
    adam_state, _, schedule = state[0].reset_inner
    assert (adam_state.count, schedule.count) == (25 % 7, 25)


def test_momentum_restarts():
    tx = reset_moments(optax.sgd(1.0, momentum=0.9), every=5, warmup=0)
    outs, _ = run(tx, jnp.float32(STREAM), jnp.ones(4))
    trace = np.zeros(4)
    for i, g in enumerate(STREAM):
        trace = g if i % 5 == 0 else 0.9 * trace + g
        np.testing.assert_allclose(outs[i], -trace, rtol=1e-5, atol=1e-5)


def test_the_reset_step_itself_has_no_old_moments():
    """Stale references kept them in the authors' code."""
    tx = reset_moments(optax.sgd(1.0, momentum=0.9), every=3, warmup=0)
    stream = [jnp.full(2, size) for size in (100.0, 100.0, 100.0, 1.0)]
    outs, state = run(tx, stream, jnp.ones(2))
    assert_same(outs[3], jnp.full(2, -1.0))
    assert_same(state.reset_inner[0].trace, jnp.ones(2))


def test_what_a_clip_has_seen_is_kept():
    """With it the authors' code reset the step that its threshold is debiased with."""
    params = normal(SHAPES)
    inner = optax.chain(adaptive_clip(), optax.adam(0.1))
    _, state = run(reset_moments(inner, every=2), [params] * 5, params)
    clip, adam_state = state.reset_inner[0], state.reset_inner[1][0]
    assert clip.clip.step == 5
    (history,) = jax.tree.leaves(clip.threshold_memory)
    assert (history > 0).sum() == 5
    assert adam_state.count == 1


def test_the_size_grows_back_as_in_the_paper():
    tx = reset_moments(optax.identity(), every=500)
    outs, _ = run_long(tx, 1200)
    expected = [wave(None if i < 500 else i % 500, 150) for i in range(1200)]
    np.testing.assert_allclose(outs, expected, rtol=1e-5)
    assert outs[500] == np.float32(0.01)
    assert (outs[650:1000] == 1).all()


def run_long(tx, steps):
    def step(state, _):
        u, state = tx.update(jnp.ones(()), state, jnp.ones(()))
        return state, u

    state, outs = jax.jit(
        lambda: jax.lax.scan(step, tx.init(jnp.ones(())), None, length=steps)
    )()
    return np.asarray(outs), state


SPIKES = WindowedQuantile(factor=3.0)


def test_a_spike_leaves_no_trace_in_the_moments():
    tx = reset_moments(optax.adam(0.1), every=None, warmup=4, on_spike=SPIKES)
    params = {"w": jnp.ones(2)}
    stream = [{"w": jnp.array([1.0, 2.0]) * s} for s in (1, 1, 1000, 1, 1, 1, 1, 1)]
    outs, state = run(tx, stream, params)
    assert state.resets == 1
    assert state.reset_inner[0].count == 5
    sizes = [float(-out["w"][0]) for out in outs]
    assert sizes[2] < 0.0033  # a hundredth of a step
    expected = [0.1 * wave(age, 4) for age in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(sizes[3:], expected, rtol=1e-3)
    assert float(state.reset_inner[0].nu["w"].max()) < 0.1


def test_without_spikes_or_period_nothing_changes():
    params, stream = normal(SHAPES), [normal(SHAPES, seed=s) for s in range(4)]
    expected, _ = run(optax.adam(0.1), stream, params)
    outs, state = run(
        reset_moments(optax.adam(0.1), every=None, on_spike=SPIKES), stream, params
    )
    assert_same(outs, expected, rtol=0)
    assert state.resets == 0


def test_a_lasting_rise_resets_a_few_times_only():
    tx = reset_moments(optax.identity(), every=None, on_spike=SPIKES)
    params = jnp.ones(2)
    stream = [params] * 80 + [20 * params] * 40
    _, state = run(tx, stream, params)
    assert 1 <= state.resets <= 15
    assert state.since_reset > 20


OPTIMIZERS = {
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adamw_mask": optax.adamw(0.1, mask={"a": True, "b": False}),
    "inject": optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1)),
    "lion": optax.lion(0.1),
    "masked": optax.masked(optax.adam(0.1), {"a": True, "b": False}),
    "partition": optax.partition(
        {"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, {"a": "x", "b": "y"}
    ),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_restarts(name):
    """With a constant rate it then does what it did at first."""
    tx, params = OPTIMIZERS[name], normal(SHAPES)
    with relaxed():
        wrapped = reset_moments(tx, every=3, warmup=0)
        stream = [normal(SHAPES, seed=seed) for seed in (1, 2, 3, 1, 2)]
        outs, state = run(wrapped, stream, params)
        expected, _ = run(tx, stream[:3], params)
        assert_same(outs, expected + expected[:2], rtol=1e-5, atol=1e-7)
        assert spec(state) == spec(wrapped.init(params))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_out(bad):
    tx = reset_moments(optax.adam(0.1), every=2, on_spike=SPIKES)
    params = normal(SHAPES)
    _, state = run(tx, [params], params)
    broken = params | {"a": jnp.array([1.0, bad, 0.0])}
    with relaxed():
        updates, after = jax.jit(tx.update)(broken, state, params)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params), rtol=0)
    assert_same(after, state._replace(step=jnp.int32(2)), rtol=0)


def test_the_period_may_be_traced_or_follow_a_schedule():
    def resets(every):
        tx = reset_moments(optax.trace(0.9), every=every)
        state = tx.init(jnp.ones(2))
        for _ in range(7):
            _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
        return state.resets

    assert_same(jax.jit(jax.vmap(resets))(jnp.array([2, 3])), jnp.array([3, 2]))
    assert (
        jax.jit(resets, static_argnums=0)(lambda step: jnp.where(step < 4, 2, 100)) == 1
    )


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="inner"):
        reset_moments(0.1)
    with pytest.raises(ValueError, match="every must be at least 1"):
        reset_moments(optax.identity(), every=0)
    with pytest.raises(ValueError, match="warmup must not be negative"):
        reset_moments(optax.identity(), warmup=-1)
    with pytest.raises(TypeError, match="on_spike"):
        reset_moments(optax.identity(), on_spike=3.0)
    tx = reset_moments(optax.identity())
    with pytest.raises(ValueError, match=r"^reset_moments .* params is None"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
