"""How layers share a sparsity: exact totals, floors, and the loops of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import allocations

LENET = ((784, 300), (300, 100), (100, 10))
CONVS = ((3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (1, 1, 16, 32), (32, 10))
SMALL = ((2, 2), (), (7,), (1, 5), (30, 30))
HUGE = ((50_000, 4096), (4096, 50_000), *((4096, 16_384), (16_384, 4096)) * 24)
NETWORKS = {"lenet": LENET, "convs": CONVS, "small": SMALL, "huge": HUGE}
SPARSITIES = [0.0, 0.1, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]
ALL = [allocations.uniform, allocations.global_, allocations.erdos_renyi_kernel]

each_network = pytest.mark.parametrize("shapes", NETWORKS.values(), ids=NETWORKS)
each_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)
each_allocation = pytest.mark.parametrize("allocation", ALL, ids=lambda a: a.__name__)


def sizes(shapes):
    return [int(np.prod(shape, dtype=np.int64)) for shape in shapes]


def numbers(count):
    """Python integers from the two words of each count."""
    pairs = zip(np.asarray(count.high), np.asarray(count.low), strict=True)
    return [int(high) * 2**16 + int(low) for high, low in pairs]


def rest(sparsity, size):
    """n - ⌈s·n⌉ in integers."""
    return size - -(-round(sparsity * 10**7) * size // 10**7)


@each_network
@each_sparsity
def test_uniform_keeps_its_share_of_every_array(shapes, sparsity):
    budget = allocations.uniform(shapes, sparsity)
    expected = [max(rest(sparsity, n), min(1, n)) for n in sizes(shapes)]
    assert numbers(budget.kept) == expected
    assert budget.groups == tuple(range(len(shapes)))


@each_network
@each_sparsity
def test_global_keeps_its_share_of_all_arrays_together(shapes, sparsity):
    budget = allocations.global_(shapes, sparsity)
    least = sum(min(1, n) for n in sizes(shapes))
    assert numbers(budget.kept) == [max(rest(sparsity, sum(sizes(shapes))), least)]
    assert budget.groups == (0,) * len(shapes)
    assert budget.floors == tuple(min(1, n) for n in sizes(shapes))


def erdos_renyi_kernel(shapes, wanted):
    """The loop of the paper: whoever would keep more than all becomes dense."""
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        if not sparse:
            return [float(n) for n in sizes(shapes)]
        ratios = {i: sum(shapes[i]) / sizes(shapes)[i] for i in sparse}
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
@each_sparsity
def test_erdos_renyi_kernel_is_that_of_the_paper(shapes, sparsity):
    total = sum(sizes(shapes))
    budget = allocations.erdos_renyi_kernel(shapes, sparsity)
    actual = np.array(numbers(budget.kept))
    wanted = rest(sparsity, total)
    assert sum(actual) == max(wanted, len(shapes))
    expected = np.maximum(erdos_renyi_kernel(shapes, wanted), 1)
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
    kept = numbers(budget.kept)
    if allocation is allocations.global_:
        assert min(1, min(sizes(shapes))) <= kept[0] <= sum(sizes(shapes))
    else:
        for number, size in zip(kept, sizes(shapes), strict=True):
            assert min(1, size) <= number <= size


@each_allocation
def test_sparsity_0_keeps_all_and_1_only_floors(allocation):
    shapes = ((4, 5), (3, 3), (0, 7))
    sums = [sum(numbers(allocation(shapes, s, floor=2).kept)) for s in (0.0, 1.0)]
    assert sums == [29, 4]


@each_allocation
@pytest.mark.parametrize("floor", [0, 1, 16])
def test_floors_hold(allocation, floor):
    shapes = ((3, 3), (40, 50))
    budget = allocation(shapes, 0.999, floor=floor)
    kept, own = numbers(budget.kept), [min(floor, 9), min(floor, 2000)]
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
        expected = numbers(allocation(shapes, sparsity).kept)
        assert numbers(share(jnp.float32(sparsity))) == expected


@each_allocation
def test_numbers_fall_with_the_sparsity(allocation):
    grid = np.linspace(0, 1, 41)
    totals = [sum(numbers(allocation(LENET, float(s)).kept)) for s in grid]
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
