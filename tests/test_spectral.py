"""Spectral clips against NumPy's singular value decomposition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from clipjax import Bound, clip_by, norms, responses, scopes, spectral_clip
from helpers import assert_same, normal

spectra_clip = functools.partial(spectral_clip, response=responses.smooth)

SHAPES = {
    "dense": {"kernel": (6, 9), "bias": (9,)},
    "tall": {"kernel": (9, 4)},
    "conv": {"kernel": (3, 3, 2, 5)},
    "query": {"kernel": (8, 2, 3), "bias": (2, 3)},
    "out": {"kernel": (2, 3, 8), "bias": (8,)},
    "gain": (),
}
MATRICES = {  # how many leading axes are the rows
    "dense/kernel": 1,
    "tall/kernel": 1,
    "conv/kernel": 3,
    "query/kernel": 1,
    "out/kernel": 2,
}
SPECTRA = {
    spectral_clip: lambda s, c: np.minimum(s, c),
    spectra_clip: lambda s, c: s / np.sqrt(1 + (s / c) ** 2),
}
each = pytest.mark.parametrize("clip", SPECTRA)


@functools.cache
def compiled(clip, **options):
    def update(bound, updates):
        tx = clip(bound, **options)
        return tx.update(updates, tx.init(updates))

    return jax.jit(update)


def by_path(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(
            leaf, np.float64
        )
        for keys, leaf in pairs
    }


def as_matrix(path, x):
    rows = MATRICES[path]
    return x.reshape(int(np.prod(x.shape[:rows])), -1)


def reference(clip, matrix, bound):
    p, values, q = np.linalg.svd(matrix, full_matrices=False)
    return p * SPECTRA[clip](values, bound) @ q


def with_values(values, rows=8, columns=12, seed=0):
    """A matrix of these singular values."""
    rng = np.random.default_rng(seed)
    p = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    q = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
    return jnp.asarray((p * values) @ q.T, jnp.float32)


# What they are


@each
def test_every_kernel_is_clipped_as_the_matrix_it_is(clip):
    for seed, bound in enumerate([0.3, 2.0, 4.0]):
        updates = normal(SHAPES, seed=seed)
        clipped, state = compiled(clip)(jnp.float32(bound), updates)
        before, after = by_path(updates), by_path(clipped)
        for path, x in before.items():
            if path not in MATRICES:
                np.testing.assert_array_equal(after[path], x)
                continue
            expected = reference(clip, as_matrix(path, x), np.float32(bound))
            actual = as_matrix(path, after[path])
            np.testing.assert_allclose(actual, expected, atol=2e-5)
            assert np.linalg.norm(actual, 2) <= bound * (1 + 1e-5)
        flat = np.concatenate([x.ravel() for x in after.values()])
        np.testing.assert_allclose(
            state.clip.clipped_norm, np.linalg.norm(flat), rtol=1e-5
        )
        assert (state.clip.step, state.clip.clipped_steps, state.clip.threshold) == (
            1,
            1,
            np.float32(bound),
        )


@each
def test_stacked_layers_are_clipped_one_by_one(clip):
    """And one bad layer leaves the others alone."""
    layers = normal((4, 6, 9)).at[1].multiply(1e6).at[2, 0, 0].set(jnp.nan)
    scope = scopes.Unit(stacked=0)
    clipped, state = compiled(clip, scope=scope)(jnp.float32(1.0), {"kernel": layers})
    for i in (0, 1, 3):
        actual = np.asarray(clipped["kernel"][i], np.float64)
        expected = reference(clip, np.asarray(layers[i], np.float64), 1.0)
        atol = 2e-5 if i != 1 else 1e-2  # the input itself is rounded to 0.1
        np.testing.assert_allclose(actual, expected, atol=atol)
    np.testing.assert_array_equal(clipped["kernel"][2], layers[2])
    assert state.clip.nonfinite_steps == 1


def test_complex_matrices():
    one, other = normal((4, 6)), normal((4, 6), seed=1)
    z = jax.lax.complex(one, other)
    for clip in SPECTRA:
        clipped, _ = compiled(clip)(jnp.float32(1.0), {"kernel": z})
        expected = reference(clip, np.complex128(z), 1.0)
        np.testing.assert_allclose(clipped["kernel"], expected, atol=1e-5)


def test_within_the_bound_every_bit_passes():
    updates = normal(SHAPES)
    for bound in (100.0, np.inf):
        clipped, state = compiled(spectral_clip)(jnp.float32(bound), updates)
        assert_same(clipped, updates, rtol=0)
        assert state.clip.clipped_steps == 0


def test_clipping_twice_is_clipping_once():
    once, _ = compiled(spectral_clip)(jnp.float32(1.0), normal(SHAPES))
    again, _ = compiled(spectral_clip)(jnp.float32(1.0), once)
    assert_same(again, once, rtol=0, atol=1e-6)


def test_only_what_is_above_the_bound_changes():
    values = np.array([50.0, 5.0, 0.9, 0.5, 0.1, 0.01])
    matrix = with_values(values)
    clipped, _ = compiled(spectral_clip)(jnp.float32(1.0), {"kernel": matrix})
    left = np.linalg.svd(np.asarray(clipped["kernel"], np.float64), compute_uv=False)
    expected = np.minimum(values, 1)
    np.testing.assert_allclose(left[:6], expected, atol=1e-4)


# Any size


@each
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e6])
def test_a_large_value_does_not_hide_the_others(clip, size):
    """Squared in float32, the others are lost in its rounding."""
    matrix = with_values([size, 3.0, 1.5, 0.9, 0.5, 0.1])
    clipped, _ = compiled(clip)(jnp.float32(1.0), {"kernel": matrix})
    actual = np.asarray(clipped["kernel"], np.float64)
    expected = reference(clip, np.asarray(matrix, np.float64), 1.0)
    atol = 2e-4 + size * 2e-8  # the matrix itself is rounded by as much
    np.testing.assert_allclose(actual, expected, atol=atol)
    assert np.linalg.norm(actual, 2) <= 1 + 2e-4


@each
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_any_scale(clip, size):
    """The bound in the same scale gives the same; a bound of one holds."""
    updates = {"kernel": with_values([5.0, 3.0, 1.0, 0.5])}
    scaled = {"kernel": updates["kernel"] * jnp.float32(size)}
    plain, _ = compiled(clip)(jnp.float32(2.0), updates)
    same, _ = compiled(clip)(jnp.float32(2.0 * size), scaled)
    actual = np.asarray(same["kernel"], np.float64) / np.float32(size)
    np.testing.assert_allclose(actual, plain["kernel"], atol=1e-5)
    one, state = compiled(clip)(jnp.float32(1.0), scaled)
    assert np.linalg.norm(np.asarray(one["kernel"], np.float64), 2) <= 1 + 2e-4
    if size < 1:
        assert_same(one, scaled, rtol=1e-6)
    assert np.isfinite(state.clip.clipped_norm)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_rounded_once(clip, dtype):
    updates = {"kernel": normal((6, 9), dtype=dtype)}
    clipped, _ = compiled(clip)(jnp.float32(1.5), updates)
    assert clipped["kernel"].dtype == dtype
    expected = reference(clip, np.asarray(updates["kernel"], np.float64), 1.5)
    step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    actual = np.asarray(clipped["kernel"], np.float64)
    np.testing.assert_allclose(actual, expected, rtol=step, atol=1e-5)


# Edges


@each
def test_a_bound_of_zero_gives_zeros(clip):
    matrix, zeros = normal((4, 6)), jnp.zeros((4, 6))
    clipped, _ = compiled(clip)(jnp.float32(0.0), {"kernel": matrix})
    assert_same(clipped, {"kernel": zeros}, rtol=0)
    clipped, _ = compiled(clip)(jnp.float32(1.0), {"kernel": zeros})
    assert_same(clipped, {"kernel": zeros}, rtol=0)


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_matrix_passes_and_the_others_are_clipped(clip, bad):
    updates = {"a": {"kernel": normal((4, 6))}, "b": {"kernel": normal((4, 6), seed=1)}}
    good, _ = compiled(clip)(jnp.float32(1.0), updates)
    updates["a"]["kernel"] = updates["a"]["kernel"].at[1, 2].set(bad)
    clipped, state = compiled(clip)(jnp.float32(1.0), updates)
    np.testing.assert_array_equal(clipped["a"]["kernel"], updates["a"]["kernel"])
    assert_same(clipped["b"], good["b"], rtol=0)
    assert (state.clip.nonfinite_steps, state.clip.clipped_steps) == (1, 0)


@each
def test_which_leaves_and_which_axes(clip):
    updates = {"a": normal((4, 6)), "b": normal((4, 6), seed=1), "c": None}
    only_a = compiled(clip, where=lambda path, _: path == "a")
    clipped, _ = only_a(jnp.float32(1.0), updates)
    assert_same(clipped["b"], updates["b"], rtol=0)
    assert (clipped["a"] != updates["a"]).any()
    cube = {"kernel": normal((2, 3, 8))}
    by_row, _ = compiled(clip, scope=scopes.Unit(axis=0))(jnp.float32(1.0), cube)
    expected = reference(
        clip, np.asarray(cube["kernel"], np.float64).reshape(2, 24), 1.0
    )
    actual = np.asarray(by_row["kernel"], np.float64).reshape(2, 24)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_schedule_is_read_at_each_step():
    tx = spectral_clip(lambda step: 1.0 / (1 + step.astype(jnp.float32)))
    updates = {"kernel": normal((4, 6))}
    state, update = tx.init(updates), jax.jit(tx.update)
    for step in range(3):
        clipped, state = update(updates, state)
        size = np.linalg.norm(np.asarray(clipped["kernel"], np.float64), 2)
        np.testing.assert_allclose(size, 1 / (1 + step), rtol=1e-5)


@each
def test_what_cannot_be_right_is_refused(clip):
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        clip(-1.0)


# The norm alone


def test_spectral_norm_is_the_largest_singular_value():
    norm = jax.jit(norms.spectral_norm, static_argnames="steps")
    for seed in range(5):
        matrix = with_values([3.0, 2.5, 2.0, 1.0], seed=seed)
        found = np.float64(norm(matrix, steps=20))
        assert found.shape == (1, 1)
        assert 3 * 0.99 <= found <= 3 * (1 + 1e-6)
        np.testing.assert_allclose(norm(matrix, steps=100), 3, rtol=1e-5)


def test_spectral_norm_of_stacks_vectors_and_extremes():
    norm = jax.jit(norms.spectral_norm)
    stack = jnp.stack([with_values([5.0 * i, 1.0], seed=i) for i in (1, 2, 3)])
    found = jax.jit(norms.spectral_norm, static_argnums=1)(stack, (1, 2))
    assert found.shape == (3, 1, 1)
    np.testing.assert_allclose(found.ravel(), [5, 10, 15], rtol=1e-5)
    kernel = normal((3, 3, 2, 5)) + 3
    expected = np.linalg.norm(np.asarray(kernel, np.float64).reshape(18, 5), 2)
    np.testing.assert_allclose(norm(kernel).ravel(), expected, rtol=1e-5)
    assert norm(jnp.array([3.0, 4.0])) == 5
    matrix = with_values([3.0, 1.0])
    for size in (1e-30, 1e30):
        found = norm(matrix * jnp.float32(size))
        np.testing.assert_allclose(found / jnp.float32(size), 3, rtol=1e-5)
    half = norm(matrix.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, 3, rtol=2**-7)
    assert norm(jnp.zeros((3, 2))) == 0
    for bad in (jnp.nan, jnp.inf):
        assert not np.isfinite(norm(matrix.at[0, 0].set(bad))).any()


# Eight devices


SPLIT = {  # shape, stacked axes, how it is split
    "rows": ((16, 6), (), P("d")),
    "long rows": ((32, 3, 4), (), P("d")),
    "columns": ((6, 16), (), P(None, "d")),
    "stack": ((8, 4, 6), (0,), P("d")),
    "both, of two": ((4, 8, 6), (0,), P("e", "d")),
    "whole": ((4, 6), (), P()),
}


def on_mesh(make, **options):
    """The clip of all of them inside `shard_map`, and its state."""
    mesh = jax.make_mesh(
        (4, 2), ("d", "e"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    specs = {name: {"kernel": spec} for name, (_, _, spec) in SPLIT.items()}

    def update(updates):
        tx = make(
            specs=lambda path, _: SPLIT[path.split("/")[0]][2],
            axis_name=("d", "e"),
        )
        return tx.update(updates, tx.init(updates))

    return jax.jit(
        jax.shard_map(
            update, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()), **options
        )
    )


def split_updates():
    """One of them with a value so large that it takes two rounds."""
    updates = {name: {"kernel": normal(shape)} for name, (shape, _, _) in SPLIT.items()}
    updates["stack"]["kernel"] = updates["stack"]["kernel"].at[5].multiply(1e4)
    return updates


def stacked(path, leaf):
    return SPLIT[path.split("/")[0]][1]


CLIPS = {
    "hard": functools.partial(spectral_clip, 1.0, scope=scopes.Unit(stacked=stacked)),
    "soft": functools.partial(spectra_clip, 1.0, scope=scopes.Unit(stacked=stacked)),
    "norm of leaves": functools.partial(
        clip_by, Bound(1.0, scopes.Leaf(), norms.spectral_norm)
    ),
    "norm of layers": functools.partial(
        clip_by, Bound(1.0, scopes.Layer(stacked), norms.spectral_norm)
    ),
}


@pytest.mark.parametrize("name", CLIPS)
def test_in_shard_map_a_matrix_may_be_split(name):
    updates = split_updates()
    expected = jax.device_get(jax.jit(functools.partial(both, CLIPS[name]()))(updates))
    for check_vma in (True, False):
        actual = jax.device_get(on_mesh(CLIPS[name], check_vma=check_vma)(updates))
        assert_same(actual[0], expected[0], rtol=1e-4, atol=2e-4)
        if check_vma:  # else no one knows which leaves are whole on each device
            assert_same(actual[1], expected[1], rtol=1e-4)


def both(tx, updates):
    return tx.update(updates, tx.init(updates))


def on_rows(function, names="d"):
    """Compiled for eight devices that hold two rows each of a matrix."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(names)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(spec,), out_specs=spec))


def first_step(tx, updates):
    return both(tx, updates)[0]


@pytest.mark.parametrize("norm", [False, True])
def test_in_shard_map_what_cannot_be_found_is_refused(norm):
    hard = functools.partial(spectral_clip, 1.0)
    by_norm = functools.partial(clip_by, Bound(1.0, norm=norms.spectral_norm))
    make, matrix = (by_norm if norm else hard), normal((16, 16))

    def run(names="d", **options):
        return on_rows(functools.partial(first_step, make(**options)), names)(matrix)

    with pytest.raises(ValueError, match=r"Give `axis_name`, and as `specs`"):
        run()
    with pytest.raises(ValueError, match=r"over the mesh axes \('d',\)"):
        run(axis_name="d")
    alone, clip = run(axis_name=()), jax.jit(functools.partial(first_step, make()))
    for i in (0, 7):
        own = slice(2 * i, 2 * i + 2)
        assert_same(alone[own], clip(matrix[own]), atol=1e-5)
    assert_same(run(None), clip(matrix), atol=1e-5)


def test_in_shard_map_the_norm_alone_asks_for_a_spec():
    with pytest.raises(ValueError, match="Give `spec`"):
        on_rows(norms.spectral_norm)(normal((16, 16)))


def test_in_shard_map_rows_and_columns_cannot_both_be_split():
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=axis_types)
    spec = P("d", "e")

    def run(tx):
        clip = functools.partial(first_step, tx)
        return jax.jit(jax.shard_map(clip, mesh=mesh, in_specs=spec, out_specs=spec))

    options = {"specs": lambda *_: spec, "axis_name": ("d", "e")}
    x = normal((16, 8))
    with pytest.raises(ValueError, match="one of them is whole"):
        run(spectral_clip(1.0, **options))(x)
    by_norm = clip_by(Bound(1.0, norm=norms.spectral_norm), **options)
    alone = clip_by(Bound(1.0, norm=norms.spectral_norm))
    expected = jax.jit(functools.partial(first_step, alone))(x)
    assert_same(run(by_norm)(x), expected, rtol=1e-5)


def test_on_an_explicit_mesh_a_matrix_may_be_split_along_every_axis():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=explicit)
    specs = {"rows": P("d"), "both": P("d", "e"), "conv": P(None, None, "e", "d")}
    shapes = {"rows": (8, 6), "both": (8, 6), "conv": (1, 3, 2, 8)}
    updates = {name: {"kernel": normal(shape)} for name, shape in shapes.items()}
    tx = spectral_clip(1.0)
    expected, _ = tx.update(updates, tx.init(updates))
    with jax.set_mesh(mesh):
        split = {
            name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name]))
            for name, leaf in updates.items()
        }
        clipped, _ = jax.jit(tx.update)(split, tx.init(split))
    assert_same(jax.device_get(clipped), jax.device_get(expected), atol=1e-5)
    for name, leaf in clipped.items():
        before, after = split[name]["kernel"].sharding, leaf["kernel"].sharding
        assert after.is_equivalent_to(before, leaf["kernel"].ndim)
