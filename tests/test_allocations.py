"""How layers share a sparsity: exact totals, floors, and the loops of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import allocations, compression, contrib, patterns
from clipjax.allocations._budget import exactly
from clipjax.scores import Magnitude
from clipjax.selection import _counts as counts
from helpers import integers, normal

LENET = ((784, 300), (300, 100), (100, 10))
CONVS = ((3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (1, 1, 16, 32), (32, 10))
SMALL = ((2, 2), (), (7,), (1, 5), (30, 30))
HUGE = ((50_000, 4096), (4096, 50_000), *((4096, 16_384), (16_384, 4096)) * 24)
NETWORKS = {"lenet": LENET, "convs": CONVS, "small": SMALL, "huge": HUGE}
SPARSITIES = [0.0, 0.1, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]
ALL = [
    allocations.uniform,
    allocations.global_,
    allocations.square_root,
    allocations.erdos_renyi,
    allocations.erdos_renyi_kernel,
]

each_network = pytest.mark.parametrize("shapes", NETWORKS.values(), ids=NETWORKS)
each_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)
each_allocation = pytest.mark.parametrize("allocation", ALL, ids=lambda a: a.__name__)


def names(shapes):
    return [str(i) for i in range(len(shapes))]


def kept(allocation, shapes, sparsity, scores=None):
    """What an allocation returns, in Python integers."""
    numbers = allocation(names(shapes), shapes, sparsity, scores)
    assert numbers.dtype == jnp.int32
    return numbers.tolist()


@functools.cache
def numbers_when_traced(allocation, shapes):
    return jax.jit(lambda sparsity: allocation(names(shapes), shapes, sparsity))


def traced_kept(allocation, shapes, sparsity):
    """The same, see below, of one program for all sparsities."""
    return numbers_when_traced(allocation, shapes)(jnp.float32(sparsity)).tolist()


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
@pytest.mark.parametrize("allocation", [allocations.uniform, allocations.global_])
def test_uniform_keeps_its_share_of_every_array(allocation, shapes, sparsity):
    """And so does what compares scores, where there are none."""
    expected = [max(rest(sparsity, n), min(1, n)) for n in sizes(shapes)]
    assert traced_kept(allocation, shapes, sparsity) == expected


def in_proportion(shapes, wanted, density):
    """The loop of the paper: whoever would keep more than all becomes dense."""
    dense = set()
    while True:
        sparse = [i for i in range(len(shapes)) if i not in dense]
        if not sparse:
            return [float(n) for n in sizes(shapes)]
        ratios = {i: density(shapes[i]) for i in sparse}
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
    ("allocation", "density"),
    [
        (allocations.erdos_renyi_kernel, lambda shape: sum(shape) / np.prod(shape)),
        (allocations.erdos_renyi, lambda s: sum(s[-2:]) / np.prod(s[-2:])),
        (allocations.square_root, lambda shape: np.prod(shape) ** -0.5),
    ],
)
@each_sparsity
def test_densities_are_in_proportion(shapes, sparsity, allocation, density):
    total = sum(sizes(shapes))
    actual = np.array(traced_kept(allocation, shapes, sparsity))
    wanted = rest(sparsity, total)
    assert sum(actual) == max(wanted, len(shapes))
    expected = np.maximum(in_proportion(shapes, wanted, density), 1)
    # One array takes what rounding and float32 leave over.
    slack = len(shapes) + 1e-5 * total
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=slack)
    others = np.argsort(abs(actual - expected))[:-1]
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-5, atol=1.01)


@each_allocation
@each_network
@each_sparsity
def test_numbers_are_possible_and_no_array_dies(allocation, shapes, sparsity):
    numbers = traced_kept(allocation, shapes, sparsity)
    for number, size in zip(numbers, sizes(shapes), strict=True):
        assert min(1, size) <= number <= size


@each_allocation
def test_sparsity_0_keeps_all_and_1_only_floors(allocation):
    shapes = ((4, 5), (3, 3), (0, 7))
    floored = functools.partial(allocation, floor=2)
    assert [sum(kept(floored, shapes, s)) for s in (0.0, 1.0)] == [29, 4]


@each_allocation
@pytest.mark.parametrize("floor", [0, 1, 16])
def test_floors_hold(allocation, floor):
    shapes = ((3, 3), (40, 50))
    small, large = kept(functools.partial(allocation, floor=floor), shapes, 0.999)
    assert small >= min(floor, 9)
    assert large >= max(floor, 1)


@each_allocation
@each_network
def test_a_traced_sparsity_gives_the_same_numbers(allocation, shapes):
    for sparsity in SPARSITIES:
        expected = kept(allocation, shapes, sparsity)
        actual = traced_kept(allocation, shapes, sparsity)
        assert sum(actual) == sum(expected)
        rtol = 1e-6 if shapes is HUGE else 0  # a float32 has no nine digits
        np.testing.assert_allclose(actual, expected, rtol=rtol)


@each_allocation
def test_numbers_fall_with_the_sparsity(allocation):
    grid = np.linspace(0, 1, 41)
    totals = [sum(traced_kept(allocation, LENET, s)) for s in grid]
    assert sorted(totals, reverse=True) == totals
    assert len(set(totals)) == len(totals)


@each_allocation
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_an_impossible_sparsity_is_refused(allocation, sparsity):
    with pytest.raises(ValueError, match=r"^sparsity must lie between 0 and 1, but is"):
        allocation(names(LENET), LENET, sparsity)


@each_allocation
def test_a_floor_is_a_whole_number(allocation):
    with pytest.raises(ValueError, match=r"^floor must be at least 0, but is -1"):
        allocation(names(LENET), LENET, 0.5, floor=-1)
    with pytest.raises(TypeError):
        allocation(names(LENET), LENET, 0.5, floor=0.5)


def test_an_array_that_no_int32_counts_is_refused():
    with pytest.raises(ValueError, match=r"^An array of 4294967296 entries is too"):
        allocations.uniform(["a"], [(2**16, 2**16)], 0.5)


# By path


def test_each_path_has_its_own_sparsity():
    def function(path, sparsity):
        return {"stem": 0.0, "head": sparsity / 2}.get(path)

    mine = allocations.by_path(function, floor=3)
    shapes = ((10, 10), (20, 10), (10, 4))
    traced = jax.jit(lambda s: mine(["stem", "body", "head"], shapes, s))
    assert traced(jnp.float32(0.8)).tolist() == [100, 40, 24]
    assert traced(jnp.float32(1.0)).tolist() == [100, 3, 20]
    wrong = allocations.by_path(lambda path, s: 1.5)
    with pytest.raises(ValueError, match=r"^the sparsity of 'a' must lie between 0"):
        wrong(["a"], [(3,)], 0.5)


@each_allocation
@each_sparsity
def test_the_others_make_up_for_what_stays_dense(allocation, sparsity):
    paths = ["stem", *(f"body{i}" for i in range(3)), "head"]
    mine = allocations.excluding(lambda path, _: path in ("stem", "head"), allocation)
    numbers = mine(paths, CONVS, sparsity).tolist()
    dense = [sizes(CONVS)[0], sizes(CONVS)[-1]]
    assert [numbers[0], numbers[-1]] == dense
    assert min(numbers) >= 1
    wanted = rest(sparsity, sum(sizes(CONVS)))
    assert sum(numbers) == max(wanted, sum(dense) + 3)


def test_all_may_stay_dense():
    mine = allocations.excluding(lambda path, shape: True)
    assert kept(mine, LENET, 0.9) == sizes(LENET)


# By scores


def scores_of(*scales, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(30, 20), (20, 10), (10, 4), (40, 50)]
    pairs = zip(scales, shapes, strict=False)
    return [jnp.asarray(abs(rng.normal(size=s)) * m, jnp.float32) for m, s in pairs]


@functools.partial(jax.jit, static_argnums=0)
def masks_by(allocation, scores, sparsity):
    scores = dict(zip(names(scores), scores, strict=True))
    masks = patterns.Unstructured().masks(scores, sparsity, allocation=allocation)
    return list(masks.values())


def kept_by(allocation, scores, sparsity):
    return [np.asarray(m) for m in masks_by(allocation, scores, jnp.float32(sparsity))]


def plain_shapes(scores):
    return [x.shape for x in scores]


@pytest.mark.parametrize(
    "allocation",
    [
        allocations.global_,
        functools.partial(allocations.global_, floor=9),
        allocations.normalized(0.5),
        allocations.lamp(),
        allocations.excluding(lambda path, _: path == "1", allocations.global_),
        allocations.excluding(lambda path, _: path == "0", allocations.lamp()),
    ],
    ids=["global", "floors", "normalized", "lamp", "one dense", "lamp, one dense"],
)
def test_numbers_are_those_of_the_masks(allocation):
    """The search of entries needs no numbers first, and must not differ from them."""
    scores = [jnp.round(x, 1) for x in scores_of(1.0, 2.0, 0.1)]  # with ties
    masks = kept_by(allocation, scores, 0.8)
    shapes = plain_shapes(scores)
    numbers = jax.jit(lambda x: allocation(names(shapes), shapes, 0.8, x))(scores)
    assert [int(m.sum()) for m in masks] == numbers.tolist()


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
    shapes = plain_shapes(scores)

    @jax.jit
    def numbers(scores):
        signed, floored = [Magnitude(-x) for x in scores], allocations.lamp(floor=60)
        runs = (LAMP, scores), (LAMP, signed), (floored, scores)
        return [own(names(shapes), shapes, 0.9, given) for own, given in runs]

    expected = [lamp(scores, 80), lamp(scores, 80), [60, 60]]
    assert [own.tolist() for own in numbers(scores)] == expected
    with pytest.raises(ValueError, match=r"^allocation must go by shapes.* is lamp"):
        kept(LAMP, shapes, 0.9)


@pytest.mark.parametrize("allocation", [LAMP, allocations.normalized()])
def test_split_scores_share_alike_and_are_not_gathered(allocation):
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(abs(rng.normal(size=(16, n))), jnp.float32) for n in (9, 30)]
    expected = kept_by(allocation, scores, 0.8)
    for kind in ("Auto", "Explicit"):
        axis_types = (getattr(jax.sharding.AxisType, kind),)
        mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
        there = jax.device_put(scores, jax.NamedSharding(mesh, jax.P("d")))
        step = masks_by.lower(allocation, there, jnp.float32(0.8)).compile()
        assert "all-gather" not in step.as_text()
        for mask, other in zip(step(there, jnp.float32(0.8)), expected, strict=True):
            np.testing.assert_array_equal(mask, other)


# Your own


SHAPES = {"a": {"kernel": (8, 12)}, "b": {"kernel": (16, 4)}, "c": {"kernel": (8, 8)}}
PARAMS = normal(SHAPES)


def by_hand(paths, shapes, sparsity, scores=None):
    """Plain integers, that no sparsity decides."""
    del sparsity, scores
    assert all(path.endswith("kernel") for path in paths)
    return [n // (2 + i) for i, n in enumerate(sizes(shapes))]


def traced(paths, shapes, sparsity, scores=None):
    """A vector that is known at run time."""
    del scores
    left = (1 - sparsity) * jnp.asarray(sizes(shapes), jnp.float32)
    return jnp.maximum(left.astype(jnp.int32) - len(paths), 1)


def by_scores(paths, shapes, sparsity, scores=None):
    """A list of what is traced: as many as are above the mean, if there are any."""
    if scores is None:
        return by_hand(paths, shapes, sparsity)
    assert [x.shape for x in scores] == [tuple(shape) for shape in shapes]
    return [jnp.sum(x > jnp.mean(x), dtype=jnp.int32) for x in scores]


OWN = {f.__name__: f for f in (by_hand, traced, by_scores)}
each_own = pytest.mark.parametrize("own", OWN.values(), ids=OWN)


def dense_a(path, shape):
    del shape
    return path.startswith("a")


def numbers_of(tree):
    return [int((x != 0).sum()) for x in jax.tree.leaves(tree)]


def expected(own, *, scores=PARAMS, sparsity=0.5):
    """What a function says of magnitudes, in Python."""
    scores = scores and {p: abs(x["kernel"]) for p, x in scores.items()}
    paths, shapes = (
        [f"{p}/kernel" for p in SHAPES],
        [s["kernel"] for s in SHAPES.values()],
    )
    return list(
        map(int, own(paths, shapes, sparsity, scores and list(scores.values())))
    )


@each_own
def test_unstructured_sparse_sparsify_latent_and_prune_take_a_function(own):
    options = {"allocation": own}
    once = [
        clipjax.sparsify(0.5, **options),
        clipjax.sparse(optax.sgd(0.0), 0.5, **options),
        clipjax.latent(
            optax.sgd(0.0),
            0.5,
            reparametrization=clipjax.latents.straight_through(),
            **options,
        ),
    ]

    @jax.jit
    def run(params):
        results = [clipjax.prune(params, 0.5, **options)]
        for tx in once:
            zero = jax.tree.map(jnp.zeros_like, params)
            updates, _ = tx.update(zero, tx.init(params), params)
            results.append(optax.apply_updates(params, updates))
        return results

    for result in run(PARAMS):
        assert numbers_of(result) == expected(own)


@each_own
def test_every_pattern_takes_a_function(own):
    def run(pattern, allocation=own):
        named = {f"{p}/kernel": abs(x["kernel"]) for p, x in PARAMS.items()}
        masks = pattern.masks(named, 0.5, allocation=allocation)
        return [mask.sum() for mask in masks.values()]

    @jax.jit
    def all_of_them():
        pairs = patterns.Blocks((2, 2), dense_if_ragged=True), patterns.Channels()
        return {
            "fan-in": run(patterns.FanIn()),
            "n of m": run(patterns.NofM(1, 4)),
            "blocks": run(pairs[0]),
            "channels": run(pairs[1]),
            "combined": run(patterns.Combined(pairs[1], patterns.Unstructured())),
            "one dense": run(
                patterns.Unstructured(), allocations.excluding(dense_a, own)
            ),
        }

    found = {name: list(map(int, x)) for name, x in all_of_them().items()}
    units = [12, 4, 8]
    whole = expected(own)
    fans = zip(whole, units, strict=True)
    assert found["fan-in"] == [max(n // u, 1) * u for n, u in fans]
    assert found["n of m"] == [24, 16, 16]
    others = [abs(PARAMS[name]["kernel"]) for name in "bc"]
    least = own(["b/kernel", "c/kernel"], plain_shapes(others), 1.0, others)
    assert found["one dense"][0] == 96
    assert sum(found["one dense"]) == max(112, 96 + int(sum(least)))
    assert [found["combined"][i] <= n for i, n in enumerate(whole)] == [True] * 3
    if own is by_hand:
        assert found["blocks"] == [24 // 2 * 4, 16 // 3 * 4, 16 // 4 * 4]
        assert found["channels"] == [12 // 2 * 8, 4 // 3 * 16, 8 // 4 * 8]
        assert found["combined"] == [48, 16, 16]


@pytest.mark.parametrize("own", [traced, by_scores])  # which is `by_hand` at first
def test_methods_that_start_at_random_take_a_function(own):
    inner, run = optax.sgd(0.1), {"key": jax.random.key(0), "allocation": own}
    moving = run | {"every": 1}
    methods = [
        clipjax.static_sparse(inner, 0.5, **run),
        clipjax.rigl(inner, 0.5, total_steps=9, **moving),
        contrib.sparse_evolutionary(inner, 0.5, **moving),
        contrib.sparse_momentum(inner, 0.5, total_steps=9, **moving),
    ]

    @jax.jit
    def two_steps(params):
        shares = []
        for tx in methods:

            def step(_, state, tx=tx):
                return tx.update(params, state, params)[1]

            state = jax.lax.fori_loop(0, 2, step, tx.init(params))
            shares.append(state.sparse.leaf_sparsity)
        return shares

    wanted = expected(own, scores=None)
    found = [
        [
            round((1 - share) * n)
            for share, n in zip(shares.values(), [96, 64, 64], strict=True)
        ]
        for shares in jax.device_get(two_steps(PARAMS))
    ]
    assert found[:3] == [wanted] * 3
    assert sum(found[3]) == sum(wanted)


@each_own
def test_rewinding_and_compression_take_a_function(own):
    tx = contrib.rewinding(optax.sgd(0.0), every=1, rounds=1, rate=0.5, allocation=own)
    compress = compression.top_k(0.5, allocation=own)
    deep = contrib.deep_gradient_compression(0.5, allocation=own)

    @jax.jit
    def run(params):
        state, rewound = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(params, state, rewound)
            rewound = optax.apply_updates(rewound, updates)
        named = {f"{p}/kernel": x["kernel"] for p, x in params.items()}
        sent, _ = deep.update(params, deep.init(params))
        return rewound, compress(named, jnp.int32(0)), sent

    for result in run(PARAMS):
        assert numbers_of(result) == expected(own)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], r"an integer for each of 1 arrays, but returned \[1, 2\]"),
        ([0.5], "Return a list or a vector .* round down"),
        (3, "Return a list or a vector"),
        (None, "Return a list or a vector"),
        ([7], "between 0 and 6 entries of 'kernel', but returned 7"),
        (np.array([-1]), "between 0 and 6 entries of 'kernel', but returned -1"),
    ],
)
def test_what_no_mask_can_have_is_refused(returned, message):
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=f"^allocation must .*{message}"):
        clipjax.prune(params, 0.5, allocation=lambda *arguments: returned)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_what_is_traced_is_brought_into_range(dtype):
    params = {"kernel": normal((20, 30)), "few": normal((2, 3))}

    @jax.jit
    def run(params, numbers):
        return clipjax.prune(params, 0.5, allocation=lambda *arguments: numbers)

    for few, kernel in ((100, 100), (3, 0)):
        numbers = jnp.asarray([few, kernel], dtype)
        assert numbers_of(run(params, numbers)) == [min(few, 6), kernel]
    if dtype in ("int8", "int32"):
        assert numbers_of(run(params, jnp.asarray([-1, -7], dtype))) == [0, 0]
