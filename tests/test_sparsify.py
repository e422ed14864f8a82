"""Sparsify: exact zeros, exact numbers of them, at the right step, in few bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import allocations, contrib, masks, patterns, prox
from helpers import assert_same, normal, relaxed, x64

SHAPES = {"a": {"kernel": (9, 11), "bias": (11,)}, "b": {"kernel": (11, 5)}}
SIZES = {"a/kernel": 99, "b/kernel": 55}
SMALL = {"a": SHAPES["a"]}  # compiles in half the time
STORAGES = {"bits": masks.Bits(), "zeros": masks.Zeros()}
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def kernels(tree):
    return {f"{name}/kernel": layer["kernel"] for name, layer in tree.items()}


def zeros(tree):
    return {path: int((leaf == 0).sum()) for path, leaf in kernels(tree).items()}


def kept(size, sparsity):
    """n - ⌈s·n⌉, but one at least."""
    return max(size - int(np.ceil(round(sparsity * 1e7) / 1e7 * size - 1e-9)), 1)


def train(tx, params, grads, *, steps):
    """The parameters after each step, and the last state."""

    def step(carry, index):
        params, state = carry
        slope = jax.tree.map(lambda g: g * (1 + index.astype(g.dtype)), grads)
        updates, state = tx.update(slope, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    with relaxed():
        indices = jnp.arange(steps, dtype=jnp.int32)
        run = jax.jit(lambda *start: jax.lax.scan(step, start, indices))
        (_, state), history = run(params, tx.init(params))
    rows = [[leaf[i] for leaf in jax.tree.leaves(history)] for i in range(steps)]
    return [jax.tree.unflatten(jax.tree.structure(params), row) for row in rows], state


# Exact zeros


ADAM = optax.adamw(1e-2, mu_dtype="float32")


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "optimizer", "storage"),
    [
        ("float32", "float32", optax.sgd(0.1), "bits"),
        ("float32", "float32", ADAM, "zeros"),
        ("float32", "bfloat16", optax.sgd(0.1), "bits"),  # a rounded -θ is no -θ
        ("float32", "bfloat16", ADAM, "zeros"),
        ("float32", "float16", optax.sgd(0.1), "zeros"),
        ("bfloat16", "bfloat16", optax.sgd(0.1), "zeros"),
        ("bfloat16", "float32", ADAM, "bits"),
        ("float16", "float16", optax.sgd(0.1), "bits"),
        ("float64", "float32", optax.sgd(0.1), "bits"),
    ],
)
def test_pruned_entries_are_zero_bit_for_bit(
    param_dtype, grad_dtype, optimizer, storage
):
    with x64(param_dtype == "float64"):
        params = normal(SMALL, dtype=param_dtype)
        grads = normal(SMALL, seed=1, dtype=grad_dtype)
        sparsify = clipjax.sparsify(0.7, storage=STORAGES[storage], every=2)
        history, _ = train(optax.chain(optimizer, sparsify), params, grads, steps=3)
        for after in history:
            assert zeros(after) == {"a/kernel": 99 - kept(99, 0.7)}
            for leaf in kernels(after).values():
                assert not np.signbit(np.asarray(leaf)[np.asarray(leaf) == 0]).any()
            assert (after["a"]["bias"] != 0).all()


def test_a_bad_update_of_a_pruned_entry_does_nothing():
    params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
    tx = clipjax.sparsify(0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    for bad in (np.nan, np.inf, -np.inf):
        projected, _ = update({"kernel": jnp.full((2, 2), bad)}, state, params)
        expected = jnp.array([[bad, -1.0], [-2.0, bad]])
        assert_same(projected, {"kernel": expected}, rtol=0, equal_nan=True)


def test_the_largest_stay_and_their_updates_pass():
    params, updates = normal(SHAPES), normal(SHAPES, seed=1)
    tx = clipjax.sparsify(0.6, allocation=allocations.uniform)
    projected, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert_same(projected["a"]["bias"], updates["a"]["bias"], rtol=0)
    for name in ("a", "b"):
        p, u = (np.asarray(tree[name]["kernel"]) for tree in (params, updates))
        order = np.argsort(-np.abs(p), axis=None, kind="stable")
        mask = np.zeros(p.size, bool)
        mask[order[: kept(p.size, 0.6)]] = True
        expected = np.where(mask.reshape(p.shape), u, -p)
        np.testing.assert_array_equal(projected[name]["kernel"], expected)


# The right number, at the right step


@pytest.mark.parametrize(
    "allocation",
    [allocations.uniform, allocations.global_, allocations.erdos_renyi_kernel],
)
def test_every_mask_has_the_exact_number(allocation):
    grid = jnp.linspace(0, 1, 11)
    schedule = lambda step: grid[jnp.minimum(step, 10)]  # noqa: E731
    tx = optax.chain(optax.sgd(1e-3), clipjax.sparsify(schedule, allocation=allocation))
    params, grads = normal(SHAPES), normal(SHAPES, seed=1)
    history, _ = train(tx, params, grads, steps=11)
    for index, after in enumerate(history):
        share = 1 if index == 9 else index / 10  # the last update but one meets the end
        if allocation is allocations.uniform:
            expected = sum(n - kept(n, share) for n in SIZES.values())
        else:
            expected = 154 - max(kept(154, share), 2)
        assert sum(zeros(after).values()) == expected


def test_the_cubic_ramp():
    """Zhu & Gupta: s(t) = s₁ + (s₀ - s₁)·(1 - (t - t₀)/T)³, a mask every 5 steps."""
    ramp = optax.polynomial_schedule(0.1, 0.9, 3, 20, transition_begin=5)
    sparsify = clipjax.sparsify(ramp, every=5, allocation=allocations.uniform)
    chain = optax.chain(optax.sgd(1e-3), sparsify)
    params, grads = normal(SHAPES), normal(SHAPES, seed=1)
    history, state = train(chain, params, grads, steps=32)
    for step, after in enumerate(history):
        due = step - step % 5 if step < 24 else 25  # the last one meets the end
        share = 0.9 - 0.8 * (1 - min(max(due - 5, 0), 20) / 20) ** 3
        assert zeros(after) == {p: n - kept(n, share) for p, n in SIZES.items()}
    assert state[-1].step == 32
    assert state[-1].mask_age == 3


@each_storage
def test_between_two_masks_zeros_stay_and_nothing_else_becomes_zero(storage):
    tx = optax.chain(optax.sgd(0.05), clipjax.sparsify(0.5, every=4, storage=storage))
    history, _ = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=8)
    for step, after in enumerate(history):
        last_mask = history[step - step % 4]["a"]["kernel"] == 0
        np.testing.assert_array_equal(after["a"]["kernel"] == 0, last_mask)
        assert last_mask.sum() == 50


def test_with_magnitudes_a_pruned_entry_stays_pruned():
    tx = optax.chain(optax.sgd(0.05), clipjax.sparsify(0.5))
    history, _ = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=6)
    for after in history:
        for path, leaf in kernels(after).items():
            np.testing.assert_array_equal(leaf == 0, kernels(history[0])[path] == 0)


def test_a_slow_ramp_makes_no_more_masks_for_that():
    """In float32 two steps of a long ramp are often of one value, before its end."""
    tx = clipjax.sparsify(optax.polynomial_schedule(0.0, 0.9, 3, 10**6), every=50)
    _, state = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=40)
    state = state._replace(step=jnp.int32(970_000), mask_age=jnp.int32(20))
    update, ages = jax.jit(tx.update), []
    for _ in range(40):
        _, state = update(normal(SMALL, seed=1), state, normal(SMALL))
        ages.append(int(state.mask_age))
    assert ages == [*range(21, 51), *range(1, 11)]


def test_a_falling_sparsity_lets_entries_return():
    fall = optax.piecewise_constant_schedule(0.8, {2: 0.25})
    tx = optax.chain(optax.sgd(0.05), clipjax.sparsify(fall))
    history, _ = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=5)
    counts = [zeros(after)["a/kernel"] for after in history]
    assert counts == [80, 20, 20, 20, 20]  # what returns starts at zero, and moves


RAMPS = {
    "linear": optax.linear_schedule(0.0, 0.9, 10),
    "cubic": optax.polynomial_schedule(0.2, 0.9, 3, 7, transition_begin=3),
    "steps": optax.piecewise_constant_schedule(0.3, {4: 2, 10: 1.5}),
}
METHODS = {
    "sparsify": clipjax.sparsify,
    "sparse": functools.partial(clipjax.sparse, optax.sgd(0.1)),
    "latent": functools.partial(clipjax.latent, optax.sgd(0.1)),
    "rigl": functools.partial(
        clipjax.rigl,
        optax.sgd(0.1),
        total_steps=10,
        key=jax.random.key(0),
        allocation=allocations.uniform,
    ),
}


@pytest.mark.parametrize(
    ("method", "ramp", "every"),
    [
        ("sparsify", "linear", 100),
        ("sparsify", "steps", 4),
        ("sparse", "cubic", 4),
        ("latent", "linear", 100),
        ("rigl", "cubic", 100),
    ],
)
def test_a_training_as_long_as_its_ramp_ends_at_the_last_value(method, ramp, every):
    tx, params = METHODS[method](RAMPS[ramp], every=every), normal(SMALL)
    _, state = train(tx, params, normal(SMALL, seed=1), steps=10)
    assert optax.tree.get(state, "total_sparsity") == pytest.approx(0.9, abs=0.01)


def test_a_mask_that_a_wrapper_discards_is_made_up_for():
    """Counting steps alone, a NaN just when a mask is due would lose it."""
    tx = clipjax.sparsify(lambda step: 0.1 + 0.1 * step.astype(jnp.float32), every=3)
    wrapped = optax.apply_if_finite(tx, 10)
    update, updates = jax.jit(wrapped.update), normal(SMALL, seed=1)
    for broken in (0, 3, 4, 6):
        params, made = normal(SMALL), []
        with relaxed():
            state = wrapped.init(params)
            for step in range(9):
                bad = jax.tree.map(lambda u: u * jnp.nan, updates)
                incoming = bad if step == broken else updates
                outgoing, state = update(incoming, state, params)
                params = optax.apply_updates(params, outgoing)
                if step != broken:
                    made.append(float(state.inner_state.total_sparsity))
        steps = [0, 0, 0, 3, 3, 3, 6, 6]  # inner steps at which each mask was made
        np.testing.assert_allclose(
            made, [0.1 + 0.1 * step for step in steps], atol=0.01
        )
        assert state.total_notfinite == 1


# Bits and zeros


def test_all_ways_to_store_a_mask_train_alike():
    ramp = optax.polynomial_schedule(0.0, 0.8, 3, 15)
    params, grads = normal(SMALL), normal(SMALL, seed=1)
    runs = [
        train(
            optax.chain(optax.adamw(1e-2), clipjax.sparsify(ramp, every=4, storage=s)),
            params,
            grads,
            steps=20,
        )[0]
        for s in (*STORAGES.values(), masks.Booleans())
    ]
    assert_same(runs[0], runs[1], rtol=0)
    assert_same(runs[0], runs[2], rtol=0)
    assert zeros(runs[0][-1]) == {"a/kernel": 99 - kept(99, 0.8)}


def test_a_kept_entry_at_zero_moves_with_bits_only():
    """Without a stored mask it is taken for pruned until the next mask."""
    params = {"kernel": jnp.array([[0.0, 2.0, 3.0, 0.0]])}
    updates = {"kernel": jnp.ones((1, 4))}
    for storage, expected in [("bits", [1, 1, 1, 0]), ("zeros", [0, 1, 1, 0])]:
        tx = clipjax.sparsify(0.25, every=9, storage=STORAGES[storage])
        update = jax.jit(tx.update)
        _, state = update(updates, tx.init(params), params)
        second, _ = update(updates, state, params)
        assert_same(second, {"kernel": jnp.array([expected], jnp.float32)})


def test_a_mask_costs_a_bit_a_parameter_a_byte_or_nothing():
    shapes = {"a": {"kernel": (64, 256)}, "b": {"kernel": (30, 100)}, "c": (17,)}
    params = normal(shapes)

    def stored(storage):
        state = clipjax.sparsify(0.5, storage=storage).init(params)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    entries, rows, scalars = 64 * 256 + 30 * 100, 64 + 30, 5 * 4
    assert stored(masks.Bits()) <= entries / 8 + rows + scalars
    assert entries <= stored(masks.Booleans()) <= entries + scalars
    assert stored(masks.Zeros()) <= scalars


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_stored_bits_are_split_as_their_parameters(kind):
    axis_types = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("d",), axis_types=axis_types)
    specs = {"rows": P("d"), "columns": P(None, "d")}
    params = {
        name: {
            "kernel": jax.device_put(normal((16, 64)), jax.NamedSharding(mesh, spec))
        }
        for name, spec in specs.items()
    }
    tx = clipjax.sparsify(0.5)
    _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    for name, spec in specs.items():
        bits = state.mask_bits[f"{name}/kernel"]
        assert bits.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)


# What is made sparse, and how


def test_where_chooses_by_path_and_leaf():
    params = normal(SHAPES | {"table": {"embedding": (4, 6)}})
    seen = {}

    def where(path, leaf):
        seen[path] = leaf.shape
        return path in ("b/kernel", "a/bias")

    tx = clipjax.sparsify(0.5, where=where, allocation=allocations.uniform)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert seen == {
        **{"a/kernel": (9, 11), "a/bias": (11,), "b/kernel": (11, 5)},
        "table/embedding": (4, 6),
    }
    assert set(state.leaf_sparsity) == {"b/kernel", "a/bias"}
    assert (after["a"]["bias"] == 0).sum() == 6
    assert (after.pop("table")["embedding"] != 0).all()
    assert zeros(after) == {"a/kernel": 0, "b/kernel": 28}


def test_a_choice_of_nothing_is_told():
    params = normal(SHAPES)
    nothing = {"where": lambda path, leaf: path == "a.kernel"}
    for make in (
        lambda: clipjax.sparsify(0.5, **nothing).init(params),
        lambda: clipjax.sparse(optax.sgd(1.0), 0.5, **nothing).init(params),
        lambda: clipjax.latent(optax.sgd(1.0), 0.5, **nothing).init(params),
        lambda: clipjax.proximal(prox.L1(1.0), 1.0, **nothing).init(params),
        lambda: clipjax.prune(params, 0.5, **nothing),
    ):
        with pytest.raises(ValueError, match=r"none of the . leaves .* 'a/bias'"):
            make()
    clipjax.sparsify(0.5, **nothing).init({"step": jnp.int32(0)})


def test_a_pattern_with_a_sparsity_of_its_own_is_asked_for_no_other():
    half = {"pattern": patterns.NofM(2, 4)}
    for make in (
        lambda s: clipjax.sparsify(s, **half),
        lambda s: clipjax.latent(optax.sgd(1.0), s, **half),
        lambda s: clipjax.prune(normal(SHAPES), s, **half),
    ):
        with pytest.raises(ValueError, match=r"sparsity is 0.9, but .* own, 0.5"):
            make(0.9)
    for sparsity in (0, 0.5, optax.linear_schedule(0.0, 0.9, 3)):
        clipjax.sparsify(sparsity, **half)


def test_by_default_nothing_may_be_chosen():
    params, updates = {"bias": jnp.ones(3)}, {"bias": jnp.ones(3)}
    tx = clipjax.sparsify(0.5)
    passed, state = tx.update(updates, tx.init(params), params)
    assert_same(passed, updates, rtol=0)
    assert (state.step, state.total_sparsity) == (1, 0)


def test_a_score_sees_parameter_and_update():
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    updates = {"kernel": jnp.array([[4.0, 3.0, 0.5, 0.1]])}
    tx = clipjax.sparsify(0.5, score=lambda param, update: -jnp.abs(param * update))
    projected, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    expected = jnp.array([[-1.0, -2.0, 0.5, 0.1]])  # of 4, 6, 1.5 and 0.4
    assert_same(projected, {"kernel": expected})


def test_a_pattern_is_any_value_with_masks():
    class FirstRow:
        def masks(self, scores, sparsity, *, allocation, axis_name=None):
            del sparsity, allocation, axis_name
            return {
                p: jnp.zeros_like(x, bool).at[0].set(True) for p, x in scores.items()
            }

    assert isinstance(FirstRow(), patterns.Pattern)
    params = normal(SHAPES)
    tx = clipjax.sparsify(0.5, pattern=FirstRow())
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert zeros(after) == {"a/kernel": 88, "b/kernel": 50}
    np.testing.assert_allclose(state.leaf_sparsity["a/kernel"], 88 / 99, rtol=1e-6)


def test_an_allocation_may_have_another_floor():
    params = normal(SHAPES)
    allocation = functools.partial(allocations.uniform, floor=7)
    tx = clipjax.sparsify(1.0, allocation=allocation)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert zeros(after) == {"a/kernel": 92, "b/kernel": 48}


def test_a_bad_parameter_takes_one_place_at_most():
    """NaN ranks lowest, an infinity highest; the number kept is the same."""
    tx, params = clipjax.sparsify(0.5), {"kernel": normal((9, 11))}
    state, update = tx.init(params), jax.jit(tx.update)
    for bad, count in [(np.nan, 49), (-np.inf, 50), (np.inf, 50)]:  # NaN - NaN is NaN
        broken = {"kernel": params["kernel"].at[0, 0].set(bad)}
        updates, after = update(broken, state, broken)
        assert (optax.apply_updates(broken, updates)["kernel"] == 0).sum() == count
        np.testing.assert_allclose(after.total_sparsity, 50 / 99, rtol=1e-6)


# What it remembers


@each_storage
def test_the_state_tells_how_sparse_each_leaf_is(storage):
    options = {"storage": storage, "allocation": allocations.uniform}
    tx = clipjax.sparsify(0.6, every=3, **options)
    params = normal(SHAPES)
    state, update = tx.init(params), jax.jit(tx.update)
    assert (state.total_sparsity, state.step) == (0, 0)
    for step in range(3):
        _, state = update(params, state, params)
        for path, size in SIZES.items():
            share = 1 - kept(size, 0.6) / size
            np.testing.assert_allclose(state.leaf_sparsity[path], share, rtol=1e-6)
        total = 1 - sum(kept(size, 0.6) for size in SIZES.values()) / 154
        np.testing.assert_allclose(state.total_sparsity, total, rtol=1e-6)
        assert (state.step, state.mask_age) == (step + 1, step + 1)


def test_narrow_updates_leave_as_wide_as_their_parameters():
    params, updates = normal(SHAPES), normal(SHAPES, dtype="bfloat16")
    tx = clipjax.sparsify(0.5)
    projected, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    assert projected["a"]["kernel"].dtype == jnp.float32
    assert projected["a"]["bias"].dtype == jnp.bfloat16  # not made sparse


def test_models_of_billions_of_entries_trace():
    shape = jax.ShapeDtypeStruct((30_000, 30_000), jnp.float32)
    params = {str(i): {"kernel": shape} for i in range(3)}  # 2.7e9 entries
    for allocation in (allocations.uniform, allocations.global_):
        tx = clipjax.sparsify(0.9, allocation=allocation)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert updates["0"]["kernel"].shape == (30_000, 30_000)
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("every", [2.0, jnp.float32(2)])
def test_every_may_be_any_number(every):
    tx = clipjax.sparsify(lambda step: 0.1 * step.astype(jnp.float32), every=every)
    params = {"kernel": normal((9, 11))}
    state, update = tx.init(params), jax.jit(tx.update)
    made = []
    for _ in range(5):
        _, state = update(params, state, params)
        made.append(float(state.total_sparsity))
    assert made[0] == made[1] < made[2] == made[3] < made[4]


# What it is made of


def test_patterns_may_go_by_path():
    params = normal({"a": {"kernel": (8, 12)}, "b": {"kernel": (9, 11)}})

    def pattern(path, leaf):
        del leaf
        return patterns.NofM(2, 4) if path == "a/kernel" else patterns.Unstructured()

    tx = clipjax.sparsify(0.8, pattern=pattern)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    groups = np.asarray(after["a"]["kernel"]).reshape(-1, 4)
    assert ((groups != 0).sum(1) == 2).all()
    assert zeros(after)["b/kernel"] == 99 - kept(99, 0.8)
    np.testing.assert_allclose(state.leaf_sparsity["a/kernel"], 0.5)


def test_allocations_may_go_by_path():
    params = normal(SHAPES)
    allocation = allocations.by_path(lambda path, s: s / 2 if path[0] == "b" else None)
    tx = clipjax.sparsify(0.8, allocation=allocation)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert zeros(after) == {"a/kernel": 99 - kept(99, 0.8), "b/kernel": 22}


def test_a_cycle_ends_sparse_and_has_the_phases_of_the_paper():
    """AC/DC for 100 epochs: masks at 10, 20, …, 70 and 85, dense at 15, …, 75."""
    schedule = contrib.cyclic_schedule(0.9, 100)
    shares = np.array([schedule(jnp.int32(step)) for step in range(120)])
    expected = np.zeros(120)
    for start in range(10, 80, 10):
        expected[start : start + 5] = 0.9
    expected[85:] = 0.9
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 19, 1000])
def test_a_cycle_of_any_length_ends_sparse(steps):
    schedule = contrib.cyclic_schedule(0.5, steps)
    assert schedule(steps - 1) == schedule(10**6) == 0.5


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^warmup and final must fit into 10 steps"):
        contrib.cyclic_schedule(0.5, 10, warmup=6, final=5)
    with pytest.raises(ValueError, match=r"^sparsity must lie between 0 and 1"):
        contrib.cyclic_schedule(1.5, 10)


@each_storage
def test_in_a_dense_phase_weights_grow_again(storage):
    cycle = contrib.cyclic_schedule(0.8, 8, warmup=1, compressed=2, dense=2, final=2)
    tx = optax.chain(optax.sgd(0.05), clipjax.sparsify(cycle, storage=storage))
    history, _ = train(tx, normal(SMALL), normal(SMALL, seed=1), steps=9)
    counts = [zeros(after)["a/kernel"] for after in history]
    sparse = 99 - kept(99, 0.8)
    # After t updates as the schedule has it at t.
    assert counts == [sparse, sparse, 0, 0, 0, sparse, sparse, sparse, sparse]
    before, after = (history[i]["a"]["kernel"] == 0 for i in (1, 8))
    assert (before & ~after).any()
