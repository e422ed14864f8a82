"""How layers share a sparsity: exact totals, floors, and the loops of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import allocations, patterns
from clipjax.allocations._budget import exactly
from clipjax.scores import Magnitude
from clipjax.selection import _counts as counts
from helpers import integers

LENET = ((784, 300), (300, 100), (100, 10))
CONVS = ((3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (1, 1, 16, 32), (32, 10))
SMALL = ((2, 2), (), (7,), (1, 5), (30, 30))
HUGE = ((50_000, 4096), (4096, 50_000), *((4096, 16_384), (16_384, 4096)) * 24)
NETWORKS = {"lenet": LENET, "convs": CONVS, "small": SMALL, "huge": HUGE}
SPARSITIES = [0.0, 0.1, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]
ALL = [
    allocations.uniform,
    allocations.global_,
    allocations.erdos_renyi,
    allocations.erdos_renyi_kernel,
]

each_network = pytest.mark.parametrize("shapes", NETWORKS.values(), ids=NETWORKS)
each_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)
each_allocation = pytest.mark.parametrize("allocation", ALL, ids=lambda a: a.__name__)


def sizes(shapes):
    return [int(np.prod(shape, dtype=np.int64)) for shape in shapes]


def rest(sparsity, size):
    """n - ⌈s·n⌉ in integers."""
    return size - -(-round(sparsity * 10**7) * size // 10**7)


def test_a_sum_is_reached_from_the_largest_array_on():
    rng = np.random.default_rng(0)
    for _ in range(30):
        room = rng.integers(0, 10**6, 5)
        room[3] = room[1]  # of two as large the first
        floors = rng.integers(0, room + 1)
        kept = rng.integers(0, 10**6, 5)
        wanted = int(rng.integers(0, 1.2 * room.sum()))
        expected = np.clip(kept, floors, room)
        for i in np.argsort(-room, kind="stable"):
            moved = expected[i] + wanted - expected.sum()
            expected[i] = np.clip(moved, floors[i], room[i])
        words = (counts.of(x.tolist()) for x in (kept, floors))
        actual = exactly(counts.of(wanted), next(words), room.tolist(), next(words))
        assert integers(actual) == expected.tolist()


@each_network
@each_sparsity
def test_uniform_keeps_its_share_of_every_array(shapes, sparsity):
    budget = allocations.uniform(shapes, sparsity)
    expected = [max(rest(sparsity, n), min(1, n)) for n in sizes(shapes)]
    assert integers(budget.kept) == expected
    assert budget.groups == tuple(range(len(shapes)))


@each_network
@each_sparsity
def test_global_keeps_its_share_of_all_arrays_together(shapes, sparsity):
    budget = allocations.global_(shapes, sparsity)
    least = sum(min(1, n) for n in sizes(shapes))
    assert integers(budget.kept) == [max(rest(sparsity, sum(sizes(shapes))), least)]
    assert budget.groups == (0,) * len(shapes)
    assert budget.floors == tuple(min(1, n) for n in sizes(shapes))


def erdos_renyi(shapes, wanted, axes):
    """The loop of the paper: whoever would keep more than all becomes dense."""
    own = [shape[axes] for shape in shapes]
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        if not sparse:
            return [float(n) for n in sizes(shapes)]
        ratios = {i: sum(own[i]) / np.prod(own[i]) for i in sparse}
        mass = sum(ratios[i] * sizes(shapes)[i] for i in sparse)
        scale = (wanted - sum(sizes(shapes)[i] for i in dense)) / mass
        over = [i for i in sparse if scale * ratios[i] > 1 + 1e-12]
        if not over:
            return [
                float(n) if i in dense else scale * ratios[i] * n
                for i, n in enumerate(sizes(shapes))
            ]
        dense.add(max(over, key=lambda i: ratios[i]))


@pytest.mark.parametrize("shapes", [LENET, CONVS, HUGE])
@pytest.mark.parametrize(
    ("allocation", "axes"),
    [
        (allocations.erdos_renyi_kernel, slice(None)),
        (allocations.erdos_renyi, slice(-2, None)),
    ],
)
@each_sparsity
def test_erdos_renyi_is_that_of_the_paper(shapes, sparsity, allocation, axes):
    total = sum(sizes(shapes))
    budget = allocation(shapes, sparsity)
    actual = np.array(integers(budget.kept))
    wanted = rest(sparsity, total)
    assert sum(actual) == max(wanted, len(shapes))
    expected = np.maximum(erdos_renyi(shapes, wanted, axes), 1)
    # One array takes what rounding and float32 leave over.
    slack = len(shapes) + 1e-5 * total
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=slack)
    others = np.argsort(abs(actual - expected))[:-1]
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-5, atol=1.01)


@each_allocation
@each_network
@each_sparsity
def test_numbers_are_possible_and_no_array_dies(allocation, shapes, sparsity):
    budget = allocation(shapes, sparsity)
    kept = integers(budget.kept)
    if allocation is allocations.global_:
        assert min(1, min(sizes(shapes))) <= kept[0] <= sum(sizes(shapes))
    else:
        for number, size in zip(kept, sizes(shapes), strict=True):
            assert min(1, size) <= number <= size


@each_allocation
def test_sparsity_0_keeps_all_and_1_only_floors(allocation):
    shapes = ((4, 5), (3, 3), (0, 7))
    sums = [sum(integers(allocation(shapes, s, floor=2).kept)) for s in (0.0, 1.0)]
    assert sums == [29, 4]


@each_allocation
@pytest.mark.parametrize("floor", [0, 1, 16])
def test_floors_hold(allocation, floor):
    shapes = ((3, 3), (40, 50))
    budget = allocation(shapes, 0.999, floor=floor)
    kept, own = integers(budget.kept), [min(floor, 9), min(floor, 2000)]
    if allocation is allocations.global_:
        assert budget.floors == tuple(own)
        assert kept[0] >= sum(own)
    else:
        assert all(number >= least for number, least in zip(kept, own, strict=True))
        assert kept[1] >= 2 or floor


@each_allocation
@pytest.mark.parametrize("shapes", [LENET, CONVS, SMALL])
def test_a_traced_sparsity_gives_the_same_numbers(allocation, shapes):
    share = jax.jit(lambda sparsity: allocation(shapes, sparsity).kept)
    for sparsity in SPARSITIES:
        expected = integers(allocation(shapes, sparsity).kept)
        assert integers(share(jnp.float32(sparsity))) == expected


@each_allocation
def test_numbers_fall_with_the_sparsity(allocation):
    grid = np.linspace(0, 1, 41)
    totals = [sum(integers(allocation(LENET, float(s)).kept)) for s in grid]
    assert sorted(totals, reverse=True) == totals
    assert len(set(totals)) == len(totals)


@each_allocation
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_an_impossible_sparsity_is_refused(allocation, sparsity):
    with pytest.raises(ValueError, match=r"^sparsity must lie between 0 and 1, but is"):
        allocation(LENET, sparsity)


@each_allocation
def test_a_floor_is_a_whole_number(allocation):
    with pytest.raises(ValueError, match=r"^floor must be at least 0, but is -1"):
        functools.partial(allocation, floor=-1)(LENET, 0.5)
    with pytest.raises(TypeError):
        allocation(LENET, 0.5, floor=0.5)


# By path


def test_each_path_has_its_own_sparsity():
    def function(path, sparsity):
        return {"stem": 0.0, "head": sparsity / 2}.get(path)

    mine = allocations.by_path(function, floor=3)
    allocation = allocations.at_paths(mine, ["stem", "body", "head"])
    shapes = ((10, 10), (20, 10), (10, 4))
    share = jax.jit(lambda s: allocation(shapes, s).kept)
    assert integers(share(jnp.float32(0.8))) == [100, 40, 24]
    assert integers(share(jnp.float32(1.0))) == [100, 3, 20]
    with pytest.raises(ValueError, match=r"^by_path goes by path, but knows none"):
        mine(shapes, 0.5)
    wrong = allocations.at_paths(allocations.by_path(lambda path, s: 1.5), ["a"])
    with pytest.raises(ValueError, match=r"^the sparsity of 'a' must lie between 0"):
        wrong([(3,)], 0.5)


@each_allocation
@each_sparsity
def test_the_others_make_up_for_what_stays_dense(allocation, sparsity):
    names = ["stem", *(f"body{i}" for i in range(3)), "head"]
    mine = allocations.excluding(lambda path, _: path in ("stem", "head"), allocation)
    budget = allocations.at_paths(mine, names)(CONVS, sparsity)
    kept = dict(zip(range(max(budget.groups) + 1), integers(budget.kept), strict=True))
    dense = [sizes(CONVS)[0], sizes(CONVS)[-1]]
    assert [kept[budget.groups[0]], kept[budget.groups[-1]]] == dense
    wanted = rest(sparsity, sum(sizes(CONVS)))
    assert sum(kept.values()) == max(wanted, sum(dense) + 3)


# By scores


def scores_of(*scales, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(30, 20), (20, 10), (10, 4), (40, 50)]
    pairs = zip(scales, shapes, strict=False)
    return [jnp.asarray(abs(rng.normal(size=s)) * m, jnp.float32) for m, s in pairs]


@functools.partial(jax.jit, static_argnums=0)
def masks_by(allocation, scores, sparsity):
    return patterns.Unstructured().masks(scores, sparsity, allocation=allocation)


def kept_by(allocation, scores, sparsity):
    return [np.asarray(m) for m in masks_by(allocation, scores, jnp.float32(sparsity))]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_normalized_scores_compete(power):
    scores = scores_of(1.0, 100.0, 0.01)
    masks = kept_by(allocations.normalized(power, floor=0), scores, 0.8)
    wide = [np.float64(x) for x in scores]
    flat = np.concatenate([(x / np.linalg.norm(x) ** power).ravel() for x in wide])
    expected = np.zeros(flat.size, bool)
    expected[np.argsort(-flat, kind="stable")[: rest(0.8, 840)]] = True
    actual = np.concatenate([m.ravel() for m in masks])
    np.testing.assert_array_equal(actual, expected)


def lamp(scores, count):
    """The definition: every entry's share of the squares that are no smaller."""
    every = []
    for i, x in enumerate(scores):
        square = np.sort(np.float64(x).ravel() ** 2)[::-1]
        mass = np.array([square[square >= s].sum() for s in square])
        every += [(-s / (m or 1), i) for s, m in zip(square, mass, strict=True)]
    chosen = [i for _, i in sorted(every)[:count]]
    return [chosen.count(i) for i in range(len(scores))]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_lamp_is_its_definition_without_a_sort(sparsity):
    scores = scores_of(1.0, 100.0, 1e-6, 3.0)
    count = rest(sparsity, 2840)
    masks = kept_by(LAMP, scores, sparsity)
    assert [int(m.sum()) for m in masks] == lamp(scores, count)
    for mask, x in zip(masks, map(np.asarray, scores), strict=True):
        assert x[mask].min() >= x[~mask].max(initial=0)


LAMP = allocations.lamp()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 1.0])
def test_lamp_meets_the_total_whatever_the_scores(sparsity):
    """Ties, zeros, what is not a number, and the extremes of float32."""
    one, two, three, four = scores_of(1.0, 1.0, 1.0, 1.0)
    odd = [
        jnp.round(one),
        jnp.zeros_like(two),
        three.at[0].set(jnp.nan).at[1].set(jnp.inf) * 1e-30,
        four * 1e30,
    ]
    masks = kept_by(LAMP, odd, sparsity)
    assert sum(int(m.sum()) for m in masks) == max(rest(sparsity, 2840), 4)
    assert all(m.any() for m in masks)


def test_lamp_takes_magnitudes_and_floors_and_needs_scores():
    scores = scores_of(1.0, 1.0)
    signed = [Magnitude(-x) for x in scores]
    shapes = [x.shape for x in scores]
    _, one = allocations.allot(LAMP, scores, shapes, 0.9)
    _, other = allocations.allot(LAMP, signed, shapes, 0.9)
    assert integers(one.kept) == integers(other.kept) == lamp(scores, 80)
    _, floored = allocations.allot(allocations.lamp(floor=60), scores, shapes, 0.9)
    assert integers(floored.kept) == [60, 60]
    with pytest.raises(TypeError, match=r"^lamp needs scores"):
        LAMP(shapes, 0.9)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("allocation", [LAMP, allocations.normalized()])
def test_split_scores_share_alike_and_are_not_gathered(allocation, kind):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(abs(rng.normal(size=(16, n))), jnp.float32) for n in (9, 30)]
    spec = jax.NamedSharding(mesh, jax.P("d"))
    there = jax.device_put(scores, spec)
    run = jax.jit(
        lambda scores: patterns.Unstructured().masks(scores, 0.8, allocation=allocation)
    )
    compiled = run.lower(there).compile()
    assert "all-gather" not in compiled.as_text()
    for actual, expected in zip(compiled(there), run(scores), strict=True):
        np.testing.assert_array_equal(actual, expected)
