"""The k-th largest and masks, against NumPy's stable sort."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from clipjax import selection
from clipjax.scores import Magnitude
from clipjax.selection import _counts as counts, _select
from helpers import assert_same, integers, normal, x64

N = 257
FLOATS = ["float32", "bfloat16", "float16"]
DTYPES = [*FLOATS, "float64"]
kth = jax.jit(selection.kth_largest)
largest = jax.jit(selection.largest)


def ranking(scores):
    """Indices from the highest score to the lowest: NaN last, ties by their place."""
    wide = np.asarray(scores).astype(np.float64).ravel() + 0.0  # -0.0 is 0.0
    numbers = np.where(np.isnan(wide), 0, wide)
    return np.lexsort((np.arange(wide.size), -numbers, np.isnan(wide)))


def first(scores, k):
    """The mask of the k highest scores."""
    mask = np.zeros(np.size(scores), bool)
    mask[ranking(scores)[:k]] = True
    return mask.reshape(np.shape(scores))


def magnitude(x):
    return np.abs(np.asarray(x).astype(np.float64))


def kept(*numbers):
    return counts.of(numbers)


@functools.partial(jax.jit, static_argnames=("groups", "floors"))
def select(scores, kept, groups, floors=()):
    return selection.select(scores, kept, groups, floors=floors)


@functools.cache
def draws(dtype="float32"):
    """Arrays that are hard to rank, by name."""
    shape, x = (N,), normal((N,))
    rng = np.random.default_rng(0)
    tiny = np.float32(1e-42) * rng.integers(-3, 4, shape)
    arrays = {
        "normal": x,
        "ties": jnp.round(x * 2) / 2,
        "constant": jnp.full(shape, -0.75),
        "zeros": jnp.zeros(shape),
        "signed zeros": jnp.where(x > 0, 0.0, -0.0),
        "zeros and more": jnp.where(abs(x) < 1, 0.0, x),
        "heavy tails": jnp.exp(8 * x),
        "uniform": jnp.asarray(rng.uniform(0, 1, shape), jnp.float32),
        "two values": jnp.where(x > 1, 3.0, 1e-6),
        "one outlier": jnp.full(shape, 1e-3).at[17].set(1e4),
        "infinite": jnp.where(x > 1.5, jnp.inf, jnp.where(x < -1.5, -jnp.inf, x)),
        "NaN": jnp.where(x > 1, jnp.nan, x),
        "all NaN": jnp.full(shape, jnp.nan),
        "subnormal": jnp.asarray(tiny, jnp.float32),
        "sorted": jnp.sort(x),
        "integers": jnp.arange(-100, N - 100, dtype=jnp.float32),
        "powers": jnp.exp2(jnp.arange(N, dtype=jnp.float32) / 4 - 32),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}


ARRAYS = [*draws()]
each_array = pytest.mark.parametrize("name", ARRAYS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# One array


@each_dtype
@each_array
def test_kth_largest_is_that_of_a_sort(name, dtype):
    with x64(dtype == "float64"):
        x = draws(dtype=dtype)[name]
        ranked = magnitude(x)[ranking(magnitude(x))]
        for k in (1, 2, N // 7, N // 2, N - 1, N):
            actual = kth(x, jnp.int32(k))
            assert actual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
            np.testing.assert_array_equal(actual, ranked[k - 1])


@each_dtype
@each_array
def test_largest_are_those_of_a_stable_sort(name, dtype):
    with x64(dtype == "float64"):
        x = draws(dtype=dtype)[name]
        for k in (0, 1, N // 7, N // 2, N - 1, N):
            mask = largest(x, jnp.int32(k))
            np.testing.assert_array_equal(mask, first(magnitude(x), k))


@each_dtype
@each_array
def test_scores_may_be_negative(name, dtype):
    with x64(dtype == "float64"):
        x = draws(dtype=dtype)[name]
        for k in (0, 1, N // 3, N - 1, N):
            (mask,) = select([x], kept(k), (0,))
            np.testing.assert_array_equal(mask, first(x, k))


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitudes_rank_as_their_array_does(dtype):
    x = normal((17, 15), dtype=dtype).at[3].set(jnp.nan)
    written = jax.jit(select, static_argnums=2)([jnp.abs(x)], kept(40), (0,))
    unwritten = jax.jit(
        lambda x, kept: select([Magnitude(x)], kept, (0,)),
    )(x, kept(40))
    assert_same(unwritten, written)
    assert jnp.sum(unwritten[0]) == 40


def test_float64_is_not_rounded_to_float32():
    with x64():
        x = 1 + jnp.arange(9, dtype=jnp.float64) * 1e-15
        np.testing.assert_array_equal(kth(x, 3), x[-3])
        np.testing.assert_array_equal(largest(x, 4), np.arange(9) >= 5)


def test_k_is_brought_into_range_when_traced():
    x = normal((9,))
    assert_same(kth(x, jnp.int32(0)), jnp.max(abs(x)), rtol=0)
    assert_same(kth(x, jnp.int32(99)), jnp.min(abs(x)), rtol=0)
    assert largest(x, jnp.int32(99)).all()
    assert not largest(x, jnp.int32(-5)).any()


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_is_checked_when_it_is_known(k):
    with pytest.raises(ValueError, match=rf"^k must lie between 1 and .*9, but is {k}"):
        selection.kth_largest(jnp.ones(9), k)


def test_there_is_no_largest_of_nothing():
    with pytest.raises(ValueError, match=r"^k must lie between 1 and the number"):
        selection.kth_largest([], 1)
    assert selection.largest([], 1) == []
    assert largest(jnp.ones((0, 3)), 1).shape == (0, 3)
    assert_same(kth([jnp.ones((0, 3)), jnp.ones(2)], 2), jnp.float32(1), rtol=0)


def test_a_traced_k_compiles_once():
    chex.clear_trace_counter()
    search = jax.jit(chex.assert_max_traces(selection.largest, n=1))
    x = normal((33,))
    for k in range(34):
        assert search(x, jnp.int32(k)).sum() == k


def test_complex_entries_rank_by_magnitude():
    z = jax.lax.complex(jnp.array([3.0, 0.0, 1.0]), jnp.array([4.0, 5.5, 0.0]))
    assert_same(kth(z, 2), jnp.float32(5), rtol=0)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=150)
@hypothesis.given(
    x=hypothesis.extra.numpy.arrays(
        np.float32,
        (24,),
        elements=st.floats(width=32)
        | st.sampled_from([0.0, -0.0, 1.0, 1.0000001, np.nan, np.inf, 1e-45, 1e38]),
        fill=st.nothing(),
    ),
    k=st.integers(0, 24),
)
def test_any_values_are_ranked_as_numpy_does(x, k):
    np.testing.assert_array_equal(largest(x, jnp.int32(k)), first(magnitude(x), k))
    (mask,) = select([jnp.asarray(x)], kept(k), (0,))
    np.testing.assert_array_equal(mask, first(x, k))


# Many arrays

SHAPES = [(7, 5), (), (40,), (0,), (2, 3, 4)]


def many(dtype="float32", *, ties=False):
    arrays = [normal(shape, seed=i) for i, shape in enumerate(SHAPES)]
    arrays = [jnp.round(x * 2) / 2 if ties else x for x in arrays]
    return [x.astype(dtype) for x in arrays]


def cut(mask, arrays):
    """Splits one long mask into those of the arrays."""
    ends = np.cumsum([x.size for x in arrays])[:-1]
    parts = zip(np.split(mask, ends), arrays, strict=True)
    return [part.reshape(x.shape) for part, x in parts]


def flat(arrays):
    return np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in arrays])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 13, 50, 99, 100])
def test_a_tree_is_ranked_as_one_array(k, ties):
    tree = many(ties=ties)
    expected = cut(first(np.abs(flat(tree)), k), tree)
    assert_same(largest(tree, jnp.int32(k)), [jnp.asarray(m) for m in expected])
    if k:
        ranked = np.sort(np.abs(flat(tree)))[::-1]
        np.testing.assert_array_equal(
            kth(tree, jnp.int32(k)), np.float32(ranked[k - 1])
        )


def test_dtypes_may_be_mixed():
    tree = [normal((20,), dtype=dtype, seed=i) for i, dtype in enumerate(FLOATS)]
    expected = cut(first(np.abs(flat(tree)), 25), tree)
    assert_same(largest(tree, 25), [jnp.asarray(mask) for mask in expected])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("numbers", [(1, 0, 40, 3), (34, 1, 0, 24), (5, 1, 7, 12)])
def test_every_group_keeps_its_own_number(numbers, ties):
    scores = [x for x in many(ties=ties) if x.size]
    masks = select(scores, kept(*numbers), (0, 1, 2, 3))
    for mask, x, number in zip(masks, scores, numbers, strict=True):
        np.testing.assert_array_equal(mask, first(x, number))


@pytest.mark.parametrize("ties", [False, True])
def test_arrays_of_one_type_are_searched_in_turns(ties):
    shapes = [(4, 6), (5,), (4, 6), (), (4, 6), (5,), (4, 6)]
    scores = [normal(shape, seed=i) for i, shape in enumerate(shapes)]
    scores = [jnp.round(x * 2) / 2 if ties else x for x in scores]
    numbers = (3, 5, 24, 1, 0, 2, 11)
    masks = select(scores, kept(*numbers), tuple(range(7)))
    for mask, x, number in zip(masks, scores, numbers, strict=True):
        np.testing.assert_array_equal(mask, first(x, number))


def test_a_search_has_one_loop_for_all_arrays_and_one_for_turns():
    def loops(copies):
        xs = [jnp.ones((4, 6)), jnp.ones(5)] * copies
        numbers = jnp.ones(len(xs), jnp.int32)
        lowered = select.lower(xs, numbers, tuple(range(len(xs))))
        text = lowered.as_text()
        return text.count("stablehlo.while"), text.count("stablehlo.case")

    assert loops(2) == loops(5) == (2, 2)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("numbers", [(10, 20), (0, 60), (41, 1)])
def test_groups_may_hold_several_arrays(numbers, ties):
    """Arrays 0, 1 and 4 are compared with each other, and so are 2 and 3."""
    scores = many(ties=ties)
    masks = select(scores, kept(*numbers), (0, 0, 1, 1, 0))
    for group, members in enumerate([(0, 1, 4), (2, 3)]):
        own = [scores[i] for i in members]
        expected = cut(first(flat(own), numbers[group]), own)
        for i, mask in zip(members, expected, strict=True):
            np.testing.assert_array_equal(masks[i], mask)


@pytest.mark.parametrize("ties", [False, True])
def test_every_array_keeps_its_floor(ties):
    scores = many(ties=ties)
    scores[2] = scores[2] - 10  # would lose all
    floors = (2, 1, 3, 0, 0)
    masks = select(scores, kept(30), (0,) * 5, floors)
    assert [int(mask.sum()) for mask in masks][2] == 3
    assert sum(int(mask.sum()) for mask in masks) == 30
    np.testing.assert_array_equal(masks[2], first(scores[2], 3))
    others = [scores[i] for i in (0, 1, 3, 4)]
    expected = cut(first(flat(others), 27), others)
    if not expected[1].any():  # the scalar stays by its floor, for the last of these
        expected = cut(first(flat([others[0], others[3]]), 26), [others[0], others[3]])
        expected = [expected[0], np.True_, np.zeros(0, bool), expected[1]]
    for i, mask in zip((0, 1, 3, 4), expected, strict=True):
        np.testing.assert_array_equal(masks[i], mask)


def test_floors_win_over_the_number_to_keep():
    scores = [jnp.arange(4.0), jnp.arange(4.0) - 9]
    masks = select(scores, kept(1), (0, 0), (2, 2))
    assert_same([*map(jnp.sum, masks)], [jnp.int32(2)] * 2)


def test_more_than_there_is_keeps_all():
    assert all(mask.all() for mask in select(many(), kept(10**9), (0,) * 5))


def test_nan_is_kept_last():
    scores = [jnp.array([jnp.nan, -jnp.inf, jnp.nan, 2.0])]
    for k, expected in enumerate(["0000", "0001", "0101", "1101", "1111"]):
        (mask,) = select(scores, kept(k), (0,))
        assert "".join(str(int(bit)) for bit in mask) == expected


def test_arrays_beyond_the_index_are_refused():
    big = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(
        ValueError, match="2147483648 entries is too large to be ranked"
    ):
        jax.eval_shape(lambda x: selection.largest(x, 1), big)


# Compiled once, also where it is called eagerly


def test_a_search_is_traced_once_for_all_trees_of_the_same_shapes():
    first, other = (
        {"a": x, "b": x[:2]} for x in (normal((3, 5)), normal((3, 5), seed=1))
    )
    selection.largest(first, 4)
    before = _select._selected._cache_size()
    marks = selection.largest(other, 7)
    jax.jit(selection.largest, static_argnums=1)(other, 9)
    assert _select._selected._cache_size() == before
    assert sum(int(mark.sum()) for mark in marks.values()) == 7


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_an_eager_call_takes_split_arrays(kind):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
    x = normal((8, 6))
    split = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
    assert_same(selection.largest(split, 9), selection.largest(x, 9))
    assert_same(selection.kth_largest(split, 9), selection.kth_largest(x, 9))


# Counts beyond 2³¹


@functools.partial(
    jax.jit,
    static_argnums=2,
    compiler_options={"xla_backend_optimization_level": 2},  # worth it here
)
def among_billions(one, few, k):
    many = jnp.broadcast_to(one, (240 * 10**6,))
    return selection.kth_largest([many] * 9 + [few], k)


@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True])
def test_counts_beyond_an_int32(ties):
    """The same 240 million zeros and 257 numbers, nine times: more than 2³¹ entries."""
    zero, few = jnp.zeros([], jnp.bfloat16), normal((N,))
    few = jnp.round(few * 2) / 2 if ties else few
    ranked = jnp.sort(abs(few))[::-1]
    assert_same(among_billions(zero, few, 20), ranked[19], rtol=0)
    k = 9 * 240 * 10**6 + 20
    assert_same(among_billions(zero - 1, few / 4, k), ranked[19] / 4, rtol=0)


@pytest.mark.parametrize("k", [10, 50_000, 99_999])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sample_may_mislead(k, dtype):
    """The first thresholds come from a sample, of which every entry is large here.

    The answer then lies below all of them, in a bracket wider than an integer.
    """
    with x64(dtype == "float64"):
        x = np.random.default_rng(0).normal(size=100_000).astype(dtype)
        x[::12] += 1000
        actual = kth([jnp.asarray(x)], k)
        assert_same(actual, jnp.asarray(np.sort(abs(x))[-k]), rtol=0)


# Exact numbers


def exact(sparsity, size):
    """⌈s·n⌉ in integers, the sparsity read to seven decimals."""
    parts = round(float(np.float32(sparsity)) * 10**7)
    return -(-parts * size // 10**7)


def number(count):
    return int(count.high) * 2**16 + int(count.low)


SMALL = 0, 1, 7, 1000, 2**16 - 1, 2**16, 10**7 - 1, 10**7, 10**7 + 1, 2**31 - 1
SIZES = *SMALL, 2**31, 2**40 + 12345, 10**12, 10**12 + 7
zeros_of = jax.jit(counts.zeros_of, static_argnums=1)


def test_zeros_are_counted_exactly():
    special = [0, 1, 0.5, 0.9, 0.99, 0.999, 0.9999999, 1e-7, 1e-8, 1 / 3, 0.1]
    for sparsity in [*special, *np.random.default_rng(0).uniform(0, 1, 300)]:
        actual = zeros_of(jnp.float32(sparsity), SIZES)
        assert np.all((actual.low >= 0) & (actual.low < 2**16))
        expected = [exact(sparsity, size) for size in SIZES]
        assert integers(actual) == expected, sparsity


def test_every_array_may_have_its_own_sparsity():
    own = [0.5, 0.999, 1 / 3, 0.0]
    actual = zeros_of(jnp.float32(own), (7, 10**9, 10**7, 5))
    assert integers(actual) == [4, 999 * 10**6, 3_333_333, 0]


def test_a_decimal_is_read_as_it_was_meant():
    """A float32 0.999 is 0.99900001287; of 10⁹ entries it would keep 999,987."""
    assert number(zeros_of(jnp.float32(0.999), 10**9)) == 999 * 10**6


def test_sparsities_out_of_range_are_brought_into_it():
    assert number(zeros_of(jnp.float32(jnp.nan), 10)) == 0
    assert number(zeros_of(jnp.float32(-1), 10)) == 0
    assert number(zeros_of(jnp.float32(2), 10)) == 10


@pytest.mark.parametrize("value", [0, 1, 65_535, 65_536, 2**31 - 1, 2**31, 10**13])
def test_counts_hold_python_integers(value):
    assert number(counts.of(value)) == value
    if value < 2**32:
        assert number(counts.of(jnp.uint32(value))) == value


def test_counts_add_subtract_and_compare():
    numbers = [0, 1, 65_535, 65_536, 10**9, 2**31 + 5, 10**13]
    for a in numbers:
        for b in numbers:
            one, other = counts.of(a), counts.of(b)
            assert number(counts.total(counts.stack([one, other]))) == a + b
            assert number(one - other) == a - b
            assert bool(one.at_least(other)) == (a >= b)
            assert bool(one.equals(other)) == (a == b)
    total = counts.total(counts.stack([counts.of(n) for n in numbers * 10]))
    assert number(total) == 10 * sum(numbers)


def test_counts_are_brought_between_two_others():
    for n, expected in [(5, 70_000), (80_000, 80_000), (10**10, 90_000)]:
        low, high = counts.of(70_000), counts.of(90_000)
        assert number(counts.clip(counts.of(n), low, high)) == expected
    crossed = counts.clip(counts.of(5), counts.of(9), counts.of(7))
    assert number(crossed) == 7


def one_by_one(amounts, rooms, order, groups):
    """Fills rooms in plain integers; an amount is that of its group."""
    left = dict(zip(groups, amounts, strict=True))
    taken = [0] * len(rooms)
    for i in order:
        taken[i] = max(min(left[groups[i]], rooms[i]), 0)
        left[groups[i]] -= taken[i]
    return taken


@pytest.mark.parametrize("largest", [3, 10**5, 2**31 - 1])
def test_rooms_are_filled_one_after_the_other(largest):
    rng, n = np.random.default_rng(0), 6
    for _ in range(20):
        rooms = rng.integers(0, largest, n).tolist()
        groups = rng.integers(0, 3, n).tolist()
        order = rng.permutation(n)
        each = rng.integers(-largest, 3 * largest, 3)
        amounts = each[groups].tolist()
        own = counts.filled(counts.of(amounts), counts.of(rooms), groups=groups)
        assert integers(own) == one_by_one(amounts, rooms, range(n), groups)
        expected = one_by_one([amounts[0]] * n, rooms, order, [0] * n)
        for known in (order, jnp.asarray(order)):
            all_ = counts.filled(counts.of(amounts[0]), counts.of(rooms), order=known)
            assert integers(all_) == expected


def test_the_largest_come_first():
    assert counts.largest_first([3, 9, 0, 9]).tolist() == [1, 3, 0, 2]


def test_more_than_a_count_holds_is_refused():
    assert number(counts.of(2**47 - 1)) == 2**47 - 1
    with pytest.raises(OverflowError, match="below 2⁴⁷"):
        counts.of([1, 2**47])


def test_counts_become_floats():
    np.testing.assert_allclose(counts.of(10**10).to_float(), 1e10, rtol=1e-7)


# Over devices


@pytest.mark.parametrize("ties", [False, True])
def test_in_shard_map_devices_count_together(ties):
    shapes = {"columns": (2, 24), "few": (8, 2), "kept": (9,), "rows": (16, 3)}
    specs = {"columns": P(None, "d"), "few": P("d"), "kept": P(), "rows": P("d")}
    tree = {key: normal(shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    if ties:  # along the first axis only: the earlier device has the earlier places
        tree = {key: jnp.round(tree[key]) for key in ("few", "kept", "rows")}
    specs = {key: specs[key] for key in tree}
    axis_type = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_type)

    def both(tree):
        mask = selection.largest(tree, 40, axis_name="d")
        return mask, selection.kth_largest(tree, 40, axis_name="d")

    mapped = jax.shard_map(both, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()))
    mask, threshold = jax.device_get(jax.jit(mapped)(tree))
    leaves = jax.tree.leaves(tree)
    expected = cut(first(np.abs(flat(leaves)), 40), leaves)
    for one, other in zip(jax.tree.leaves(mask), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert threshold == np.float32(np.sort(np.abs(flat(leaves)))[-40])


def test_in_shard_map_each_device_may_rank_its_own():
    """Arrays that no axis name is given for differ from device to device."""
    rows = normal((8, 20))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def own(row):
        return selection.largest(row[0], 6)[None]

    mapped = jax.shard_map(own, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    masks = jax.jit(mapped)(rows)
    for mask, row in zip(jax.device_get(masks), rows, strict=True):
        np.testing.assert_array_equal(mask, first(np.abs(row), 6))
