"""Patterns against plain NumPy definitions: every dtype, ties, one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import clipjax
from clipjax import allocations, patterns
from clipjax.patterns import Blocks, Channels, Combined, FanIn, NofM, Unstructured
from clipjax.patterns._by_path import marks
from clipjax.scores import Magnitude
from helpers import assert_same, x64

SHAPE = (16, 24)


def draw(dtype="float32", *, shape=SHAPE, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, shape) if ties else rng.normal(size=shape)
    return jnp.asarray(x, dtype)


def mark(pattern, *scores, sparsity=0.5, allocation=allocations.uniform):
    named = {str(i): x for i, x in enumerate(scores)}
    masks = pattern.masks(named, sparsity, allocation=allocation)
    assert list(masks) == list(named)
    return list(masks.values())


marked = jax.jit(mark, static_argnums=0, static_argnames=("sparsity", "allocation"))


def top(scores, count):
    """The highest `count` of a vector, the first of equals first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    mask = np.zeros(len(order), bool)
    mask[order[:count]] = True
    return mask


def rest(sparsity, size):
    return size - int(np.ceil(round(sparsity * 1e7) / 1e7 * size - 1e-9))


def n_of_m(x, n, m, axis):
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    groups = moved.reshape(-1, m)
    mask = np.stack([top(group, n) for group in groups]).reshape(moved.shape)
    return np.moveaxis(mask, -1, axis)


def blocks(x, shape, sparsity, pool):
    x = np.asarray(x, np.float64)
    height, width = shape
    grid = x.reshape(x.shape[0] // height, height, x.shape[1] // width, width)
    pooled = pool(grid)
    mask = top(pooled.ravel(), rest(sparsity, pooled.size)).reshape(pooled.shape)
    return np.kron(mask, np.ones(shape)).astype(bool)


def l2(grid):
    above, below = (np.maximum(x, 0) ** 2 for x in (grid, -grid))
    return np.sqrt(above.sum((1, 3))) - np.sqrt(below.sum((1, 3)))


def fan_in(x, sparsity, axis):
    columns = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    flat = columns.reshape(-1, columns.shape[-1])
    count = max(rest(sparsity, flat.size) // flat.shape[1], 1)
    mask = np.stack([top(column, count) for column in flat.T], axis=-1)
    return np.moveaxis(mask.reshape(columns.shape), -1, axis)


POOLS = {
    "mean": lambda grid: grid.mean((1, 3)),
    "max": lambda grid: grid.max((1, 3)),
    "l2": l2,
}
CASES = {
    "2:4": (NofM(2, 4), lambda x: n_of_m(x, 2, 4, -1)),
    "1:8 rows": (NofM(1, 8, axis=0), lambda x: n_of_m(x, 1, 8, 0)),
    **{
        name: (
            Blocks((2, 3), pool=getattr(patterns, name)),
            lambda x, pool=pool: blocks(x, (2, 3), 0.5, pool),
        )
        for name, pool in POOLS.items()
    },
    "channels": (
        Channels(pool=patterns.mean),
        lambda x: np.broadcast_to(top(np.asarray(x, float).mean(0), 12), SHAPE),
    ),
    "fan-in": (FanIn(), lambda x: fan_in(x, 0.5, -1)),
    "fan-out": (FanIn(axis=0), lambda x: fan_in(x, 0.5, 0)),
    "unstructured": (
        Unstructured(),
        lambda x: top(np.asarray(x, float).ravel(), 192).reshape(SHAPE),
    ),
}


@functools.partial(jax.jit, static_argnames=("names", "sparsity"))
def all_marked(x, *, names=tuple(CASES), sparsity=0.5):
    return {name: mark(CASES[name][0], x, sparsity=sparsity)[0] for name in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_masks_are_those_of_numpy(dtype):
    with x64(dtype == "float64"):
        for ties in (False, True):
            x = draw(dtype, ties=ties)
            for name, mask in all_marked(x).items():
                pattern, expected = CASES[name]
                assert isinstance(pattern, patterns.Pattern)
                np.testing.assert_array_equal(mask, expected(x), err_msg=name)


@pytest.mark.parametrize(
    "kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"]
)
@pytest.mark.parametrize(
    ("shape", "spec", "names"),
    [
        ((64, 24), P("d"), ("1:8 rows", *POOLS)),
        (
            (48, 32),
            P(None, "d"),
            ("2:4", "channels", "fan-in", "fan-out", "unstructured"),
        ),
    ],
)
def test_a_mesh_changes_nothing_and_gathers_nothing(kind, shape, spec, names):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
    sharding = jax.NamedSharding(mesh, spec)
    there = jax.device_put(draw(shape=shape), sharding)
    compiled = all_marked.lower(there, names=names).compile()
    assert "all-gather" not in compiled.as_text()
    for ties in (False, True):
        x = draw(shape=shape, ties=ties)
        masks = compiled(jax.device_put(x, sharding))
        for name, mask in all_marked(x, names=names).items():
            np.testing.assert_array_equal(masks[name], mask, err_msg=name)
            assert masks[name].sharding.is_equivalent_to(sharding, 2)


def test_everything_stays_at_sparsity_zero():
    for name, mask in all_marked(draw(), sparsity=0.0).items():
        assert mask.all(), name


def test_magnitudes_are_taken_for_scores():
    x = draw()
    of_magnitudes = jax.jit(lambda x: all_marked(Magnitude(x)))
    assert_same(of_magnitudes(x), all_marked(abs(x)), rtol=0)


def test_nan_ranks_lowest():
    x = jnp.array([[jnp.nan, -jnp.inf, 1.0, jnp.nan]])
    for pattern in (NofM(2, 4), FanIn(axis=0), Unstructured()):
        assert marked(pattern, x)[0].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("pattern", "axis"),
    [(NofM(2, 5), -1), (Blocks((1, 5)), -1), (NofM(2, 5, axis=0), 0)],
)
def test_a_length_that_does_not_fit_is_refused_or_stays_dense(pattern, axis):
    name, axis = type(pattern).__name__, axis % 2
    message = rf"^{name}.* needs axis {axis} to be a multiple of 5 long.*\(16, 24\)"
    with pytest.raises(ValueError, match=message):
        mark(pattern, draw())
    kind, fields = type(pattern), vars(pattern) | {"dense_if_ragged": True}
    assert marked(kind(**fields), draw())[0].all()


def test_blocks_leave_ragged_leaves_out_of_the_count():
    pattern = Blocks((2, 3), dense_if_ragged=True)
    both = marked(pattern, draw(), draw(shape=(5, 7)), allocation=allocations.global_)
    assert both[1].all()
    assert int(both[0].sum()) == 192


def test_blocks_of_a_convolution_lie_over_inputs_and_outputs():
    x = draw(shape=(3, 3, 4, 6))
    mask = np.asarray(marked(Blocks((2, 3), pool=patterns.max), x, sparsity=0.75)[0])
    grid = mask.reshape(3, 3, 2, 2, 2, 3)
    assert (grid.all((3, 5)) == grid.any((3, 5))).all()
    assert mask.sum() == 9 * 6


def test_an_axis_has_to_exist():
    for pattern in (NofM(2, 4, axis=2), Channels(axis=-3), FanIn(axis=5)):
        with pytest.raises(ValueError, match=r"needs an axis .*\(16, 24\)"):
            mark(pattern, draw())
    with pytest.raises(ValueError, match=r"names an axis .* twice"):
        mark(Blocks((2, 2), axes=(0, -2)), draw())
    with pytest.raises(
        ValueError, match=r"^shape must have one length for each of axes"
    ):
        Blocks((2, 2, 2))
    with pytest.raises(ValueError, match=r"^n must lie between 0 and 4, but is 5"):
        NofM(5, 4)


def test_channels_compete_over_all_leaves():
    small, large = draw(shape=(8, 6)), 10 * draw(shape=(4, 10))
    masks = marked(
        Channels(), small, large, sparsity=0.75, allocation=allocations.global_
    )
    masks = [np.asarray(mask) for mask in masks]
    counts = [int(mask.all(0).sum()) for mask in masks]
    assert counts == [int(mask.any(0).sum()) for mask in masks] == [1, 3]


def test_units_of_negative_scores_go_first():
    """Movement towards zero, or what `scores.Random` says of pruned units."""
    scores = jnp.float32([[-5, 1, 0.5], [-1, 1, 0.1]])
    kept = marked(Channels(), scores, sparsity=1 / 3)[0][0]
    assert kept.tolist() == [False, True, True]


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_of_scores_may_leave_the_range(size):
    scores = jnp.float32([[1, 3, 2], [1, 3, 2]]) * jnp.float32(size)
    kept = marked(Channels(), scores, sparsity=1 / 3)[0][0]
    assert kept.tolist() == [False, True, True]


def test_every_unit_has_the_same_number_whatever_the_sparsity():
    run = jax.jit(lambda x, s: mark(FanIn(), x, sparsity=s)[0])
    for sparsity in (0.0, 0.3, 0.9, 0.99, 1.0):
        mask = run(draw(), jnp.float32(sparsity))
        columns = max(rest(sparsity, 384) // 24, 1)
        assert (mask.sum(0) == columns).all()


def test_constant_fan_in_takes_what_a_leaf_wins_from_the_others():
    small, large = abs(draw()), 3 * abs(draw(seed=1))
    masks = marked(FanIn(), small, large, allocation=allocations.global_)
    both = np.concatenate([small.ravel(), large.ravel()])
    wins = top(both, 384).reshape(2, -1).sum(1)
    assert [int(mask.sum()) for mask in masks] == [n // 24 * 24 for n in wins]
    assert wins[0] < wins[1]


def test_constant_fan_in_of_leaves_of_several_shapes():
    shapes = [(16, 24), (5, 3), (2, 3, 8), (1, 4), (7, 1)]
    scores = [draw(shape=shape, ties=True, seed=i) for i, shape in enumerate(shapes)]
    masks = marked(FanIn(), *scores, sparsity=0.3)
    for x, mask in zip(scores, masks, strict=True):
        np.testing.assert_array_equal(mask, fan_in(x, 0.3, -1))
    lowered = jax.jit(lambda xs: mark(FanIn(), *xs)).lower(scores).as_text()
    assert lowered.count("stablehlo.while") == 1


def test_n_of_m_inside_channels():
    x = draw()
    both = np.asarray(marked(Combined(Channels(), NofM(2, 4, axis=0)), abs(x))[0])
    kept = top(np.linalg.norm(np.asarray(x), axis=0), 12)
    inner = n_of_m(abs(x), 2, 4, 0)
    np.testing.assert_array_equal(both, inner & kept)
    assert both.sum() == 12 * 8


def test_entries_inside_channels_meet_the_total():
    pattern = Combined(Channels(), Unstructured(), outer_sparsity=0.25)
    mask = np.asarray(marked(pattern, abs(draw()), sparsity=0.9)[0])
    assert int(mask.sum()) == rest(0.9, 384)
    assert int(mask.any(0).sum()) <= 18
    assert marked(pattern, abs(draw()), sparsity=0.0)[0].all()


def test_patterns_go_by_path():
    scores = {"a": draw(), "b": draw(seed=1), "c": draw(seed=2)}

    @jax.jit
    def run(scores):
        def pattern(path, leaf):
            assert leaf is scores[path]
            return NofM(1, 4) if path == "b" else Unstructured()

        return marks(
            scores, scores, 0.9, pattern=pattern, allocation=allocations.global_
        )

    masks = run(scores)
    assert list(masks) == ["a", "b", "c"]
    np.testing.assert_array_equal(masks["b"], n_of_m(scores["b"], 1, 4, -1))
    flat = np.concatenate([np.ravel(scores[name]) for name in "ac"])
    expected = top(flat, rest(0.9, 768))
    np.testing.assert_array_equal(np.ravel(masks["a"]), expected[:384])
    np.testing.assert_array_equal(np.ravel(masks["c"]), expected[384:])
    with pytest.raises(
        TypeError, match=r"^pattern must return .* at 'a' it returned 3"
    ):
        marks(
            scores, scores, 0.9, pattern=lambda p, x: 3, allocation=allocations.uniform
        )


def test_in_shard_map_units_must_not_be_split():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(pattern):
        def local(x):
            masks = pattern.masks(
                {"x": x}, 0.5, allocation=allocations.uniform, axis_name="d"
            )
            return masks["x"]

        return jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        )

    x = draw(shape=(16, 8))
    for pattern in (Channels(), FanIn()):
        with pytest.raises(
            ValueError, match=r"compares whole units.*local shape \(2, 8\)"
        ):
            run(pattern)(x)
    for pattern in (NofM(2, 4), Blocks((2, 4))):
        np.testing.assert_array_equal(run(pattern)(x), marked(pattern, x)[0])


def test_a_ragged_leaf_may_stay_dense_beside_others_that_go_by_path():
    blocks = Blocks((2,), (0,), dense_if_ragged=True)
    kernels = {"even": draw(shape=(8, 4)), "odd": draw(shape=(7, 4), seed=1)}
    prune = functools.partial(
        clipjax.prune,
        sparsity=0.5,
        pattern=blocks,
        allocation=allocations.by_path(lambda path, sparsity: sparsity),
    )
    sparse = jax.jit(prune)(kernels)
    assert jnp.count_nonzero(sparse["odd"]) == 28
    assert jnp.count_nonzero(sparse["even"]) == 16
