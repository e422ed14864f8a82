"""Clipping example by example: NumPy's loop, and a bound that nothing crosses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from clipjax import per_example
from helpers import assert_same, normal, x64

SHAPES = {"kernel": (6, 4), "bias": (4,)}
FLOATS = ["float32", "bfloat16", "float16", "float64"]
ROUNDING = {"float32": 4e-6, "bfloat16": 2**-8, "float16": 2**-11, "float64": 4e-6}
SIZE = 8


def linear(params, x, y):
    """A loss whose gradients are x yᵀ and y: large and small ones, known exactly."""
    return jnp.sum((x @ params["kernel"] + params["bias"]) * y)


def inner(w, x):
    """A loss whose gradient is the example itself."""
    return jnp.sum(w * x.astype(w.dtype))


def data(dtype="float32", seed=0, size=SIZE):
    x, y = normal([(size, 6), (size, 4)], seed=seed, dtype=dtype)
    reach = jnp.geomspace(0.01, 30, size).astype(dtype)[:, None]
    return normal(SHAPES, seed=seed + 1, dtype=dtype), x * reach, y


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def gradients(params, x, y):
    """One example after the other, in float64."""
    for xi, yi in zip(wide(x), wide(y), strict=True):
        yield {"kernel": np.outer(xi, yi), "bias": yi}


def size_of(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wide(tree))))


def mean_clipped(params, x, y, bound):
    """Mean clipped gradient and norms, by the formula."""
    total, norms = {"kernel": np.zeros((6, 4)), "bias": np.zeros(4)}, []
    for one in gradients(params, x, y):
        norms.append(size_of(one))
        factor = min(1, bound / max(norms[-1], 1e-300))
        total = {name: total[name] + one[name] * factor for name in total}
    return {name: leaf / len(norms) for name, leaf in total.items()}, np.array(norms)


@functools.cache
def compiled(fun=linear, **options):
    """The clipped gradient as a function of the bound too."""

    def run(bound, *args, **kwargs):
        return per_example.clipped_value_and_grad(fun, bound, **options)(
            *args, **kwargs
        )

    return jax.jit(run)


def close(actual, expected, dtype="float32", scale=1.0):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        atol = ROUNDING[dtype] * scale
        np.testing.assert_allclose(np.float64(one), other, rtol=0, atol=atol)


# What it is


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_is_the_loop_over_examples(dtype):
    with x64(dtype == "float64"):
        params, x, y = data(dtype)
        for bound in (0.3, 5.0, 1e3):
            out = compiled()(jnp.float32(bound), params, x, y)
            expected, norms = mean_clipped(params, x, y, bound)
            # Products of narrow numbers are rounded before they are clipped.
            close(out.grads, expected, dtype, scale=2 * min(bound, norms.max()))
            np.testing.assert_allclose(out.norms, norms, rtol=ROUNDING[dtype])
            assert int(out.clipped_examples) == np.sum(norms > bound)
            assert out.nonfinite_examples == 0
            assert {k: v.dtype for k, v in out.grads.items()} == {
                k: v.dtype for k, v in params.items()
            }


def test_value_is_the_mean_loss_and_aux_stays_with_its_example():
    params, x, y = data()

    def with_aux(params, x, y):
        return linear(params, x, y), {"x": x, "twice": 2 * jnp.sum(y)}

    losses = [linear(params, xi, yi) for xi, yi in zip(x, y, strict=True)]
    for microbatch in (None, 3):
        out = compiled(with_aux, has_aux=True, microbatch=microbatch)(2.0, params, x, y)
        np.testing.assert_allclose(out.value, np.mean(np.float64(losses)), rtol=1e-5)
        assert_same(out.aux, {"x": x, "twice": 2 * jnp.sum(y, axis=1)})
    assert compiled()(2.0, params, x, y).aux is None


def test_a_hand_computed_batch():
    """3-4-5, brought to 1, beside a gradient that is within."""
    batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
    out = compiled(inner)(1.0, jnp.zeros(2), batch)
    assert_same(out.grads, jnp.array([0.3, 0.65]), rtol=2e-6)
    assert out.clipped_examples == 1
    assert_same(out.norms, jnp.array([5.0, 0.5]))


def test_without_a_bound_it_is_the_gradient_of_the_mean():
    params, x, y = data()

    def mean(params):
        return jnp.mean(jax.vmap(linear, (None, 0, 0))(params, x, y))

    for bound in (jnp.inf, 1e6):
        out = compiled()(bound, params, x, y)
        value, grads = jax.value_and_grad(mean)(params)
        assert_same(out.grads, grads, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out.value, value, rtol=1e-5)
        assert out.clipped_examples == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_example_within_the_bound_passes_bit_for_bit(dtype):
    params, x, y = data(dtype, size=1)
    out = compiled()(1e3, params, x, y)
    alone = jax.jit(jax.grad(linear))(params, x[0], y[0])
    assert_same(out.grads, alone, rtol=0)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan])
def test_no_bound_to_keep_gives_zeros(bound):
    params, x, y = data()
    out = compiled()(jnp.float32(bound), params, x, y)
    assert_same(out.grads, jax.tree.map(jnp.zeros_like, params), rtol=0)


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_the_result_is_the_same_whatever_the_microbatch(microbatch):
    params, x, y = data()
    expected = compiled()(1.0, params, x, y)
    actual = compiled(microbatch=microbatch)(1.0, params, x, y)
    assert_same(actual, expected, rtol=2e-6, atol=1e-7)


def test_a_microbatch_larger_than_the_batch_is_the_batch():
    params, x, y = data()
    expected = compiled()(1.0, params, x, y)
    assert_same(compiled(microbatch=100)(1.0, params, x, y), expected, rtol=0)


def test_any_arguments_may_be_differentiated():
    def fun(x, a, y, b):
        return jnp.sum(x * a) + jnp.sum(y["deep"] * b)

    x, y = normal((5, 3), seed=1), {"deep": normal((5, 2), seed=2)}
    a, b = jnp.ones(3), jnp.ones(2)
    out = compiled(fun, argnums=(3, 1), microbatch=2)(0.5, x, a, y, b)
    both = np.concatenate([x, y["deep"]], axis=1)
    both *= np.minimum(1, 0.5 / np.linalg.norm(both, axis=1, keepdims=True))
    expected = np.mean(both, axis=0)
    assert_same(
        out.grads, (jnp.array(expected[3:]), jnp.array(expected[:3])), rtol=1e-5
    )


# The bound


def size_of_batches_of_one(x, bound, dtype):
    run = compiled(inner)
    for i in range(len(x)):
        out = run(jnp.float32(bound), jnp.zeros(x.shape[1:], dtype), x[i : i + 1])
        yield np.linalg.norm(np.float64(out.grads))


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_example_adds_more_than_the_bound(dtype, size):
    """Gradients of a narrow dtype's values, the sum in the float32 that it is in."""
    x = normal((9, size), dtype=dtype) * 10
    for bound in (0.1, 1 / 3, 1.0):
        sizes = list(size_of_batches_of_one(x, bound, "float32"))
        assert max(sizes) <= np.float32(bound)
        assert np.float32(bound) * (1 - 2**-19) < max(sizes)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_rounded_mean_exceeds_the_bound_by_no_more_than_documented(dtype, bits):
    x = normal((9, 50), dtype=dtype) * 10
    for bound in (0.1, 1.0):
        sizes = size_of_batches_of_one(x, bound, dtype)
        assert max(sizes) <= np.float32(bound) * (1 + 2.0**-bits)


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_one_example_moves_the_sum_by_twice_the_bound_at_most(bound, microbatch):
    run = compiled(microbatch=microbatch)
    for seed in range(10):
        params, x, y = data(seed=seed)
        before = run(bound, params, x, y).grads
        new = normal((6,), seed=seed + 100) * 1e4
        for i in (0, SIZE - 1):
            after = run(bound, params, x.at[i].set(new), y.at[i].set(-9.0)).grads
            moved = size_of(jax.tree.map(jnp.subtract, after, before)) * SIZE
            assert moved <= 2 * bound * (1 + 1e-5)  # the sum is in float32


@pytest.mark.parametrize("bound", [0.05, 1.0, 20.0])
def test_removing_one_example_moves_the_sum_by_the_bound_at_most(bound):
    params, x, y = data()
    whole = wide(compiled()(bound, params, x, y).grads)
    for i in range(SIZE):
        fewer = [jnp.delete(leaf, i, axis=0) for leaf in (x, y)]
        rest = wide(compiled()(bound, params, *fewer).grads)
        moved = {k: whole[k] * SIZE - rest[k] * (SIZE - 1) for k in whole}
        assert size_of(moved) <= bound * (1 + 1e-5)


def test_the_two_worst_neighbours_are_two_bounds_apart():
    run = compiled(inner)
    far = [run(1.0, jnp.zeros(2), jnp.array([[s * 1e9, 0.0]])).grads for s in (1, -1)]
    moved = np.linalg.norm(np.float64(far[0]) - np.float64(far[1]))
    assert 2 - 1e-5 < moved <= 2


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("bound", [1e-37, 1e-20, 1.0, 1e20, 1e36])
def test_bound_and_gradient_may_be_any_float32(size, bound):
    """Squares and quotients leave float32 long before the clipped gradient does."""
    x = normal((4, 30)) * jnp.float32(size)
    out = compiled(inner)(jnp.float32(bound), jnp.zeros(30), x[:1])
    norm = np.linalg.norm(np.float64(x[0]))
    np.testing.assert_allclose(out.norms[0], norm, rtol=1e-6)
    expected = np.float64(x[0]) * min(1, np.float32(bound) / norm)
    np.testing.assert_allclose(np.float64(out.grads), expected, rtol=4e-6, atol=2e-38)
    assert np.linalg.norm(np.float64(out.grads)) <= max(np.float32(bound), 2e-37)


def test_a_sum_over_many_bfloat16_examples_does_not_stand_still():
    """In bfloat16, ones add up to 256 at most."""
    x = jnp.ones((3000, 1), jnp.bfloat16)
    run = compiled(inner, microbatch=7)
    assert run(2.0, jnp.zeros(1, jnp.bfloat16), x).grads == 1


# Bad examples


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("bound", [1.0, np.inf])
def test_a_bad_example_is_left_out_and_counted(bad, microbatch, bound):
    params, x, y = data()
    run = compiled(microbatch=microbatch)
    out = run(bound, params, x.at[2, 1].set(bad).at[7, 0].set(bad), y)
    assert out.nonfinite_examples == 2
    gone = jnp.array([2, 7])
    clean = run(bound, params, x.at[gone].set(0), y.at[gone].set(0))
    assert_same(out.grads, clean.grads, rtol=1e-6)
    assert out.clipped_examples == clean.clipped_examples
    assert not np.isfinite(out.norms[gone]).any()


def test_a_finite_loss_with_a_gradient_that_is_not_is_left_out():
    out = compiled(lambda w, x: jnp.sqrt(w * x))(1.0, 1.0, jnp.array([0.0, 4.0]))
    assert out.nonfinite_examples == 1
    np.testing.assert_allclose(out.value, 1)
    np.testing.assert_allclose(out.grads, 0.5, rtol=2e-6)


def test_a_batch_of_nothing_but_nan_gives_zeros():
    params, x, y = data()
    out = compiled()(1.0, params, x * np.nan, y)
    assert_same(out.grads, jax.tree.map(jnp.zeros_like, params), rtol=0)
    assert out.nonfinite_examples == SIZE


# Noise


@pytest.mark.parametrize("microbatch", [None, 2])
def test_noise_has_the_size_it_should_have(microbatch):
    """On the sum, once, whatever the microbatch."""
    params = {"w": jnp.zeros(20_000), "b": jnp.zeros(1)}
    run = compiled(
        lambda p, x: x * (p["w"][0] + p["b"][0]),
        noise_multiplier=1.5,
        microbatch=microbatch,
    )
    x = jnp.full(4, 0.3)
    out = run(2.0, params, x, key=jax.random.key(0))
    noise = np.float64(out.grads["w"][1:]) * 4
    np.testing.assert_allclose(np.std(noise), 1.5 * 2.0, rtol=0.02)
    np.testing.assert_allclose(np.mean(noise), 0, atol=0.1)
    assert_same(run(2.0, params, x, key=jax.random.key(0)), out, rtol=0)
    other = run(2.0, params, x, key=jax.random.key(1))
    assert not np.array_equal(other.grads["w"], out.grads["w"])


def test_noise_of_complex_parameters_has_it_in_each_part():
    params = jnp.zeros(20_000, jnp.complex64)
    run = compiled(lambda p, x: x * jnp.real(p[0]), noise_multiplier=1.0)
    out = run(2.0, params, jnp.ones(1), key=jax.random.key(0))
    for part in (out.grads.real[1:], out.grads.imag[1:]):
        np.testing.assert_allclose(np.std(part), 2, rtol=0.03)


def test_traced_noise_may_be_none():
    @jax.jit
    def run(multiplier, bound, *args):
        grad = per_example.clipped_value_and_grad(
            linear, bound, noise_multiplier=multiplier
        )
        return grad(*args, key=jax.random.key(0))

    args = data()
    for bound in (1.0, jnp.inf):
        assert_same(run(0.0, bound, *args), compiled()(bound, *args), atol=1e-6)


# Anywhere


def test_a_population_of_bounds():
    params, x, y = data()
    bounds = jnp.array([0.1, 1.0, 10.0])
    many = jax.jit(jax.vmap(compiled(), (0, None, None, None)))(bounds, params, x, y)
    for i, bound in enumerate(bounds):
        one = compiled()(bound, params, x, y)
        assert_same(jax.tree.map(lambda v, i=i: v[i], many), one, rtol=2e-6, atol=1e-7)


def test_nothing_is_compiled_again_for_another_bound():
    params, x, y = data()
    run = jax.jit(lambda bound, *args: compiled()(bound, *args))
    for bound in (0.1, 1.0, jnp.inf):
        run(jnp.float32(bound), params, x, y)
    assert run._cache_size() == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("microbatch", [None, 16])
def test_a_batch_split_over_devices_under_jit(kind, microbatch):
    args = data(size=32)
    expected = compiled(microbatch=microbatch)(1.0, *args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(args[0], NamedSharding(mesh, P()))
        x, y = jax.device_put(args[1:], NamedSharding(mesh, P("data")))
        actual = compiled(microbatch=microbatch)(1.0, params, x, y)
        assert_same(jax.device_get(actual), jax.device_get(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("check_vma", "microbatch"), [(True, None), (True, 3), (False, 3)]
)
def test_inside_shard_map(check_vma, microbatch):
    """There `jax.grad` would sum each example over the devices before the clip."""
    args = data(size=32)
    key = jax.random.key(0)
    options = {"microbatch": microbatch, "noise_multiplier": 0.5}
    expected = compiled(**options)(1.0, *args, key=key)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    names = ("a", "b")
    run = jax.jit(
        jax.shard_map(
            functools.partial(compiled(**options, axis_name=names), key=key),
            mesh=mesh,
            in_specs=(P(), P(), P(names), P(names)),
            out_specs=per_example.ClippedGrads(P(), P(), P(), P(names), P(), P()),
            check_vma=check_vma,
        )
    )
    assert_same(run(jnp.float32(1.0), *args), expected, rtol=1e-5, atol=1e-6)


def test_inside_shard_map_without_a_name_each_device_has_its_own():
    params, x, y = data(size=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(params, x, y):
        out = compiled()(1.0, params, x, y)
        return jax.tree.map(lambda leaf: leaf[None], out.grads)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data")
    )
    grads = jax.jit(run)(params, x, y)
    for i in range(8):
        own = slice(2 * i, 2 * i + 2)
        expected = compiled()(1.0, params, x[own], y[own]).grads
        actual = jax.tree.map(lambda leaf, i=i: leaf[i], grads)
        assert_same(actual, expected, rtol=1e-5, atol=1e-7)


def test_a_microbatch_is_all_that_is_held_at_once():
    params, x = jnp.zeros(100_000), jnp.ones(64)
    used = {}
    for microbatch in (None, 4):
        run = compiled(lambda w, x: jnp.sum(jnp.sin(w * x)), microbatch=microbatch)
        memory = run.lower(1.0, params, x).compile().memory_analysis()
        used[microbatch] = memory.temp_size_in_bytes
    assert used[4] < used[None] / 5


# Errors


def test_errors_say_what_to_do():
    params, x, y = data()
    make = per_example.clipped_value_and_grad
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        make(linear, -1.0)
    with pytest.raises(ValueError, match="noise_multiplier must not be negative"):
        make(linear, 1.0, noise_multiplier=-1.0)
    with pytest.raises(ValueError, match="microbatch must be at least 1"):
        make(linear, 1.0, microbatch=0)
    with pytest.raises(ValueError, match="key must be given"):
        make(linear, 1.0, noise_multiplier=1.0)(params, x, y)
    with pytest.raises(ValueError, match=r"same leading axis.*\{1: \{8\}, 2: \{4\}\}"):
        make(linear, 1.0)(params, x, y[:4])
    with pytest.raises(ValueError, match=r"at least one example.*2: \{None\}"):
        make(linear, 1.0)(params, x, 1.0)
    with pytest.raises(ValueError, match="at least one example"):
        make(linear, 1.0)(params, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"functools\.partial"):
        make(lambda p: p, 1.0)(1.0)
