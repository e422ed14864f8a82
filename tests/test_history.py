"""Clips by the norms of the past: each paper's formula, as a plain loop in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import contrib, thresholds
from helpers import assert_same, normal

SHAPES = {"a": {"kernel": (3, 2)}, "b": {"bias": (3,), "scale": ()}}
STEPS = 150


def stream(seed=0):
    """Normal updates whose level drifts, with spikes in single leaves and in all."""
    rng = np.random.default_rng(seed)
    level = 0.3 * np.exp(np.cumsum(rng.normal(0, 0.05, STEPS)))
    factors = np.ones((STEPS, 3))
    for step in (30, 31, 60, 90, 125):
        factors[step] *= 10 ** rng.uniform(0.5, 3)
    for step, leaf in [(45, 0), (75, 1), (100, 2), (101, 2)]:
        factors[step, leaf] = 50

    def one(i, shape):
        x = rng.normal(size=(STEPS, *shape)) + 0.2
        return jnp.asarray(x * expand(level * factors[:, i], x), jnp.float32)

    return {
        "a": {"kernel": one(0, (3, 2))},
        "b": {"bias": one(1, (3,)), "scale": one(2, ())},
    }


def expand(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


@functools.cache
def run(make):
    """All outgoing updates of a compiled scan, and the incoming ones in float64."""
    tx, updates = make(), stream()

    def body(state, incoming):
        outgoing, state = tx.update(incoming, state)
        return state, outgoing

    start = tx.init(jax.tree.map(lambda x: x[0], updates))
    state, outgoing = jax.jit(lambda u: jax.lax.scan(body, start, u))(updates)
    return leaves_of(updates), leaves_of(outgoing), state


def leaves_of(tree):
    """Kernel, bias, scale."""
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def norm(leaves):
    return math.sqrt(sum(np.sum(x**2) for x in leaves))


def down(n, t):
    return t / n if n > t else 1.0


# The papers' formulas: from a list of leaves to one, step by step


class AutoClip:
    """Append the norm to the history, then its percentile."""

    def __init__(self, quantile):
        self.quantile, self.norms = quantile, []

    def __call__(self, leaves):
        self.norms.append(norm(leaves))
        factor = down(self.norms[-1], np.quantile(self.norms, self.quantile))
        return [x * factor for x in leaves]


class Percentile:
    """A ring of each leaf's norms; the quantile of what is there."""

    def __init__(self, quantile, window):
        self.quantile, self.window, self.rings = quantile, window, [[], [], []]

    def __call__(self, leaves):
        out = []
        for x, ring in zip(leaves, self.rings, strict=True):
            ring.append(norm([x]))
            del ring[: -self.window]
            out.append(x * down(ring[-1], np.quantile(ring, self.quantile)))
        return out


class Tracker:
    """C ← C·exp(-η·(b - γ)), b whether the norm was below."""

    def __init__(self, quantile, rate, start):
        self.quantile, self.rate, self.bound = quantile, rate, start

    def __call__(self, leaves):
        n, bound = norm(leaves), self.bound
        self.bound *= math.exp(-self.rate * ((n <= bound) - self.quantile))
        return [x * down(n, bound) for x in leaves]


class ZClip:
    """Warm-up on raw norms, then z-scores; the average is fed what was clipped to."""

    def __init__(self, target, skip=False, warmup=25, limit=2.5, decay=0.97, c=1.0):
        self.target, self.skip, self.warmup, self.limit = target, skip, warmup, limit
        self.decay, self.c, self.buffer = decay, c, []
        self.mean = self.variance = 0.0

    def __call__(self, leaves):
        n = norm(leaves)
        if len(self.buffer) < self.warmup:
            self.buffer.append(n)
            self.mean, self.variance = np.mean(self.buffer), np.var(self.buffer)
            return [x * (1 if self.skip else down(n, self.c)) for x in leaves]
        sigma = math.sqrt(self.variance)
        z = (n - self.mean) / (sigma + 1e-6)
        is_spike, bound = z > self.limit, n
        if is_spike:
            bound = {
                "reciprocal": self.mean + self.limit * sigma * self.limit / z,
                "mean": self.mean,
                "limit": self.mean + self.limit * sigma,
            }[self.target]
        d = self.decay
        self.mean = d * self.mean + (1 - d) * bound
        self.variance = d * self.variance + (1 - d) * (bound - self.mean) ** 2
        if self.skip:
            return [x * (not is_spike) for x in leaves]
        return [x * down(n, min(bound, self.c)) for x in leaves]


class AdaGC:
    """A global clip while γ is the least norm; then each leaf to λ·γ."""

    def __init__(self, factor=1.05, decay=0.98, c=1.0, warmup=100):
        self.factor, self.decay, self.c, self.warmup = factor, decay, c, warmup
        self.step, self.gammas = 0, [math.inf] * 3

    def __call__(self, leaves):
        self.step += 1
        if self.step <= self.warmup:
            factor = down(norm(leaves), self.c)
            out = [x * factor for x in leaves]
            pairs = zip(self.gammas, out, strict=True)
            self.gammas = [min(gamma, norm([x])) for gamma, x in pairs]
            return out
        out = []
        for i, x in enumerate(leaves):
            out.append(x * down(norm([x]), self.factor * self.gammas[i]))
            moved = self.decay * self.gammas[i] + (1 - self.decay) * norm([out[-1]])
            self.gammas[i] = moved
        return out


class AGGC:
    """A band round each group's average of what came out, which starts at zero."""

    def __init__(self, low=0.65, high=0.965, decay=0.97, least=0.9, most=1.0):
        self.low, self.high, self.decay = low, high, decay
        self.least, self.most, self.averages = least, most, [0.0, 0.0]

    def __call__(self, leaves):
        out = []
        for i, group in enumerate([leaves[:1], leaves[1:]]):
            n, average = norm(group), self.averages[i]
            goal = min(max(n, self.low * average), self.high * average)
            factor = min(max(goal / n, self.least), self.most)
            out += [x * factor for x in group]
            self.averages[i] = self.decay * average + (1 - self.decay) * factor * n
        return out


class MovingSigma:
    """Mean and deviation of a ring of raw norms, the present one not among them."""

    def __init__(self, deviations, window, warmup):
        self.deviations, self.window, self.warmup = deviations, window, warmup
        self.ring = []

    def __call__(self, leaves):
        n, bound = norm(leaves), math.inf
        if len(self.ring) >= self.warmup:
            spread = max(np.std(self.ring), 1e-6)
            bound = np.mean(self.ring) + self.deviations * spread
        self.ring = [*self.ring, n][-self.window :]
        return [x * down(n, bound) for x in leaves]


class SPAM:
    """Where g² > θ·v: g ← sign(g)·√(θ·v), v the average before."""

    def __init__(self, factor, decay, warmup):
        self.factor, self.decay, self.warmup = factor, decay, warmup
        self.step, self.squares = 0, [0.0] * 3

    def __call__(self, leaves):
        out = []
        for i, x in enumerate(leaves):
            v = self.squares[i]
            if self.step >= self.warmup:
                limit = np.sqrt(self.factor * v)
                x = np.where(x**2 > self.factor * v, np.sign(x) * limit, x)
            self.squares[i] = self.decay * v + (1 - self.decay) * x**2
            out.append(x)
        self.step += 1
        return out


class StableSPAM:
    """M̂ the debiased average of max|g|; where |g| > M̂: g ← g·M̂/M."""

    def __init__(self, decay=0.999):
        self.decay, self.step, self.peaks = decay, 0, [0.0] * 3

    def __call__(self, leaves):
        self.step += 1
        out = []
        for i, x in enumerate(leaves):
            peak = np.max(np.abs(x))
            self.peaks[i] = self.decay * self.peaks[i] + (1 - self.decay) * peak
            bound = self.peaks[i] / (1 - self.decay**self.step)
            out.append(np.where(np.abs(x) > bound, x * bound / peak, x))
        return out


class Stabilizer:
    """g/n · m̂/(√v̂ + 10⁻⁸), averages of n and n²."""

    def __init__(self, first=0.7, second=0.9):
        self.first, self.second, self.step = first, second, 0
        self.means, self.squares = [0.0] * 3, [0.0] * 3

    def __call__(self, leaves):
        self.step += 1
        out = []
        for i, x in enumerate(leaves):
            n, a, b = norm([x]), self.first, self.second
            self.means[i] = a * self.means[i] + (1 - a) * n
            self.squares[i] = b * self.squares[i] + (1 - b) * n**2
            mean = self.means[i] / (1 - a**self.step)
            square = self.squares[i] / (1 - b**self.step)
            out.append(x / n * mean / (math.sqrt(square) + 1e-8))
        return out


def label(path, leaf):
    return path.split("/")[0]


METHODS = {  # ours, and the paper's
    "autoclip": (lambda: contrib.autoclip(window=STEPS), lambda: AutoClip(0.1)),
    "autoclip_90": (
        lambda: contrib.autoclip(0.9, window=STEPS),
        lambda: AutoClip(0.9),
    ),
    "clip_by_percentile": (
        lambda: contrib.clip_by_percentile(0.3, window=40),
        lambda: Percentile(0.3, 40),
    ),
    "quantile_clip": (
        lambda: contrib.quantile_clip(0.6),
        lambda: Tracker(0.6, 0.2, 1.0),
    ),
    "zclip": (lambda: contrib.zclip(max_norm=1.0), lambda: ZClip("reciprocal")),
    "zclip_free": (
        lambda: contrib.zclip(),
        lambda: ZClip("reciprocal", c=math.inf),
    ),
    "zclip_mean": (
        lambda: contrib.zclip(target=thresholds.at_mean),
        lambda: ZClip("mean", c=math.inf),
    ),
    "zclip_limit": (
        lambda: contrib.zclip(target=thresholds.at_limit),
        lambda: ZClip("limit", c=math.inf),
    ),
    "zclip_skip": (
        lambda: contrib.zclip(skip=True),
        lambda: ZClip("reciprocal", skip=True),
    ),
    "adagc": (lambda: contrib.adagc(), lambda: AdaGC()),
    "adagc_early": (
        lambda: contrib.adagc(1.3, decay=0.9, warmup=10),
        lambda: AdaGC(1.3, 0.9, 1.0, 10),
    ),
    "aggc": (lambda: contrib.aggc(label), lambda: AGGC()),
    "aggc_raises": (
        lambda: contrib.aggc(label, high=1.2, most=1.1),
        lambda: AGGC(high=1.2, most=1.1),
    ),
    "clip_by_moving_sigma": (
        lambda: contrib.clip_by_moving_sigma(2.0, window=32, warmup=16),
        lambda: MovingSigma(2.0, 32, 16),
    ),
    "spam_clip": (
        lambda: contrib.spam_clip(50.0, decay=0.95),
        lambda: SPAM(50.0, 0.95, 20),
    ),
    "spam_clip_default": (
        lambda: contrib.spam_clip(),
        lambda: SPAM(5000.0, 0.999, 20),
    ),
    "stable_spam_clip": (
        lambda: contrib.stable_spam_clip(),
        lambda: StableSPAM(),
    ),
    "gradient_stabilizer": (
        lambda: contrib.gradient_stabilizer(),
        lambda: Stabilizer(),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_papers_formula(name):
    ours, theirs = METHODS[name]
    incoming, outgoing, _ = run(ours)
    formula, touched = theirs(), 0
    for step in range(STEPS):
        leaves = [x[step] for x in incoming]
        expected = formula(leaves)
        touched += any(np.any(x != y) for x, y in zip(leaves, expected, strict=True))
        for x, y in zip(outgoing, expected, strict=True):
            np.testing.assert_allclose(x[step], y, rtol=1e-4, err_msg=f"step {step}")
    assert touched >= 3


# One step after the other, by norm alone


@functools.cache
def compiled(make):
    tx = make()
    return tx, jax.jit(tx.update)


def outgoing_norms(make, incoming, dtype="float32"):
    """What comes out of a stream of norms, of one entry each."""
    tx = make()

    def body(state, size):
        out, state = tx.update({"w": size[None]}, state)
        return state, out["w"][0]

    start = tx.init({"w": jnp.zeros(1, dtype)})
    sizes = jnp.asarray(incoming, dtype)
    out = jax.jit(lambda x: jax.lax.scan(body, start, x)[1])(sizes)
    return np.asarray(out, np.float64)


def usual(steps, seed=0, level=1.0):
    return level * np.exp(np.random.default_rng(seed).normal(0, 0.1, steps))


# What public implementations got wrong


@pytest.mark.parametrize("name", ["spam_clip_default", "stable_spam_clip"])
def test_spikes_of_single_entries_are_clipped(name):
    """One port writes to `grad[mask]`, a copy: nothing is clipped."""
    tx, update = compiled(METHODS[name][0])
    usual = {"w": jnp.array([1.0, -1.0, 1.0, -1.0])}
    state = tx.init(usual)
    for _ in range(25):
        _, state = update(usual, state)
    out, _ = update({"w": jnp.array([1.0, -1e5, 1.0, -1.0])}, state)
    expected = math.sqrt(5000 * (1 - 0.999**25))
    if name == "stable_spam_clip":
        expected = (1e5 * 0.001 + 1 - 0.999**25 - 0.001) / (1 - 0.999**26)
        expected = out["w"][1] * -1 if expected > 1e5 else expected
    np.testing.assert_allclose(out["w"], [1, -expected, 1, -1], rtol=1e-3)
    assert abs(out["w"][1]) < 1e4


def test_adagc_warms_up_with_the_norm_and_not_its_square():
    """One port leaves out the root: an update of norm 4 came out at 1/4."""
    updates = {"w": jnp.array([4.0])}
    tx = contrib.adagc()
    assert_same(tx.update(updates, tx.init(updates))[0], {"w": jnp.array([1.0])})
    small = {"w": jnp.array([0.5])}
    assert_same(tx.update(small, tx.init(small))[0], small, rtol=0)


CLIPS = [n for n in METHODS if n not in ("gradient_stabilizer", "aggc_raises")]


@pytest.mark.parametrize("name", CLIPS)
def test_no_entry_is_ever_scaled_up(name):
    """One port forgets the minimum with one."""
    incoming, outgoing, _ = run(METHODS[name][0])
    for x, y in zip(incoming, outgoing, strict=True):
        assert (np.abs(y) <= np.abs(x)).all()


def test_the_threshold_of_stable_spam_is_debiased_by_its_own_steps():
    """One implementation counts anew after each reset: 500 times the threshold."""
    steps = 700
    out = outgoing_norms(contrib.stable_spam_clip, [*[1.0] * steps, 1e3])
    np.testing.assert_allclose(out[:-1], 1, rtol=1e-4)
    total = 1 - 0.999 ** (steps + 1)
    expected = (0.999 * (1 - 0.999**steps) + 0.001 * 1e3) / total
    np.testing.assert_allclose(out[-1], expected, rtol=1e-4)
    assert expected < 4


def test_autoclip_clips_the_whole_and_not_every_leaf():
    """One port clips every leaf to the threshold of the whole."""
    tx, update = compiled(METHODS["autoclip_90"][0])
    even = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    state = tx.init(even)
    for _ in range(9):
        _, state = update(even, state)
    out, _ = update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, state)
    bound = np.quantile([5.0] * 9 + [50.0], 0.9)
    expected = {"a": jnp.array([0.6 * bound]), "b": jnp.array([0.8 * bound])}
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), expected)
    assert_same(out, expected, rtol=1e-5)


def test_percentile_clipping_does_not_begin_with_zeros():
    """A ring of zeros gives a threshold of zero for 94 steps."""
    sizes = usual(100)
    out = outgoing_norms(contrib.clip_by_percentile, sizes)
    assert out[0] == np.float32(sizes[0])
    assert (out > 0.5 * sizes).all()


def test_zclip_measures_in_float32_whatever_the_dtype():
    """In bfloat16, a sum of squares stands still."""
    updates = {"w": jnp.ones(10_000, jnp.bfloat16)}
    tx = contrib.zclip(max_norm=1.0)
    out, state = jax.jit(tx.update)(updates, tx.init(updates))
    assert out["w"].dtype == jnp.bfloat16
    assert state.clip.norm == 100
    rest = jax.tree.leaves(state.threshold_memory)
    assert {x.dtype.name for x in rest} == {"float32", "int32"}
    np.testing.assert_allclose(out["w"][0].astype(jnp.float32), 0.01, rtol=2**-8)


def test_zclip_never_releases_a_rise_but_at_the_limit_it_does():
    sizes = np.concatenate([usual(100), usual(500, seed=1, level=3.0)])
    locked = outgoing_norms(lambda: contrib.zclip(), sizes)
    free = outgoing_norms(
        lambda: contrib.zclip(max_norm=math.inf, target=thresholds.at_limit),
        sizes,
    )
    assert locked[-100:].max() < 1.5
    assert (free[-100:] >= 0.9 * sizes[-100:]).mean() > 0.9
    shift = next(i for i in range(500) if free[100 + i] >= 0.9 * sizes[100 + i])
    assert shift < 30


# As their docstrings say


def test_how_spikes_fare():
    calm = usual(120)
    spike = np.append(calm, 1000.0)

    def last(make):
        return outgoing_norms(make, spike)[-1]

    assert 0.8 < last(lambda: contrib.autoclip(window=STEPS)) < 1
    assert last(contrib.clip_by_percentile) < 1
    assert 0.5 < last(contrib.quantile_clip) < 2
    assert last(lambda: contrib.zclip()) < 1.1
    assert last(lambda: contrib.zclip(skip=True)) == 0
    assert last(lambda: contrib.adagc(max_norm=10.0)) < 1.2
    assert last(lambda: contrib.aggc(label)) == pytest.approx(900)
    assert 1 < last(contrib.clip_by_moving_sigma) < 1.6
    assert last(contrib.gradient_stabilizer) < 0.955


def test_a_moving_sigma_misses_the_second_spike():
    sizes = np.append(usual(100), [1000.0, *usual(20, seed=1), 10.0])
    out = outgoing_norms(contrib.clip_by_moving_sigma, sizes)
    assert out[100] < 1.6
    assert out[-1] == 10


def test_quantile_clip_follows_a_change_of_level():
    """A rise by f within ln f / (η·q) steps, a fall within ln f / (η·(1-q))."""
    q, quiet = 0.75, np.full(100, 1.0)
    for factor, speed in [(20.0, q), (0.05, 1 - q)]:
        steps = math.ceil(abs(math.log(factor)) / (0.2 * speed)) + 3
        new = np.full(steps, factor)
        sizes = np.concatenate([quiet, new, [1e3 * factor]])
        out = outgoing_norms(lambda: contrib.quantile_clip(q), sizes)
        assert out[-2] == pytest.approx(factor)
        assert out[-1] < 1.3 * factor


def test_gradient_stabilizer_knows_no_scale():
    sizes = usual(60)
    low, high = (
        outgoing_norms(contrib.gradient_stabilizer, sizes * s) for s in (1e-3, 1e3)
    )
    np.testing.assert_allclose(low, high, rtol=1e-4)
    np.testing.assert_allclose(low, 1, atol=0.1)


# What is not remembered


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_not_finite_leaves_the_memory_as_it_was(name):
    tx, update = compiled(METHODS[name][0])
    state = tx.init(normal(SHAPES))
    for seed in range(3):
        _, state = update(normal(SHAPES, seed=seed), state)
    for bad in (np.nan, np.inf, -np.inf):
        updates = normal(SHAPES, seed=9)
        updates["a"]["kernel"] = updates["a"]["kernel"].at[1, 0].set(bad)
        _, after = update(updates, state)
        assert_same(after.threshold_memory, state.threshold_memory, rtol=0)
        assert after.clip.nonfinite_steps == state.clip.nonfinite_steps + 1
        everything = jax.tree.map(lambda x, b=bad: jnp.full_like(x, b), updates)
        _, after = update(everything, state)
        assert_same(after.threshold_memory, state.threshold_memory, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_not_remembered(name):
    tx, update = compiled(METHODS[name][0])
    updates = normal(SHAPES)
    _, state = update(updates, tx.init(updates))
    zeros = jax.tree.map(jnp.zeros_like, updates)
    out, after = update(zeros, state)
    assert_same(out, zeros, rtol=0)
    assert_same(after.threshold_memory, state.threshold_memory, rtol=0)


def test_adagc_is_never_without_a_bound():
    """Steps that are not finite must not use up its warm-up."""
    tx, update = compiled(lambda: contrib.adagc(warmup=3))
    state = tx.init({"w": jnp.zeros(1)})
    for size in [0.5, np.nan, np.inf, 0.5, 0.5]:
        _, state = update({"w": jnp.array([size])}, state)
    out, _ = update({"w": jnp.array([1e6])}, state)
    assert_same(out, {"w": jnp.array([0.5 * 1.05])})


def test_what_cannot_be_right_is_refused():
    for error, message, make in [
        (ValueError, "quantile must lie", lambda: contrib.autoclip(1.5)),
        (
            ValueError,
            "window must be at least 2",
            lambda: contrib.autoclip(window=1),
        ),
        (
            ValueError,
            "quantile must lie",
            lambda: contrib.clip_by_percentile(-0.1),
        ),
        (
            ValueError,
            "rate must be pos",
            lambda: contrib.quantile_clip(rate=0.0),
        ),
        (
            ValueError,
            "start must be pos",
            lambda: contrib.quantile_clip(start=0.0),
        ),
        (ValueError, "deviations must be pos", lambda: contrib.zclip(0.0)),
        (
            ValueError,
            "max_norm must be pos",
            lambda: contrib.zclip(max_norm=0.0),
        ),
        (
            ValueError,
            "warmup must be at least 1",
            lambda: contrib.zclip(warmup=0),
        ),
        (ValueError, "factor must be pos", lambda: contrib.adagc(0.0)),
        (
            ValueError,
            "max_norm must be pos",
            lambda: contrib.adagc(max_norm=-1.0),
        ),
        (
            ValueError,
            "warmup must be at least 1",
            lambda: contrib.adagc(warmup=0),
        ),
        (
            ValueError,
            "decay must be at least 0",
            lambda: contrib.adagc(decay=1.5),
        ),
        (ValueError, "least must lie", lambda: contrib.aggc(label, least=2.0)),
        (
            ValueError,
            "most must be at least",
            lambda: contrib.aggc(label, most=0.5),
        ),
        (
            ValueError,
            "warmup must lie between 2 and 8",
            lambda: contrib.clip_by_moving_sigma(window=8, warmup=9),
        ),
        (ValueError, "factor must be pos", lambda: contrib.spam_clip(-1.0)),
        (
            ValueError,
            "decay must be at least 0",
            lambda: contrib.stable_spam_clip(1.1),
        ),
        (
            ValueError,
            "mean_decay must",
            lambda: contrib.gradient_stabilizer(-0.1),
        ),
    ]:
        with pytest.raises(error, match=message):
            make()


def test_an_entry_that_wakes_late_may_move():
    """An embedding row that was not used while the mean square warmed up."""
    tx = contrib.spam_clip(warmup=2)
    state = tx.init({"w": jnp.zeros(2)})
    for _ in range(4):
        _, state = tx.update({"w": jnp.array([1.0, 0.0])}, state)
    out, state = tx.update({"w": jnp.array([1.0, 1.0])}, state)
    np.testing.assert_array_equal(out["w"], [1.0, 1.0])
    assert state.threshold_memory[0]["w"].norm_variance[1] > 0


# Rules without a paper: the running minimum, and the release of others


class Minimum:
    """A multiple of the least norm so far, which grows by a share where it is above."""

    def __init__(self, factor, rise):
        self.factor, self.rise, self.least = factor, rise, None

    def threshold(self, n):
        return math.inf if self.least is None else self.factor * self.least

    def remember(self, n, bound):
        if self.least is None:
            self.least = n
        self.least = min(n, self.least * (1 + self.rise))


class Mean:
    """A multiple of a moving mean of clipped norms, which begins as the first one."""

    def __init__(self, factor, decay):
        self.factor, self.decay, self.mean = factor, decay, None

    def threshold(self, n):
        return math.inf if self.mean is None else self.factor * self.mean

    def remember(self, n, bound):
        fed = min(n, bound)
        old = fed if self.mean is None else self.mean
        self.mean = self.decay * old + (1 - self.decay) * fed


class Release:
    """T = s·T'(n/s), and s grows where more than so many in a row were above T."""

    def __init__(self, rule, patience, growth):
        self.rule, self.patience, self.growth = rule, patience, growth
        self.scale, self.above = 1.0, 0

    def threshold(self, n):
        return self.scale * self.rule.threshold(n / self.scale)

    def remember(self, n, bound):
        self.rule.remember(n / self.scale, bound / self.scale)
        self.above = self.above + 1 if n > bound else 0
        if self.above > self.patience:
            self.scale *= self.growth


class Clip:
    """The global norm, by one of these rules."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, leaves):
        n = norm(leaves)
        bound = self.rule.threshold(n)
        self.rule.remember(n, bound)
        return [x * down(n, bound) for x in leaves]


RULES = {
    "minimum": (
        lambda: thresholds.RunningMinimum(1.5, 0.01),
        lambda: Minimum(1.5, 0.01),
    ),
    "minimum that stays": (
        lambda: thresholds.RunningMinimum(3.0),
        lambda: Minimum(3.0, 0.0),
    ),
    "released mean": (
        lambda: thresholds.Released(
            thresholds.MovingMean(1.1, 0.9, warmup=1), patience=3, growth=1.3
        ),
        lambda: Release(Mean(1.1, 0.9), 3, 1.3),
    ),
    "released minimum": (
        lambda: thresholds.Released(
            thresholds.RunningMinimum(1.1), patience=2, growth=2.0
        ),
        lambda: Release(Minimum(1.1, 0.0), 2, 2.0),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_its_formula(name):
    make, reference = RULES[name]
    incoming, actual, _ = run(lambda: clipjax.clip_by(make()))
    expected = Clip(reference())
    touched = 0
    for step in range(STEPS):
        came = [x[step] for x in incoming]
        out = expected(came)
        touched += any((x != y).any() for x, y in zip(came, out, strict=True))
        for x, y in zip(actual, out, strict=True):
            np.testing.assert_allclose(x[step], y, rtol=2e-4, atol=1e-7)
    assert 10 < touched < STEPS - 10


def norms_through(rule, norms):
    """What comes out of each of these norms."""
    tx = clipjax.clip_by(rule)

    def body(state, n):
        out, state = tx.update({"w": n[None]}, state)
        return state, out["w"][0]

    start = tx.init({"w": jnp.zeros(1)})
    state, out = jax.jit(lambda x: jax.lax.scan(body, start, x))(jnp.asarray(norms))
    return out, state


@pytest.mark.parametrize("rise", [3.0, 10.0])
def test_a_released_threshold_follows_a_lasting_rise(rise):
    """As a moving z-score of what it clipped never does by itself."""
    inside = thresholds.MovingDeviation(warmup=20)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, 400))
    level = np.where(np.arange(400) < 100, 1.0, rise)
    stream = np.float32(noise * level)
    kept, _ = norms_through(inside, stream)
    assert (kept[300:] < 0.7 * stream[300:]).mean() > 0.9
    rule = thresholds.Released(inside, patience=10, growth=1.5)
    out, _ = norms_through(rule, stream)
    soon = 100 + 10 + math.ceil(math.log(rise) / math.log(1.5)) + 1
    assert (out[soon:] > 0.9 * stream[soon:]).mean() > 0.9


@pytest.mark.parametrize("rule", ["MovingDeviation", "WindowedDeviation"])
@pytest.mark.parametrize("size", [1e-10, 0.1, 1e10])
def test_constant_norms_have_a_deviation_that_is_a_number(rule, size):
    """No variance comes out below zero, or its root would lock the threshold."""
    make = functools.partial(getattr(thresholds, rule), warmup=2)
    out, state = norms_through(make(), np.full(300, size, np.float32))
    np.testing.assert_array_equal(out, np.float32(size))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_few_spikes_release_nothing():
    rule = thresholds.Released(thresholds.MovingMean(1.5, warmup=1), patience=5)
    stream = np.ones(60, np.float32)
    stream[20:25] = 100
    out, state = norms_through(rule, stream)
    assert out.max() < 1.7
    assert state.threshold_memory[0][""].released_scale == 1


def test_a_release_may_be_scheduled_traced_and_part_of_others():
    def rule(growth):
        mean = thresholds.MovingMean(lambda step: 1.1, warmup=1)
        return thresholds.Lowest((thresholds.Released(mean, 2, growth), 50.0))

    stream = np.float32([1.0] * 3 + [100.0] * 12)
    outs = [norms_through(rule(g), stream)[0] for g in (1.5, lambda step: 1.5)]
    np.testing.assert_array_equal(*outs)
    traced = jax.vmap(lambda g: norms_through(rule(g), stream)[1].clip.clipped_norm)
    np.testing.assert_allclose(traced(jnp.array([1.5, 4.0]))[1], 50, rtol=1e-6)


def test_a_release_of_each_leaf_is_its_own():
    tx = clipjax.clip_by(
        clipjax.Bound(
            thresholds.Released(thresholds.RunningMinimum(1.5), patience=1, growth=4.0),
            scope=clipjax.scopes.Unit(axis=0),
        )
    )
    update, state = jax.jit(tx.update), tx.init({"w": jnp.ones((2, 3))})
    for step in range(4):
        high = [1.0, 1.0 if step == 0 else 9.0, 1.0]
        if step == 2:
            high[0] = np.nan  # of such a step nothing is remembered
        _, state = update({"w": jnp.tile(jnp.array([high]), (2, 1))}, state)
    memory = state.threshold_memory[0]["w"]
    np.testing.assert_array_equal(memory.released_scale, [[1, 4, 1]])
    np.testing.assert_array_equal(memory.above_in_row, [[0, 2, 0]])
    assert jnp.isfinite(memory.released_memory).all()


@pytest.mark.parametrize("name", RULES)
def test_memories_may_be_donated(name):
    tx = clipjax.clip_by(RULES[name][0]())
    updates = {"w": jnp.ones(2)}
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(updates, tx.init(updates))
    update(updates, state)


def test_a_release_that_cannot_be_right_is_refused():
    mean = thresholds.MovingMean()
    with pytest.raises(TypeError, match="rule must be a value with a method"):
        thresholds.Released(thresholds.MovingMean)
    with pytest.raises(ValueError, match="growth must be above 1"):
        thresholds.Released(mean, growth=1.0)
    with pytest.raises(ValueError, match="patience must not be negative"):
        thresholds.Released(mean, patience=-1)
    with pytest.raises(ValueError, match="factor must be positive"):
        thresholds.RunningMinimum(0.0)
    with pytest.raises(ValueError, match="rise must not be negative"):
        thresholds.RunningMinimum(rise=-1.0)
