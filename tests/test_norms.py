"""Norms against NumPy's float64, where Optax's own go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from clipjax import norms
from helpers import assert_same, normal, x64

TREE = {"w": (7, 5), "b": (5,), "s": ()}
NORMS = {
    norms.global_norm: lambda x: np.sqrt(np.sum(np.abs(x) ** 2)),
    norms.rms: lambda x: np.sqrt(np.mean(np.abs(x) ** 2)),
    norms.inf_norm: lambda x: np.max(np.abs(x)),
}
each_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)


def entries(tree):
    """All entries in one array of float64 or complex128."""
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    wide = np.complex128 if any(map(np.iscomplexobj, leaves)) else np.float64
    return np.concatenate([leaf.astype(wide) for leaf in leaves])


@each_norm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_norms_are_those_of_numpy(norm, dtype):
    with x64(dtype == "float64"):
        tree = normal(TREE, dtype=dtype)
        actual = norm(tree)
        assert actual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        rtol = 1e-14 if dtype == "float64" else 1e-6
        np.testing.assert_allclose(actual, NORMS[norm](entries(tree)), rtol=rtol)


@each_norm
def test_dtypes_may_be_mixed(norm):
    with x64():
        tree = {dtype: normal((9,), dtype=dtype) for dtype in ("float16", "float64")}
        tree["bfloat16"] = normal((3, 3), seed=1, dtype="bfloat16")
        assert norm(tree).dtype == jnp.float64
        expected = NORMS[norm](entries(tree))
        np.testing.assert_allclose(norm(tree), expected, rtol=1e-6)


@each_norm
def test_complex_entries_count_by_their_magnitude(norm):
    z = jax.lax.complex(normal((6,)), normal((6,), seed=1))
    tree = {"z": z, "x": normal((4,), seed=2)}
    assert norm(tree).dtype == jnp.float32
    np.testing.assert_allclose(norm(tree), NORMS[norm](entries(tree)), rtol=1e-6)


@each_norm
def test_what_holds_no_floats_does_not_count(norm):
    tree = {"w": normal((4, 3))}
    others = {
        "i": jnp.arange(9),
        "m": jnp.ones(3, bool),
        "n": None,
        "e": jnp.ones((0,)),
    }
    assert_same(norm(tree | others), norm(tree), rtol=0)
    assert_same(norm({"i": jnp.arange(9)}), jnp.float32(0), rtol=0)
    assert_same(norm({}), jnp.float32(0), rtol=0)


@each_norm
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_entries_are_seen(norm, bad):
    tree = {"w": normal((4, 3)).at[1, 1].set(bad), "b": normal((2,))}
    assert_same(norm(tree), jnp.float32(bad), rtol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("size", "dtype"), [(2, "bfloat16"), (0.1, "float32")])
def test_many_leaves_lose_no_digits(size, dtype, count):
    """In bfloat16 the sum over leaves stands still: 0.72 and 0.23 of the norm."""
    leaf = jnp.asarray(size, dtype)
    exact = np.float64(leaf) * np.sqrt(count)
    np.testing.assert_allclose(norms.global_norm([leaf] * count), exact, rtol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(300, 4), (60_000, 9), (1e-4, 10**6)])
def test_float16_squares_neither_overflow_nor_vanish(size, count):
    leaf = jnp.full(count, size, jnp.float16)
    exact = np.float64(leaf[0]) * np.sqrt(count)
    np.testing.assert_allclose(norms.global_norm(leaf), exact, rtol=1e-6)
    np.testing.assert_allclose(norms.rms(leaf), np.float64(leaf[0]), rtol=1e-6)


@pytest.fixture(scope="module")
def scaled():
    return jax.jit(functools.partial(norms.global_norm, scaled=True))


@pytest.mark.parametrize("exponent", [*range(-38, 37, 5), 37])
def test_the_scaled_norm_is_right_over_the_range_of_float32(scaled, exponent):
    sizes = jax.tree.map(
        lambda x: jnp.copysign(jnp.clip(abs(x), 1, 2), x), normal(TREE)
    )
    tree = jax.tree.map(lambda x: x * jnp.float32(f"2e{exponent}"), sizes)
    expected = NORMS[norms.global_norm](entries(tree))
    np.testing.assert_allclose(scaled(tree), expected, rtol=1e-6)


def test_the_scaled_norm_is_the_plain_one_where_that_is_right(scaled):
    assert_same(scaled(normal(TREE)), jax.jit(norms.global_norm)(normal(TREE)), rtol=0)
    assert_same(scaled({"w": jnp.zeros(3)}), jnp.float32(0), rtol=0)
    assert_same(scaled({}), jnp.float32(0), rtol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_scaled_norm_sees_nonfinite_entries(scaled, bad):
    tree = {"w": jnp.array([1e30, bad, 1e-30]), "b": jnp.ones(2)}
    assert_same(scaled(tree), jnp.float32(bad), rtol=0, equal_nan=True)


def test_the_scaled_norm_takes_complex_and_float64(scaled):
    z = jax.lax.complex(jnp.array([3e30]), jnp.array([4e30]))
    np.testing.assert_allclose(scaled(z), 5e30, rtol=1e-6)
    with x64():
        tree = {"a": jnp.array([3e200]), "b": jnp.array([4e200])}
        np.testing.assert_allclose(scaled(tree), 5e200, rtol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_at_zero_is_zero(scaled):
    norm = functools.partial(norms.global_norm, scaled=scaled)
    assert_same(jax.grad(norm)(jnp.zeros(3)), jnp.zeros(3), rtol=0)
    assert_same(jax.grad(norms.rms)(jnp.zeros(3)), jnp.zeros(3), rtol=0)


@pytest.mark.parametrize("plain", [True, False])
def test_the_gradient_elsewhere_is_the_direction(plain):
    norm = functools.partial(norms.global_norm, scaled=not plain)
    direction = jax.grad(norm)({"w": jnp.array([3.0, 0.0]), "b": jnp.float32(-4.0)})
    assert_same(direction, {"w": jnp.array([0.6, 0.0]), "b": jnp.float32(-0.8)})


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2), ()])
def test_unit_norms_are_those_of_numpy(axis):
    x = normal((4, 3, 5))
    expected = np.sqrt(np.sum(np.float64(x) ** 2, axis=axis, keepdims=True))
    np.testing.assert_allclose(norms.unit_norm(x, axis), expected, rtol=1e-6)
    assert norms.unit_norm(x, axis).shape == expected.shape


def test_units_of_float16_do_not_overflow():
    x = jnp.full((4, 2), 300, jnp.float16)
    assert_same(norms.unit_norm(x, 0), jnp.full((1, 2), 600, jnp.float32))


def test_the_gradient_of_a_zero_unit_is_zero():
    x = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    gradient = jax.grad(lambda x: jnp.sum(norms.unit_norm(x, 0)))(x)
    assert_same(gradient, jnp.array([[0.6, 0.0], [0.8, 0.0]]))


@pytest.mark.parametrize("scaled", [False, True])
def test_leaf_norms_keep_the_structure(scaled):
    tree = {
        "a": [normal((3,)), None],
        "b": normal((2, 2), seed=1),
        "i": jnp.ones(2, int),
    }
    norm = norms.global_norm
    expected = {"a": [norm(tree["a"][0]), None], "b": norm(tree["b"]), "i": norm([])}
    assert_same(norms.leaf_norms(tree, scaled=scaled), expected, rtol=0)
    assert norms.leaf_norms({}, scaled=scaled) == {}


def test_scaled_leaf_norms_reach_further():
    tree = {"huge": jnp.array([3e30, 4e30]), "usual": jnp.array([3.0, 4.0])}
    expected = {"huge": jnp.float32(5e30), "usual": jnp.float32(5)}
    assert_same(norms.leaf_norms(tree, scaled=True), expected)


# Over devices


def mesh_of(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


@each_norm
def test_in_shard_map_replicated_leaves_count_once(norm):
    tree = {"split": normal((16, 3)), "whole": 4 * normal((5,), seed=1)}
    specs = {"split": P("d"), "whole": P()}
    local = functools.partial(norm, axis_name="d")
    mapped = jax.shard_map(local, mesh=mesh_of(d=8), in_specs=(specs,), out_specs=P())
    np.testing.assert_allclose(jax.jit(mapped)(tree), norm(tree), rtol=1e-6)


@each_norm
def test_in_shard_map_over_two_axes(norm):
    """Each leaf over other axes: each sum goes over those that split the leaf."""
    tree = {"ab": (8, 4), "a": (4, 3), "b": (3, 8), "whole": (5,)}
    tree = {name: normal(shape, seed=i) for i, (name, shape) in enumerate(tree.items())}
    specs = {"ab": P("a", "b"), "a": P("a"), "b": P(None, "b"), "whole": P()}
    local = functools.partial(norm, axis_name=("a", "b"))
    mapped = jax.shard_map(
        local, mesh=mesh_of(a=2, b=4), in_specs=(specs,), out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(mapped)(tree), norm(tree), rtol=1e-6)


def test_in_shard_map_the_scaled_norm_is_scaled_alike_everywhere():
    """One device may hold all that is large."""
    x = jnp.array([3e30, 4e30, *[1e-30] * 14])
    local = functools.partial(norms.global_norm, scaled=True, axis_name="d")
    mapped = jax.shard_map(local, mesh=mesh_of(d=8), in_specs=P("d"), out_specs=P())
    np.testing.assert_allclose(jax.jit(mapped)(x), 5e30, rtol=1e-6)


def test_in_shard_map_units_may_be_split():
    x = normal((16, 3))
    local = functools.partial(norms.unit_norm, axis=0, axis_name="d")
    mapped = jax.shard_map(local, mesh=mesh_of(d=8), in_specs=P("d"), out_specs=P())
    assert_same(jax.jit(mapped)(x), norms.unit_norm(x, 0))


def test_in_shard_map_leaf_norms_are_those_of_whole_leaves():
    tree = {"split": normal((16, 3)), "whole": normal((5,), seed=1)}
    specs = {"split": P("d"), "whole": P()}
    local = functools.partial(norms.leaf_norms, axis_name="d")
    mapped = jax.shard_map(local, mesh=mesh_of(d=8), in_specs=(specs,), out_specs=P())
    assert_same(jax.jit(mapped)(tree), norms.leaf_norms(tree))


def test_vmap_axes_are_summed_over():
    x = normal((4, 3))
    local = functools.partial(norms.global_norm, axis_name="batch")
    summed = jax.vmap(local, axis_name="batch")(x)
    np.testing.assert_allclose(summed, [norms.global_norm(x)] * 4, rtol=1e-6)


def test_more_entries_than_an_int32_holds():
    big = [jax.ShapeDtypeStruct((30_000, 30_000), jnp.float32)] * 3
    assert jax.eval_shape(norms.rms, big).shape == ()


def test_a_nan_on_one_device_is_not_lost():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def both(x):
        return (
            norms.inf_norm(x, axis_name="d"),
            norms.global_norm(x, axis_name="d"),
        )

    mapped = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("d"), out_specs=P()))
    x = jnp.arange(8.0)
    assert_same(mapped(x), (jnp.float32(7), jnp.sqrt(jnp.float32(140))))
    for place in (0, 3, 7):
        assert all(jnp.isnan(norm) for norm in mapped(x.at[place].set(jnp.nan)))
