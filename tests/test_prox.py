"""Proximal operators: what their definitions say, exactly zero, in every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import contrib, prox
from helpers import x64

STEPS = (0.0, 0.3, 1.0, 2.5, 6.0)
# Beside the operator, the penalty in plain NumPy: of entries, then of a group.
ENTRYWISE = {
    "l1": (prox.L1(0.7), lambda z: 0.7 * np.abs(z)),
    "elastic_net": (
        prox.ElasticNet(0.7, ridge=0.4),
        lambda z: 0.7 * np.abs(z) + 0.2 * z**2,
    ),
    "l0": (prox.L0(0.7), lambda z: 0.7 * (z != 0)),
    "mcp": (
        prox.MCP(0.7, gamma=2.0),
        lambda z: np.where(np.abs(z) <= 1.4, 0.7 * np.abs(z) - z**2 / 4, 0.49),
    ),
    "scad": (prox.SCAD(0.7, a=3.0), lambda z: scad(np.abs(z), 0.7, 3.0)),
}
GROUPED = {
    "group_lasso": (prox.GroupLasso(0.7), 0.0, 0.7),
    "sparse_group_lasso": (prox.SparseGroupLasso(0.7, entry_share=0.3), 0.21, 0.49),
}
PENALTIES = {name: pair[0] for name, pair in (ENTRYWISE | GROUPED).items()}
each_entrywise = pytest.mark.parametrize("name", ENTRYWISE)
each_grouped = pytest.mark.parametrize("name", GROUPED)
each = pytest.mark.parametrize("name", PENALTIES)


def scad(z, lam, a):
    """The integral of its slope, λ up to λ and max(aλ - z, 0)/(a - 1) beyond."""
    near = lam * z
    middle = (2 * a * lam * z - z**2 - lam**2) / (2 * (a - 1))
    far = lam**2 * (a + 1) / 2
    return np.where(z <= lam, near, np.where(z <= a * lam, middle, far))


@functools.cache
def operator(name):
    return jax.jit(PENALTIES[name].prox, static_argnames="axis")


def points(dtype, count=40):
    """Random numbers of a dtype, zero and both signs among them, and as float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.append(rng.normal(size=count) * 3, [0.0, -0.0]), dtype)
    return x, np.asarray(x, np.float64)


def objective(z, x, step_size, penalty):
    return (z - x) ** 2 / 2 + step_size * penalty(z)


@each_entrywise
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_entries_minimize_the_definition(name, dtype):
    """No point of a dense grid, zero among them, is lower than what comes out."""
    penalty = ENTRYWISE[name][1]
    with x64(dtype == "float64"):
        x, plain = points(dtype)
        results = {t: operator(name)(x, t) for t in STEPS}
        lowest = float(jnp.finfo(dtype).eps)
    for step_size, result in results.items():
        assert result.dtype == dtype
        z = np.asarray(result, np.float64)
        grid = np.append(np.linspace(-12, 12, 48_001), 0.0)[:, None]
        best = objective(grid, plain, step_size, penalty).min(0)
        reached = objective(z, plain, step_size, penalty)
        # A rounded minimum is off by the square of the rounding, but at a kink or x.
        slack = lowest * (step_size * 1.5 + 0.1) * np.maximum(np.abs(plain), 1)
        assert (reached <= best + slack + 1e-12).all()
        assert (z * plain >= 0).all()
        assert (np.abs(z) <= np.abs(plain)).all()


def golden_section(function, low, high):
    """The minimum of a convex function, to float64's √ε."""
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lower = function(left) < function(right)
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    return (low + high) / 2


@pytest.mark.parametrize("name", ["l1", "elastic_net"])
def test_convex_penalties_have_the_argument_of_the_minimum(name):
    x, plain = points("float32")
    for step_size in STEPS:
        argument = golden_section(
            lambda z, t=step_size: objective(z, plain, t, ENTRYWISE[name][1]), -12, 12
        )
        result = operator(name)(x, step_size)
        np.testing.assert_allclose(result, argument, atol=1e-6)
        assert ((np.asarray(result) == 0) == (np.abs(argument) < 1e-6)).all()


@each_grouped
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_groups_minimize_the_definition(name, dtype):
    """What is optimal by its subgradient: exact, since the objective is convex."""
    _, entry, group = GROUPED[name]
    rng = np.random.default_rng(1)
    scale = np.array([0.2, 0.7, 1.5, 3.0, 6.0, 0.0])
    with x64(dtype == "float64"):
        x = jnp.asarray(rng.normal(size=(5, 6)) * scale, dtype)
        plain, eps = np.asarray(x, np.float64), float(jnp.finfo(dtype).eps)
        found = {t: operator(name)(x, t, axis=0) for t in (0.0, 0.3, 1.0, 2.5)}
    zeros = 0
    for t, result in found.items():
        assert result.dtype == dtype
        z = np.asarray(result, np.float64)
        norm = np.linalg.norm(z, axis=0)
        dead = norm == 0
        zeros += dead.sum()
        # Zero is optimal if what the entries leave of x lies in the ball of the group.
        left = np.maximum(np.abs(plain) - t * entry, 0)
        size = np.linalg.norm(left, axis=0)
        bound = t * group * np.sqrt(5)
        assert (size[dead] <= bound + 1e-5 * size[dead]).all()
        assert (size[~dead] > bound * (1 - 1e-5)).all()
        # Else x - z is a subgradient, entry by entry.
        pull = plain - z - bound * z / np.where(dead, 1, norm)
        allowed = np.where(
            z != 0, t * entry * np.sign(z), np.clip(pull, -t * entry, t * entry)
        )
        tolerance = 8 * eps * np.maximum(np.abs(plain), 1)
        assert (np.abs(pull - allowed) <= tolerance)[:, ~dead].all()
    assert zeros > len(found)  # and not only the group that was zero


@each_grouped
def test_groups_beat_every_neighbor(name):
    """The definition itself: no nearby point, in any direction, is lower."""
    rng = np.random.default_rng(2)
    _, entry, group = GROUPED[name]
    x = rng.normal(size=6) * 1.5
    z = np.asarray(operator(name)(jnp.float32(x), 0.5, axis=None), np.float64)
    assert (z != 0).any()

    def value(z):
        norm = np.sqrt((z**2).sum(-1))
        penalty = entry * np.abs(z).sum(-1) + group * np.sqrt(6) * norm
        return ((z - np.float32(x)) ** 2).sum(-1) / 2 + 0.5 * penalty

    for size in (1e-3, 1e-1, 1.0):
        others = z + size * rng.normal(size=(2_000, 6))
        assert (value(others) >= value(z) - 1e-7).all()


@each_entrywise
def test_penalties_of_entries_have_the_values_of_their_formulas(name):
    penalty, formula = ENTRYWISE[name]
    for dtype, tolerance in [("float32", 1e-6), ("bfloat16", 1e-6)]:
        x, plain = points(dtype)
        value = jax.jit(penalty.penalty)(x)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, formula(plain).sum(), rtol=tolerance)


@each_grouped
def test_penalties_of_groups_have_the_values_of_their_formulas(name):
    penalty, entry, group = GROUPED[name]
    x = np.random.default_rng(3).normal(size=(3, 4, 5)).astype(np.float32)
    for axis, size in [((0, 1), 12), (None, 60), (-1, 5)]:
        norms = np.sqrt((x**2).sum(axis))
        expected = entry * np.abs(x).sum() + group * np.sqrt(size) * norms.sum()
        value = jax.jit(penalty.penalty, static_argnames="axis")(x, axis=axis)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@each
def test_zeros_are_positive_and_without_a_step_nothing_happens(name):
    x = jnp.array([[-0.1, 0.1, -0.0, 0.0], [1e-30, -4.0, 5.0, -1e-40]])
    result = np.asarray(operator(name)(x, 1.5, axis=0))
    assert (result == 0).any()
    assert not np.signbit(result[result == 0]).any()
    same = operator(name)(x[:, :3], 0.0, axis=0)
    np.testing.assert_array_equal(same, x[:, :3])


@each
def test_bad_entries_stay_bad_and_do_not_spread(name):
    x = jnp.array([[np.nan, 3.0], [9.0, -np.inf], [4.0, 7.0]])
    result = operator(name)(x, 0.1, axis=1)
    good = operator(name)(jnp.array([[4.0, 7.0]]), 0.1, axis=1)
    assert np.isnan(result[0, 0])
    assert result[1, 1] == -np.inf
    assert np.isfinite(result[0, 1])
    assert np.isfinite(result[1, 0])
    np.testing.assert_array_equal(result[2:], good)


@each
def test_complex_entries_are_shrunk_by_their_magnitude(name):
    x = jnp.array([3 + 4j, 0.1j, -2.0, 0.0], jnp.complex64)
    result = operator(name)(x, 0.5, axis=())
    expected = operator(name)(jnp.abs(x), 0.5, axis=())
    assert result.dtype == jnp.complex64
    np.testing.assert_allclose(jnp.abs(result), expected, rtol=1e-6)
    np.testing.assert_allclose(
        result[0], np.asarray(expected[0]) * (0.6 + 0.8j), rtol=1e-6
    )
    assert result[1] == 0


@each
def test_strengths_and_steps_may_be_traced(name):
    kind = type(PENALTIES[name])
    x = points("float32")[0]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def population(strength, step_size, x):
        extra = {"ridge": 0.4} if kind is prox.ElasticNet else {}
        return kind(strength, **extra).prox(x, step_size)

    strengths, steps = jnp.array([0.2, 0.5]), jnp.array([1.0, 2.0])
    extra = {"ridge": 0.4} if kind is prox.ElasticNet else {}
    rows = np.asarray(population(strengths, steps, x))
    alone = jax.jit(kind(0.5, **extra).prox)(x, 2.0)
    np.testing.assert_allclose(rows[1], alone, rtol=1e-6)
    assert (rows[0] != rows[1]).any()


def test_all_are_penalties_and_say_what_is_wrong():
    assert all(isinstance(value, prox.Penalty) for value in PENALTIES.values())
    with pytest.raises(ValueError, match=r"strength must not be negative, but is -1"):
        prox.L1(-1)
    with pytest.raises(ValueError, match=r"gamma must be positive, but is 0"):
        prox.MCP(1.0, gamma=0)
    with pytest.raises(ValueError, match=r"a must be at least 2, but is 1"):
        prox.SCAD(1.0, a=1)
    with pytest.raises(ValueError, match=r"entry_share must lie between 0 and 1"):
        prox.SparseGroupLasso(1.0, entry_share=2)
    with pytest.raises(ValueError, match=r"bound must not be negative, but is -2"):
        contrib.lassonet(jnp.ones((2, 1)), jnp.ones((2, 3)), 1.0, bound=-2)


# LassoNet


@pytest.mark.parametrize(
    ("bound", "dtype"),
    [(0.0, "float32"), (0.5, "float32"), (10.0, "float32")]
    + [(10.0, dtype) for dtype in ("bfloat16", "float16", "float64")],
)
def test_lassonet_minimizes_the_definition(bound, dtype):
    """Along the norm of the skip weights, all else being given by it."""
    rng = np.random.default_rng(4)
    with x64(dtype == "float64"):
        skip, kernel = rng.normal(size=(30, 3)), rng.normal(size=(30, 7))
        skip[7] *= 0.01
        kernel[7] *= 0.01
        skip, kernel = jnp.asarray(skip, dtype), jnp.asarray(kernel, dtype)
        strength = 4.0 if bound else 1.5
        results = jax.jit(contrib.lassonet)(skip, kernel, strength, bound)
        eps = float(jnp.finfo(dtype).eps)
    assert [x.dtype for x in results] == [dtype, dtype]
    theta, w, b, v = (np.asarray(x, np.float64) for x in (skip, kernel, *results))
    size = np.linalg.norm(theta, axis=1)

    def value(beta):
        near = np.maximum(np.abs(w) - bound * beta[:, None], 0)
        return (size - beta) ** 2 / 2 + (near**2).sum(1) / 2 + strength * beta

    beta = golden_section(value, np.zeros(30), np.full(30, 20.0))
    tolerance = 1e-6 + 4 * eps
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), beta, atol=tolerance * 3)
    np.testing.assert_allclose(
        b * size[:, None], theta * beta[:, None], atol=tolerance * 9
    )
    clipped = np.clip(w, -bound * beta[:, None], bound * beta[:, None])
    np.testing.assert_allclose(v, clipped, atol=tolerance * max(bound, 1) * 3)
    out = (b == 0).all(1)
    assert 0 < out.sum() < 30
    assert (v[out] == 0).all()
    assert out[7]


def test_lassonet_beats_every_neighbor_that_keeps_the_hierarchy():
    rng = np.random.default_rng(5)
    theta, w = rng.normal(size=(1, 2)) * 2, rng.normal(size=(1, 4)) * 3
    strength, bound = 0.8, 0.7
    b, v = jax.jit(contrib.lassonet)(*map(jnp.float32, (theta, w)), strength, bound)
    b, v = np.asarray(b, np.float64), np.asarray(v, np.float64)
    assert np.abs(v).max() <= bound * np.linalg.norm(b) * (1 + 1e-6)

    def value(b, v):
        penalty = strength * np.linalg.norm(b, axis=-1)
        return ((b - theta) ** 2).sum(-1) / 2 + ((v - w) ** 2).sum(-1) / 2 + penalty

    for size in (1e-3, 1e-1, 1.0):
        other = b + size * rng.normal(size=(4_000, 2))
        most = bound * np.linalg.norm(other, axis=1, keepdims=True)
        near = np.clip(v + size * rng.normal(size=(4_000, 4)), -most, most)
        assert (value(other, near) >= value(b, v) - 1e-6).all()


def test_lassonet_drops_a_feature_without_skip_weights():
    skip = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    kernel = jnp.array([[5.0, -5.0], [1.0, 1.0]])
    new_skip, new_kernel = jax.jit(contrib.lassonet)(skip, kernel, 0.0)
    np.testing.assert_array_equal(new_kernel, [[0, 0], [1, 1]])
    np.testing.assert_allclose(new_skip, [[0, 0], [3, 4]], rtol=1e-6)
