"""Adaptive clipping on streams of norms: what passes, what does not, how fast."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from benchmarks import behavior
from clipjax.thresholds import WindowedQuantile
from helpers import assert_same, normal, x64

DEFAULT = clipjax.adaptive_clip()
BOUNDED = clipjax.adaptive_clip(ratio=0.02)  # units first, by their parameters


@functools.cache
def feeding(tx):
    """The outgoing norms and the thresholds of a stream of incoming norms."""

    @jax.jit
    def feed(norms, size):
        params = {"w": jnp.array([0.6, 0.8]) * size}

        def step(state, norm):
            updates, state = tx.update({"w": params["w"] / size * norm}, state, params)
            return state, (jnp.sqrt(jnp.sum(updates["w"] ** 2)), state.clip.threshold)

        return jax.lax.scan(step, tx.init(params), norms)

    return feed


def fed(norms, *, tx=DEFAULT, param_norm=1e4):
    norms = jnp.asarray(norms, jnp.float32)
    state, (out, thresholds) = feeding(tx)(norms, jnp.float32(param_norm))
    return np.asarray(out), np.asarray(thresholds), state


def usual(count=300, *, level=1.0, seed=0):
    """Ordinary norms: lognormal, with a deviation of a tenth."""
    return level * np.exp(np.random.default_rng(seed).normal(0, 0.1, count))


def likely(norms):
    """The threshold by recent norms: max(m·min(r^1.8, (2.1/r)⁶), s), r = Q₀.₉/m."""
    middle, high = np.quantile(norms, [0.5, 0.9], method="nearest")
    ratio = high / middle
    times = min(ratio**1.8, (2.1 / ratio) ** 6)
    return max(middle * times, np.quantile(norms[-16:], 0.5, method="nearest"))


def reference(norms, *, first, factor=1.0, growth=5.0, window=128):
    """The rule in plain Python: outgoing norms and thresholds."""
    history, out, thresholds = [], [], []
    for norm in norms:
        recent = history[-window:]
        bound = factor * likely(recent) if recent else first
        most = bound if recent else min(bound, 0.01 * norm)
        thresholds.append(bound if np.isfinite(norm) else thresholds[-1])
        out.append(min(norm, most) if np.isfinite(norm) else 0.0)
        if np.isfinite(norm) and norm > 0:
            told = bound if recent else max(bound, norm / 1000)
            history.append(min(norm, growth * told))
    return np.array(out), np.array(thresholds)


def bounded(updates, params, *, ratio=0.02):
    """The units' rule in plain NumPy: what is left, before the history."""
    out = {}
    for path, update in updates.items():
        update, param = np.float64(update), np.float64(params[path])
        axes = (0,) if update.ndim > 1 else None
        own = np.sqrt((param**2).sum(axis=axes, keepdims=True))
        bound = ratio * np.maximum(own, 1e-3)
        size = np.sqrt((update**2).sum(axis=axes, keepdims=True))
        out[path] = update * np.minimum(1, bound / size)
    return out


ROUGH = usual(300, seed=7)
ROUGH[150:] *= 5
ROUGH[[50, 120, 121, 200]] = [1e3, 1e6, 40, 0]
ROUGH[[3, 90, 91, 250]] = [np.inf, np.nan, np.nan, np.inf]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 2.0, "growth": 3.0, "window": 20},
        {"window": 2},
    ],
)
def test_it_is_its_rule(options):
    tx = clipjax.adaptive_clip(start=1e-4, **options)
    out, thresholds, _ = fed(ROUGH, tx=tx)
    expected = reference(ROUGH, first=1.0, **options)
    np.testing.assert_allclose(out, expected[0], rtol=2e-5)
    np.testing.assert_allclose(thresholds, expected[1], rtol=2e-5)


# What is asked of it


@pytest.mark.parametrize("param_norm", [1e4, None])
def test_it_keeps_what_is_asked_whatever_the_parameters(param_norm):
    """Spikes, bursts, rises, falls and NaN, as `benchmarks.behavior` counts them."""
    figures = behavior.figures(DEFAULT, param_norm)
    for (column, asked), found in zip(behavior.COLUMNS.items(), figures, strict=True):
        most = float(asked.strip("≤ %")) / (100 if "%" in asked else 1)
        assert found <= most, f"{column}: {found}"


# Relative to the parameters


def test_units_are_bounded_by_their_parameters():
    shapes = {"dense/kernel": (6, 5), "dense/bias": (5,), "out/kernel": (5, 3)}
    params, updates = normal(shapes), normal(shapes, seed=1)
    params["dense/bias"] = jnp.zeros(5)
    params["out/kernel"] = params["out/kernel"] * jnp.array([[0.0, 1.0, 100.0]])
    tx = clipjax.adaptive_clip(start=1e6, ratio=0.02)
    update, expected = jax.jit(tx.update), bounded(updates, params)
    _, first = update(updates, tx.init(params), params)
    out, state = update(updates, first, params)
    for path in shapes:
        np.testing.assert_allclose(out[path], expected[path], rtol=2e-6)
    left = np.sqrt(sum((leaf**2).sum() for leaf in expected.values()))
    np.testing.assert_allclose(state.threshold_memory[1][""][0], left, rtol=1e-6)
    np.testing.assert_allclose(state.clip.norm, optax.tree.norm(updates), rtol=1e-6)
    np.testing.assert_allclose(state.clip.clipped_norm, left, rtol=1e-6)
    assert state.clip.clipped_steps == 2


def test_a_rise_never_leads_beyond_the_parameters():
    """A history alone would follow: with SGD, into divergence."""
    rise = np.geomspace(1e-3, 1e3, 300)
    out, _, _ = fed(rise, tx=BOUNDED, param_norm=10.0)
    assert out.max() <= 0.2 * (1 + 1e-6)
    alone, _, _ = fed(rise, param_norm=10.0)
    assert alone.max() > 100


def test_stacked_layers_are_apart():
    params = {"kernel": jnp.stack([normal((4, 3), seed=i) for i in range(3)])}
    updates = {"kernel": jnp.stack([normal((4, 3), seed=9 + i) for i in range(3)])}
    updates["kernel"] = updates["kernel"].at[1].multiply(1e3)
    tx = clipjax.adaptive_clip(start=1e6, ratio=0.02, stacked=0)
    update = jax.jit(tx.update)
    _, state = update(updates, tx.init(params), params)
    out, _ = update(updates, state, params)
    for layer, own, got in zip(
        *(t["kernel"] for t in (updates, params, out)), strict=True
    ):
        size, least = (np.linalg.norm(np.float64(x), axis=0) for x in (layer, own))
        bound = 0.02 * np.maximum(least, 1e-3)
        expected = np.asarray(layer) * np.minimum(1, bound / size)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


# What passes


def test_ordinary_steps_pass_bit_for_bit():
    norms = usual(600)
    out, thresholds, state = fed(norms)
    within = np.float32(norms) <= thresholds
    within[0] = False  # of which nothing is known
    assert (out[64:] < norms[64:] * (1 - 1e-6)).mean() < 0.05
    np.testing.assert_allclose(out[within], norms[within], rtol=3e-7)
    assert state.clip.clipped_steps == (~within).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_within_the_threshold_every_bit_passes(dtype):
    with x64(dtype == "float64"):
        params = {"w": jnp.full((50,), 1000, dtype)}
        updates = {"w": normal((50,), dtype=dtype) / jnp.asarray(8, dtype)}
        step = jax.jit(DEFAULT.update)
        _, state = step(updates, DEFAULT.init(params), params)
        for _ in range(3):
            passed, state = step(updates, state, params)
            assert_same(passed, updates, rtol=0)
        assert state.clip.clipped_steps == 1


def test_a_constant_norm_passes():
    out, thresholds, _ = fed(np.full(100, 3.0))
    np.testing.assert_array_equal(out[1:], 3)
    np.testing.assert_array_equal(thresholds[1:], 3)


def test_a_slow_fall_and_rise_pass():
    ramp = np.concatenate([np.geomspace(1, 0.01, 500), np.geomspace(0.01, 1, 500)])
    out, _, _ = fed(ramp)
    np.testing.assert_allclose(out[1:], ramp[1:], rtol=0.05)


# What does not


def test_one_spike_comes_out_at_the_usual_level():
    norms = usual()
    norms[200] = 1000
    out, _, state = fed(norms)
    assert out[200] < 1.3
    assert state.clip.nonfinite_steps == 0


@pytest.mark.parametrize("gap", [1, 2, 20])
def test_a_second_spike_is_caught_like_the_first(gap):
    """A statistic fed with raw norms would be blinded by the first."""
    norms = usual()
    norms[[200, 200 + gap]] = 1000, 10
    out, _, _ = fed(norms)
    assert out[200] < 1.3
    assert out[200 + gap] < 1.3


def test_five_spikes_in_a_row_are_caught():
    norms = usual()
    norms[200:205] = 1000
    out, thresholds, _ = fed(norms)
    assert out[200:205].max() < 1.5
    assert thresholds[206:].max() < 1.6  # and leave no trace


def test_spikes_now_and_then_are_caught():
    """One step in fifty, for long: fewer than the quantile leaves above it."""
    norms = usual(1000)
    norms[100::50] = 100
    out, _, _ = fed(norms)
    assert out[100::50].max() < 1.5


def test_a_spike_does_not_hide_what_follows():
    norms = usual()
    norms[200] = 1000
    out, _, _ = fed(norms)
    calm, _, _ = fed(np.delete(norms, 200))
    assert (np.abs(out[201:] / calm[200:] - 1) < 0.15).all()


# A lasting change


@pytest.mark.parametrize(("change", "patience"), [(2, 9), (3, 9), (10, 18), (100, 30)])
def test_a_lasting_rise_passes_soon(change, patience):
    """Rules fed with clipped norms never let go."""
    norms = np.concatenate([usual(200), usual(200, level=change, seed=1)])
    out, _, _ = fed(norms)
    passing = out[200:] >= 0.9 * norms[200:]
    assert passing[patience:].mean() > 0.9
    assert passing[patience + 40 :].mean() > 0.97
    assert not passing[0] or change < 1.5


def test_a_lasting_fall_is_followed():
    norms = np.concatenate([usual(200), usual(200, level=0.3, seed=1)])
    norms[300] = 3
    out, thresholds, _ = fed(norms)
    assert thresholds[-1] < 0.3 * 1.5
    assert out[300] < 0.3 * 1.5


def test_a_fall_does_not_make_the_next_rise_slower():
    falls = [usual(100), usual(100, level=1e-3, seed=1), usual(100, level=1, seed=2)]
    norms = np.concatenate(falls)
    out, _, _ = fed(norms)
    assert (out[245:] >= 0.85 * norms[245:]).mean() > 0.9


# The first steps


@pytest.mark.parametrize("norm", [1.0, 1e6, 1e30, 1e36])
@pytest.mark.parametrize("param_norm", [10.0, 1e4])
def test_the_first_step_is_held_back_and_the_next_ones_grow(norm, param_norm):
    """By the parameters, and to a hundredth of what it is."""
    out, thresholds, _ = fed([norm, norm], param_norm=param_norm)
    first = 0.01 * param_norm
    np.testing.assert_allclose(thresholds[0], first, rtol=1e-6)
    np.testing.assert_allclose(out[0], min(first, 0.01 * norm), rtol=1e-6)
    told = max(first, norm / 1000)
    np.testing.assert_allclose(thresholds[1], min(5 * told, norm), rtol=1e-6)


def test_parameters_at_zero_can_move():
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([3e-5, 4e-5])}
    tx = clipjax.adaptive_clip(start=0.5)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(params), params)
    assert_same(updates, {"w": jnp.array([3e-7, 4e-7])})
    assert_same(update(grads, state, params)[0], grads, rtol=0)


def test_without_parameters_the_first_step_is_a_hundredth():
    tx = clipjax.adaptive_clip()
    updates = {"w": jnp.array([3e6, 4e6])}
    passed, state = tx.update(updates, tx.init(updates))
    assert_same(passed, {"w": jnp.array([3e4, 4e4])})
    again, _ = tx.update({"w": jnp.array([3e9, 4e9])}, state)
    assert_same(again, updates)


@pytest.mark.parametrize(
    ("level", "patience"), [(1e-6, 5), (1.0, 10), (1e3, 20), (1e5, 20)]
)
def test_any_scale_is_found(level, patience):
    out, _, _ = fed(usual(100, level=level), param_norm=10.0)
    norms = usual(100, level=level)
    assert (out[patience:] >= 0.9 * norms[patience:]).mean() > 0.8


def test_a_bad_first_step_is_forgotten():
    norms = usual(200)
    norms[0] = 1e6
    out, _, _ = fed(norms, param_norm=50.0)
    assert out[0] == pytest.approx(0.5)
    assert (out[20:] >= 0.9 * norms[20:]).mean() > 0.9


# Steps that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_becomes_zero_and_is_not_remembered(bad):
    params, updates = normal({"a": (3,), "b": (2, 2)}), normal({"a": (3,), "b": (2, 2)})
    step = jax.jit(DEFAULT.update)
    _, state = step(updates, DEFAULT.init(params), params)
    broken = updates | {"a": updates["a"].at[1].set(bad)}
    out, after = step(broken, state, params)
    assert_same(out, jax.tree.map(jnp.zeros_like, updates), rtol=0)
    assert_same(after.threshold_memory[0][""], state.threshold_memory[0][""], rtol=0)
    clip = state.clip._replace(step=jnp.int32(2), nonfinite_steps=jnp.int32(1))
    assert_same(after.clip, clip, rtol=0)


def test_half_of_all_steps_may_be_broken():
    norms = usual(400)
    norms[::2] = np.nan
    out, _, state = fed(norms)
    np.testing.assert_array_equal(out[::2], 0)
    assert (out[101::2] >= 0.9 * norms[101::2]).mean() > 0.9
    assert state.clip.nonfinite_steps == 200


def test_zeros_pass_and_are_not_remembered():
    norms = usual(300)
    norms[100:200] = 0
    out, thresholds, _ = fed(norms)
    np.testing.assert_array_equal(out[100:200], 0)
    np.testing.assert_allclose(thresholds[100:200], thresholds[100], rtol=1e-6)
    assert (out[200:] >= 0.85 * norms[200:]).mean() > 0.9


def test_nothing_but_zeros():
    out, _, state = fed(np.zeros(10))
    np.testing.assert_array_equal(out, 0)
    assert (state.threshold_memory[0][""] == -1).all()


# The rule by itself

ZERO = jnp.float32(0)


def remembered(rule, norms, threshold=jnp.inf):
    """The memory after these norms."""
    memory = rule.empty(ZERO)
    for norm in norms:
        norm, bound = jnp.float32(norm), jnp.float32(threshold)
        memory = rule.remember(memory, norm, bound, jnp.minimum(norm, bound))
    return memory


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("known", [1, 2, 7, 16])
def test_the_threshold_is_a_quantile_of_what_is_known(quantile, known):
    rule = WindowedQuantile(quantile=quantile, factor=2.0, window=16)
    norms = np.random.default_rng(known).lognormal(size=known).astype(np.float32)
    actual = jax.jit(rule.threshold)(remembered(rule, norms), ZERO)
    np.testing.assert_allclose(actual, 2 * np.quantile(norms, quantile), rtol=2e-6)


def test_an_empty_history_sets_no_threshold():
    rule = WindowedQuantile()
    assert rule.threshold(rule.empty(ZERO), ZERO) == jnp.inf


def test_the_oldest_norm_is_forgotten():
    rule = WindowedQuantile(window=3)
    history = remembered(rule, [1.0, 2.0, 3.0, 4.0], 100.0)
    assert_same(history, jnp.array([4.0, 3.0, 2.0]), rtol=0)


@pytest.mark.parametrize("norm", [0.0, np.nan, np.inf])
def test_what_tells_nothing_is_not_remembered(norm):
    tx = clipjax.clip_by(WindowedQuantile(window=3))
    params = {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params))
    _, after = tx.update({"w": jnp.array([norm, 0.0])}, state)
    assert_same(after.threshold_memory, state.threshold_memory, rtol=0)


# In a chain


def test_training_survives_what_breaks_it_otherwise():
    """Least squares, one gradient in twenty a thousand times too large."""
    truth = normal((8,), seed=1)

    def error(tx):
        @jax.jit
        def step(carry, key):
            w, state = carry
            x = jax.random.normal(key, (16, 8))
            slope = x.T @ (x @ (w - truth)) / 16
            broken = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.05)
            slope = jnp.where(broken, 1000 * slope, slope)
            updates, state = tx.update(slope, state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.full(8, 5.0)
        keys = jax.random.split(jax.random.key(0), 400)
        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), keys)
        return float(jnp.max(jnp.abs(w - truth)))

    assert error(optax.chain(DEFAULT, optax.scale(-0.1))) < 0.02
    # Within the bounds of the parameters it takes longer, and stays.
    assert error(optax.chain(BOUNDED, optax.scale(-1.0))) < 0.2
    assert not error(optax.scale(-0.1)) < 1e3
