"""Dynamic sparse training: exact numbers, moved by the published rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import contrib, masks
from clipjax.contrib import _snfs as snfs
from clipjax.selection._counts import of
from helpers import assert_same, integers, normal, relaxed, x64
from test_contract import MOST_BYTES, collectives, devices

KEY = jax.random.key(3)
SHAPES = {"a": {"kernel": (6, 8)}, "b": {"kernel": (8, 3)}}
SIZES = {"a/kernel": 48, "b/kernel": 24}
METHODS = {
    "static": functools.partial(clipjax.static_sparse, key=KEY),
    "set": functools.partial(contrib.sparse_evolutionary, key=KEY, every=2),
    "rigl": functools.partial(clipjax.rigl, key=KEY, every=2, total_steps=12),
    "snfs": functools.partial(
        contrib.sparse_momentum, key=KEY, every=2, total_steps=13
    ),
}
STEPS = 10


def rounded(shapes, seed):
    """Numbers with many ties."""
    return jax.tree.map(lambda x: jnp.round(x * 2) / 2, normal(shapes, seed=seed))


def train(tx, params, grads):
    """Parameters, masks and states, before the first step and after each."""
    history = [(params, None, tx.init(params))]
    with relaxed():
        update = jax.jit(tx.update)
        for grad in grads:
            params, _, state = history[-1]
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
            history.append((params, kept(state), state))
    return history


def kept(state):
    """The stored masks."""
    columns = {"a/kernel": 8, "b/kernel": 3, "kernel": 8}
    return {
        path: np.asarray(masks.unpack(bits, columns[path]))
        for path, bits in state.sparse.mask_bits.items()
    }


def leaves(tree):
    return {f"{name}/kernel": np.asarray(tree[name]["kernel"]) for name in tree}


@functools.cache
def run(name):
    """A training with Adam, and its gradients: dense, with ties."""
    params = rounded(SHAPES, 0)
    grads = [rounded(SHAPES, 1 + step) for step in range(STEPS)]
    return train(METHODS[name](optax.adam(0.125), 0.6), params, grads), grads


def moves(name):
    """(params, masks, gradient, index) before a move, and (params, masks) after it."""
    history, grads = run(name)
    for i in range(1, STEPS):
        if history[i + 1][2].masks_made > history[i][2].masks_made:
            yield *history[i][:2], leaves(grads[i]), i, *history[i + 1][:2]


def best(score, number):
    """Marks the largest, of equal ones the first."""
    order = np.argsort(-score, axis=None, kind="stable")[:number]
    mask = np.zeros(score.size, bool)
    mask[order] = True
    return mask.reshape(score.shape)


# The rules


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    found = list(moves("rigl"))
    assert [index for *_, index, _, _ in found] == [2, 4, 6, 8]  # 9 of 12 steps
    for params, old, grads, step, _, new in found:
        share = np.float32(0.15) * (1 + np.cos(np.pi * step / 9))
        for path, weights in leaves(params).items():
            number = old[path].sum()
            stay = number - int(share * number)
            first = best(np.where(old[path], np.abs(weights), -1), stay)
            growth = np.where(first, np.inf, np.abs(grads[path]))
            np.testing.assert_array_equal(new[path], best(growth, number))


def test_set_drops_the_smallest_and_grows_at_random():
    grown = []
    for params, old, _, _, _, new in moves("set"):
        for path, weights in leaves(params).items():
            number = old[path].sum()
            stay = number - int(0.3 * number)
            first = best(np.where(old[path], np.abs(weights), -1), stay)
            assert (new[path] & first).sum() == stay
            assert new[path].sum() == number
            grown.append(np.flatnonzero(new[path] & ~first))
    places = np.concatenate(grown[::2])  # of the first kernel
    assert len(set(places)) > len(grown[0]) * 2  # other ones in every move


def test_sparse_momentum_grows_where_gradients_agree():
    _, grads = run("snfs")
    mean = {path: np.zeros(leaf.shape) for path, leaf in leaves(grads[0]).items()}
    means = []
    for grad in grads:
        mean = {p: 0.9 * m + 0.1 * leaves(grad)[p] for p, m in mean.items()}
        means.append(mean)
    changed = 0
    for params, old, _, step, _, new in moves("snfs"):
        share = np.float32(0.25) * (1 + np.cos(np.pi * step / 13))
        momentum = {path: np.abs(m) for path, m in means[step].items()}
        number = {path: mask.sum() for path, mask in old.items()}
        dropped = {path: min(int(share * n), n - 1) for path, n in number.items()}
        total = sum(dropped.values())
        inside = {path: momentum[path][mask].mean() for path, mask in old.items()}
        parts = {p: int(m / sum(inside.values()) * total) for p, m in inside.items()}
        parts["a/kernel"] += total - sum(parts.values())  # the largest takes the rest
        for path, weights in leaves(params).items():
            stay = number[path] - dropped[path]
            first = best(np.where(old[path], np.abs(weights), -1), stay)
            growth = np.where(first, np.inf, momentum[path])
            expected = best(growth, stay + parts[path])
            np.testing.assert_array_equal(new[path], expected)
            changed += number[path] != expected.sum()
    assert changed  # or nothing was redistributed


def test_a_full_array_passes_on_what_it_cannot_take():
    for total, shares, room, expected in [
        (10, [0.5, 0.5, 0.0], [3, 9, 9], [3, 5, 2]),
        (10, [0.34, 0.33, 0.33], [9, 9, 9], [3, 3, 4]),
        (10, [1.0, 0.0, 0.0], [2, 4, 4], [2, 4, 4]),
        (200_001, [0.5, 0.5, 0.0], [10**6] * 3, [100_000, 100_000, 1]),
    ]:
        parts = snfs.redistributed(of(total), jnp.array(shares), of(room), [5, 6, 70])
        assert integers(parts) == expected


# What they have in common


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_connections_never_changes(name):
    history, _ = run(name)
    for params, mask, state in history[1:]:
        assert sum(m.sum() for m in mask.values()) == 28  # 72 - ⌈0.6·72⌉
        if name != "snfs":
            first = history[1][1]
            assert {p: m.sum() for p, m in mask.items()} == {
                p: m.sum() for p, m in first.items()
            }
        assert min(m.sum() for m in mask.values()) >= 1
        np.testing.assert_allclose(state.sparse.total_sparsity, 44 / 72, rtol=1e-6)
        for path, leaf in leaves(params).items():
            assert (leaf[~mask[path]] == 0).all()


@pytest.mark.parametrize("name", ["set", "rigl", "snfs"])
def test_new_connections_start_anew_and_take_the_step_of_their_move(name):
    history, grads = run(name)
    moved = [i for *_, i, _, _ in moves(name)]
    assert moved == [2, 4, 6, 8]
    grown = 0
    for i in moved:
        (params, old, before), (after, new, state) = history[i : i + 2]
        gradients = leaves(grads[i])
        then, now = before.sparse_inner[0], state.sparse_inner[0]
        assert now.count == then.count + 1
        for moment, decay, power in (("mu", 0.9, 1), ("nu", 0.999, 2)):
            for path, leaf in leaves(getattr(then, moment)).items():
                known = np.where(old[path] & new[path], leaf, 0)
                step = decay * known + (1 - decay) * gradients[path] ** power
                actual = leaves(getattr(now, moment))[path]
                expected = np.where(new[path], step, 0)
                np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
        mu, nu = leaves(now.mu), leaves(now.nu)
        for path, leaf in leaves(params).items():
            scale = np.sqrt(nu[path] / (1 - 0.999 ** (i + 1))) + 1e-8
            step = -0.125 * mu[path] / (1 - 0.9 ** (i + 1)) / scale
            expected = np.where(new[path], leaf + step, 0)
            actual = leaves(after)[path]  # of weights that may have nearly cancelled
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
            grown += (new[path] & ~old[path]).sum()
    assert grown > 4


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_what_is_pruned_leave_no_trace(name):
    for _, mask, state in run(name)[0][1:]:
        for moment in ("mu", "nu"):
            for path, leaf in leaves(getattr(state.sparse_inner[0], moment)).items():
                assert (leaf[~mask[path]] == 0).all()
                assert (leaf[mask[path]] != 0).any()


@pytest.mark.parametrize("name", METHODS)
def test_an_elementwise_optimizer_gives_the_same_parameters(name):
    """It remembers what is pruned until that returns."""
    history, grads = run(name)
    tx = METHODS[name](optax.adam(0.125), 0.6, elementwise=True)
    other = train(tx, rounded(SHAPES, 0), grads)
    for (expected, mask, _), (actual, same, _) in zip(history, other, strict=True):
        assert_same(actual, expected, rtol=1e-6, atol=1e-7)
        assert_same(same, mask)
    _, mask, state = other[-1]
    for path, leaf in leaves(state.sparse_inner[0].mu).items():
        assert (leaf[~mask[path]] != 0).any()


def test_static_masks_stay_and_depend_on_the_key_alone():
    history, grads = run("static")
    first = history[1][1]
    for _, mask, _ in history[1:]:
        assert all((mask[path] == first[path]).all() for path in mask)
    others = [
        kept(jax.jit(tx.update)(grads[0], tx.init(grads[0]), grads[0])[1])
        for tx in (
            clipjax.static_sparse(optax.sgd(1.0), 0.6, key=key)
            for key in (KEY, jax.random.key(4))
        )
    ]
    assert all((others[0][path] == first[path]).all() for path in first)
    assert any((others[1][path] != first[path]).any() for path in first)
    starts = [run(name)[0][1][1]["a/kernel"] for name in ("set", "rigl")]
    assert all((start == first["a/kernel"]).all() for start in starts)


# Due until it is done


def test_a_move_waits_for_a_finite_gradient():
    params = {"kernel": normal((6, 8))}
    tx = clipjax.rigl(
        optax.sgd(0.1), 0.5, key=KEY, every=2, total_steps=100, drop_fraction=0.5
    )
    grads = [{"kernel": normal((6, 8), seed=1 + i)} for i in range(7)]
    for bad in (2, 3):
        grads[bad] = {"kernel": grads[bad]["kernel"].at[0, 0].set(jnp.inf)}
    history = train(tx, params, grads)
    assert [int(state.masks_made) for _, _, state in history[1:]] == [
        *(1, 1, 1, 1),  # and not at steps 2 and 3
        *(2, 2, 3),
    ]


def test_what_a_wrapper_discards_is_made_up_for():
    params = {"kernel": normal((6, 8)), "bias": jnp.zeros(8)}
    grads = [normal({"kernel": (6, 8), "bias": (8,)}, seed=1 + i) for i in range(5)]
    grads[2] = grads[2] | {"bias": grads[2]["bias"] * jnp.nan}
    tx = clipjax.rigl(optax.sgd(0.1), 0.5, key=KEY, every=2, total_steps=100)
    wrapped = optax.apply_if_finite(optax.chain(optax.identity(), tx), 9)
    with relaxed():
        state, update, made = wrapped.init(params), jax.jit(wrapped.update), []
        for grad in grads:
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
            made.append(int(state.inner_state[-1].masks_made))
    assert made == [1, 1, 1, 2, 2]


def test_the_sparsity_may_follow_a_schedule():
    ramp = lambda step: 0.5 + 0.05 * step.astype(jnp.float32)  # noqa: E731
    tx = contrib.sparse_evolutionary(optax.sgd(0.1), ramp, key=KEY, every=2)
    grads = [{"kernel": normal((6, 8), seed=1 + i)} for i in range(5)]
    history = train(tx, {"kernel": normal((6, 8))}, grads)
    numbers = [int(mask["kernel"].sum()) for _, mask, _ in history[1:]]
    assert numbers == [24, 24, 19, 19, 14]  # 48 - ⌈s·48⌉, s = 0.5, 0.6, 0.7


# Everywhere


SPLIT = {"rows": {"kernel": (16, 24)}, "columns": {"kernel": (8, 64)}}
SPECS = {"rows": {"kernel": P("devices")}, "columns": {"kernel": P(None, "devices")}}


def start_and_move(tx, params, grads, place=lambda arguments, _: arguments):
    """The state after the first mask and one move, and the compiled program."""
    with relaxed():
        state = jax.jit(tx.init, keep_unused=True)(params)
        compiled = jax.jit(tx.update).lower(grads[0], state, params).compile()
        for grad in grads:
            arguments = place((grad, state, params), compiled.input_shardings[0])
            updates, state = compiled(*arguments)
            params = optax.apply_updates(params, updates)
    return (params, state), compiled


def test_a_mesh_changes_nothing_and_gathers_nothing():
    """For RigL see the contract; this one stores a dense average too."""
    tx = METHODS["snfs"](optax.sgd(0.1, momentum=0.9), 0.6)
    params, *grads = [normal(SPLIT, seed=seed) for seed in range(4)]
    expected, _ = start_and_move(tx, params, grads)
    mesh = devices("Explicit")
    places = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    params, *grads = (jax.device_put(tree, places) for tree in (params, *grads))
    actual, compiled = start_and_move(tx, params, grads, jax.device_put)
    assert expected[1].masks_made == 2
    for exchange, size in collectives(compiled):
        assert exchange == "all-reduce"
        assert size <= MOST_BYTES
    assert_same(jax.device_get(actual), jax.device_get(expected), rtol=1e-5)


def test_inside_shard_map_masks_are_those_of_one_device():
    specs = {"kernel": P("devices")}
    make = functools.partial(
        clipjax.rigl, optax.identity(), 0.75, key=KEY, every=1, total_steps=9
    )
    params, *grads = [{"kernel": normal((16, 8), seed=seed)} for seed in range(3)]
    mapped = functools.partial(
        jax.shard_map, mesh=devices("Auto"), in_specs=(specs, specs, specs)
    )

    def two_steps(params, first, second, *, axis_name="devices"):
        tx = make(axis_name=axis_name)
        state = tx.init(params)
        for grad in (first, second):
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return masks.unpack(state.sparse.mask_bits["kernel"], 8), params["kernel"]

    with relaxed():
        out = (specs["kernel"], specs["kernel"])
        mask, after = jax.jit(mapped(two_steps, out_specs=out))(params, *grads)
        alone = functools.partial(two_steps, axis_name=None)
        expected, _ = jax.jit(alone)(params, *grads)
    assert mask.sum() == 32
    np.testing.assert_array_equal(mask, expected)
    assert (after[~mask] == 0).all()


# What is wrong


@pytest.mark.parametrize("name", ["set", "rigl", "snfs"])
def test_zeros_cannot_store_connections_that_are_zero(name):
    message = r"storage must not be `Zeros\(\)`.*Leave it at `Bits\(\)`"
    factory = METHODS[name].func
    unchecked = getattr(factory, "__wrapped__", factory)  # or its type is refused
    options = METHODS[name].keywords | {"storage": masks.Zeros()}
    with pytest.raises(ValueError, match=message):
        unchecked(optax.sgd(0.1), 0.5, **options)


@pytest.mark.slow
def test_rigl_beats_a_static_mask_on_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    parts = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    steps = 1500

    def logits(params, x):
        for name in "abc":
            x = x @ params[name]["kernel"] + params[name]["bias"]
            x = x if name == "c" else jax.nn.relu(x)
        return x

    def loss(params, x, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return losses.mean()

    def accuracy(make, seed):
        sizes = {"a": (64, 128), "b": (128, 64), "c": (64, 10)}
        keys = jax.random.split(jax.random.key(seed), 5)
        params = {
            name: {
                "kernel": jax.random.normal(key, shape) * np.sqrt(2 / shape[0]),
                "bias": jnp.zeros(shape[1]),
            }
            for key, (name, shape) in zip(keys, sizes.items(), strict=False)
        }
        tx = make(optax.adam(3e-3), 0.95, key=keys[3])

        def step(carry, key):
            params, state = carry
            i = jax.random.randint(key, (128,), 0, 1400)
            grads = jax.grad(loss)(params, parts[0][0][i], parts[0][1][i])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (params, tx.init(params))
        scan = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[0])
        params, _ = scan(start, jax.random.split(keys[4], steps))
        return (logits(params, parts[1][0]).argmax(-1) == parts[1][1]).mean()

    moving = functools.partial(clipjax.rigl, total_steps=steps, every=50)
    with relaxed():
        static = np.mean([accuracy(clipjax.static_sparse, seed) for seed in range(4)])
        rigl = np.mean([accuracy(moving, seed) for seed in range(4)])
    print(f"static {static:.4f}, RigL {rigl:.4f}")
    assert rigl >= static > 0.5


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_what_cannot_be_met_is_refused(make):
    with pytest.raises(ValueError, match="sparsity must"):
        make(optax.sgd(1.0), 90.0)
    by_scores = clipjax.allocations.normalized(0.5)
    tx, params = make(optax.sgd(1.0), 0.9, allocation=by_scores), normal(SHAPES)
    with pytest.raises(ValueError, match=r"^allocation must go by .*normalized\(0.5\)"):
        jax.eval_shape(tx.update, params, tx.init(params), params)
    with pytest.raises(TypeError, match="allocation"):
        make(optax.sgd(1.0), 0.9, allocation=0.5)


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64")])
def test_parameters_and_gradients_may_differ_in_width(dtypes):
    with x64():
        params, grads = (
            {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=(8, 8)), dtype)}
            for i, dtype in enumerate(dtypes)
        )
        tx = clipjax.rigl(
            optax.identity(), 0.5, total_steps=9, key=jax.random.key(0), every=1
        )
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        assert state.sparse.total_sparsity == 0.5
