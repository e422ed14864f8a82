"""`clip_by`: every scope, norm and response against NumPy in float64."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import Bound, clip_by, contrib, norms, responses, scopes, thresholds
from helpers import assert_same, normal, x64

SHAPES = {
    "dense": {"kernel": (6, 4), "bias": (4,)},
    "conv": {"kernel": (3, 3, 2, 5)},
    "out": {"kernel": (2, 3, 4), "bias": (4,)},
    "gain": (),
}
STACKS = {"layers": {"kernel": (3, 6, 4), "bias": (3, 4)}}
ASIDE = {"layers": {"kernel": (6, 3, 4), "bias": (4, 3)}}  # stacked along axis 1
UNITS = {  # what feeds one output
    "dense/kernel": (0,),
    "dense/bias": (0,),
    "conv/kernel": (0, 1, 2),
    "out/kernel": (0, 1),
    "out/bias": (0,),
    "gain": (),
}
LAYERS = {"layers/kernel": (1, 2), "layers/bias": (1,)}
ASIDE_LAYERS = {"layers/kernel": (0, 2), "layers/bias": (0,)}


def label(path, leaf):
    return path.split("/")[0]


SCOPES = {  # shapes, scope, then axes, key and pool of a leaf by path
    "element": (SHAPES, scopes.Element(), lambda p: ((), p, p)),
    "unit": (SHAPES, scopes.Unit(), lambda p: (UNITS[p], p, p)),
    "layer_0": (STACKS, scopes.Layer(0), lambda p: (LAYERS[p], p, p)),
    "layer_1": (ASIDE, scopes.Layer(1), lambda p: (ASIDE_LAYERS[p], p, p)),
    "leaf": (SHAPES, scopes.Leaf(), lambda p: (None, p, p)),
    "group": (
        SHAPES,
        scopes.Group(label),
        lambda p: (None, p.split("/")[0], p.split("/")[0]),
    ),
    "shared": (
        SHAPES,
        scopes.Group(label, shared=True),
        lambda p: (None, p.split("/")[0], ""),
    ),
    "tree": (SHAPES, scopes.Tree(), lambda p: (None, "", "")),
}
NORMS = {f.__name__: f for f in (norms.global_norm, norms.rms, norms.inf_norm)}
NORMS["spectral_norm"] = norms.spectral_norm


def by_path(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(
            leaf, np.float64
        )
        for keys, leaf in pairs
    }


def spectral(x, axes):
    """Of every matrix: its last axis against the others."""
    axes = tuple(range(x.ndim)) if axes is None else axes
    if len(axes) < 2:
        return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
    kept = [i for i in range(x.ndim) if i not in axes]
    turned = x.transpose(*kept, *sorted(axes))
    matrix = turned.reshape(*turned.shape[: len(kept)], -1, x.shape[max(axes)])
    sizes = np.linalg.norm(matrix, 2, axis=(-2, -1))
    return sizes.reshape([1 if i in axes else n for i, n in enumerate(x.shape)])


def sizes(leaves, parts, norm):
    """The norm of what each leaf is measured with."""
    result = {}
    for path, x in leaves.items():
        axes, _, pool = parts(path)
        if axes is not None:
            options = {"axis": axes, "keepdims": True}
            result[path] = {
                "global_norm": lambda x, o=options: np.sqrt(np.sum(x**2, **o)),
                "rms": lambda x, o=options: np.sqrt(np.mean(x**2, **o)),
                "inf_norm": lambda x, o=options: np.max(np.abs(x), **o),
                "spectral_norm": lambda x, a=axes: spectral(x, a),
            }[norm](x)
            continue
        members = [y for p, y in leaves.items() if parts(p)[2] == pool]
        flat = np.concatenate([y.ravel() for y in members])
        result[path] = {
            "global_norm": lambda f: np.sqrt(np.sum(f**2)),
            "rms": lambda f: np.sqrt(np.mean(f**2)),
            "inf_norm": lambda f: np.max(np.abs(f)),
            "spectral_norm": lambda _, m=members: max(spectral(y, None) for y in m),
        }[norm](flat)
        result[path] = np.squeeze(result[path])
    return result


def shrink(n, t):
    return np.minimum(1, t / np.maximum(n, 1e-300))


RESPONSES = {  # the response, and what becomes of u with norm n at threshold t
    "scale": (responses.scale, lambda u, n, t: u * shrink(n, t)),
    "clamp": (responses.clamp, lambda u, n, t: np.clip(u, -t, t)),
    "smooth": (responses.smooth, lambda u, n, t: u / np.sqrt(1 + (n / t) ** 2)),
    "normalize": (responses.normalize, lambda u, n, t: u * t / n),
    "floor": (responses.floor, lambda u, n, t: u * np.maximum(1, t / n)),
    "band": (
        responses.Band(0.5, 0.2, 1.5),
        lambda u, n, t: (
            u * np.clip(np.minimum(np.maximum(n, 0.5 * t), t) / n, 0.2, 1.5)
        ),
    ),
    "zero": (responses.zero, lambda u, n, t: u * (n <= t)),
}


def first(tx, updates, params=None):
    return tx.update(updates, tx.init(updates), params)


@functools.cache
def each_norm(name):
    scope = SCOPES[name][1]

    def all_of_them(bound, updates):
        bounds = {name: Bound(bound, scope, norm) for name, norm in NORMS.items()}
        return {name: first(clip_by(own), updates) for name, own in bounds.items()}

    return jax.jit(all_of_them)


def tall(shapes, seed=0):
    """Updates whose matrices have one large singular value, soon found."""
    return jax.tree.map(lambda x: x + 3, normal(shapes, seed=seed))


# What it is


@pytest.mark.parametrize("scope", SCOPES)
def test_every_norm_of_every_scope(scope):
    shapes, _, parts = SCOPES[scope]
    for seed, bound in enumerate([0.3, 3.0, 30.0]):
        updates = tall(shapes, seed)
        actual = each_norm(scope)(jnp.float32(bound), updates)
        leaves = by_path(updates)
        for norm, (clipped, state) in actual.items():
            measured = sizes(leaves, parts, norm)
            for path, x in by_path(clipped).items():
                expected = leaves[path] * shrink(measured[path], np.float32(bound))
                np.testing.assert_allclose(x, expected, rtol=2e-6, err_msg=norm)
            over = [np.any(n > bound * 1.00001) for n in measured.values()]
            assert state.clip.clipped_steps == int(any(over))
            if norm in ("global_norm", "rms"):
                flat = np.concatenate([x.ravel() for x in by_path(clipped).values()])
                np.testing.assert_allclose(
                    state.clip.clipped_norm, np.linalg.norm(flat), rtol=1e-6
                )


@pytest.mark.parametrize("scope", ["unit", "group", "shared"])
def test_every_response(scope):
    shapes, value, parts = SCOPES[scope]

    @jax.jit
    def all_of_them(bound, updates):
        return {
            name: first(clip_by(Bound(bound, value, response=response)), updates)
            for name, (response, _) in RESPONSES.items()
        }

    for seed, bound in enumerate([0.1, 1.0, 4.0]):
        updates = normal(shapes, seed=seed)
        leaves = by_path(updates)
        measured = sizes(leaves, parts, "global_norm")
        for name, (out, state) in all_of_them(jnp.float32(bound), updates).items():
            for path, x in by_path(out).items():
                formula = RESPONSES[name][1]
                expected = formula(leaves[path], measured[path], np.float32(bound))
                np.testing.assert_allclose(x, expected, rtol=2e-6, err_msg=name)
            flat = np.concatenate([x.ravel() for x in by_path(out).values()])
            np.testing.assert_allclose(
                state.clip.clipped_norm, np.linalg.norm(flat), rtol=2e-6
            )


@pytest.mark.parametrize("scope", SCOPES)
def test_within_the_bound_every_bit_passes_and_twice_is_once(scope):
    updates = tall(SCOPES[scope][0], seed=5)
    for passed, state in each_norm(scope)(jnp.float32(1e3), updates).values():
        assert_same(passed, updates, rtol=0)
        assert state.clip.clipped_steps == 0
    clipped = each_norm(scope)(jnp.float32(0.7), updates)
    for norm, (once, _) in clipped.items():
        again, _ = each_norm(scope)(jnp.float32(0.7), once)[norm]
        assert_same(again, once, rtol=3e-7)


def test_a_label_may_have_a_threshold_of_its_own():
    """A number, one by the parameters, a schedule and one by the past."""
    table = {
        "dense": 0.5,
        "conv": thresholds.Relative(0.25),
        "out": lambda step: 1.0 + step.astype(jnp.float32),
        "gain": thresholds.MovingMean(1.0, warmup=1),
    }
    tx = clip_by(Bound(table, scope=scopes.Group(label)))
    params, one, two = (normal(SHAPES, seed=seed) for seed in range(3))
    update = jax.jit(tx.update)
    state = tx.init(params)
    _, state = update(one, state, params)
    clipped, state = update(two, state, params)
    size = np.linalg.norm(np.float64(params["conv"]["kernel"]))
    bounds = {"dense": 0.5, "conv": size / 4, "out": 2.0, "gain": abs(one["gain"])}
    leaves, parts = by_path(two), SCOPES["group"][2]
    measured = sizes(leaves, parts, "global_norm")
    for path, x in by_path(clipped).items():
        expected = leaves[path] * shrink(measured[path], bounds[path.split("/")[0]])
        np.testing.assert_allclose(x, expected, rtol=2e-6)
    assert list(state.threshold_memory[0]) == ["gain"]
    largest = np.float32(max(map(float, bounds.values())))
    np.testing.assert_allclose(state.clip.threshold, largest, rtol=1e-6)


@pytest.mark.parametrize("norm", ["global_norm", "rms", "inf_norm"])
def test_a_threshold_may_be_relative_to_the_parameters(norm):
    """In the same norm of the same part, and no less than of the least."""
    params, updates = (normal(SHAPES, seed=seed) for seed in (0, 1))
    params["dense"]["kernel"] = params["dense"]["kernel"] * 1e-6
    rule = thresholds.Relative(0.5, 1e-2)
    tx = clip_by(Bound(rule, scope=scopes.Unit(), norm=NORMS[norm]))
    clipped, state = jax.jit(tx.update)(updates, tx.init(params), params)
    leaves, parts = by_path(updates), SCOPES["unit"][2]
    measured, own = (sizes(by_path(t), parts, norm) for t in (updates, params))
    for path, x in by_path(clipped).items():
        bound = 0.5 * np.maximum(own[path], 1e-2)
        expected = leaves[path] * shrink(measured[path], bound)
        np.testing.assert_allclose(x, expected, rtol=2e-6)
    assert state.clip.threshold == 0.5


def test_a_bound_on_the_whole_first_then_on_leaves():
    tx = clip_by(2.0, Bound(1.0, scope=scopes.Leaf()))
    updates = {"a": jnp.array([6.0]), "b": jnp.array([0.0, 8.0]), "c": jnp.zeros(3)}
    clipped, state = jax.jit(tx.update)(updates, tx.init(updates))
    expected = {"a": jnp.array([1.0]), "b": jnp.array([0.0, 1.0]), "c": jnp.zeros(3)}
    assert_same(clipped, expected)
    np.testing.assert_allclose(state.clip.clipped_norm, 2**0.5, rtol=1e-6)
    small = jax.tree.map(lambda x: x / 16, updates)
    assert_same(first(tx, small)[0], small, rtol=0)


def test_values_may_be_traced_or_follow_a_schedule():
    updates = normal(SHAPES)

    def schedule(step):
        return 1.0 / (1 + step.astype(jnp.float32))

    def follows(scope, whole):
        tx = clip_by(whole, Bound(schedule, scope=scope))
        return tx, jax.jit(tx.update)

    constant = jax.jit(
        lambda bound, scaled: first(
            clip_by(2 * bound, Bound(bound, scope=scopes.Leaf())), scaled
        )[0]
    )
    tx, update = follows(scopes.Leaf(), lambda step: 2 * schedule(step))
    state = tx.init(updates)
    for step in range(3):
        clipped, state = update(updates, state)
        assert_same(clipped, constant(schedule(jnp.int32(step)), updates), rtol=1e-6)
        np.testing.assert_allclose(state.clip.threshold, 1 / (1 + step), rtol=1e-6)


# Strict: no norm above the bound


STRICT_SHAPES = {"a": (7, 3), "b": (5,)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_strict_never_exceeds_the_bound(dtype):
    """And without it, some do."""

    @functools.partial(jax.jit, static_argnums=2)
    def clipped(bound, updates, strict):
        def make(scope, norm):
            own = Bound(bound, SCOPES[scope][1], NORMS[norm])
            return clip_by(own, strict=strict)

        return {
            (scope, norm): first(make(scope, norm), x)[0]
            for scope in ("element", "leaf", "tree", "unit")
            for norm in ("global_norm", "rms", "inf_norm")
            for x in [updates]
        }

    axes = {"a": (0,), "b": (0,)}
    parts = {
        "element": SCOPES["element"][2],
        "leaf": SCOPES["leaf"][2],
        "tree": SCOPES["tree"][2],
        "unit": lambda p: (axes[p], p, p),
    }
    above = {True: 0, False: 0}
    for seed in range(100):
        updates = normal(STRICT_SHAPES, seed=seed, dtype=dtype)
        bound = np.float32(np.random.default_rng(seed).uniform(0.01, 3))
        for strict in above:
            for (scope, norm), out in clipped(bound, updates, strict).items():
                measured = sizes(by_path(out), parts[scope], norm)
                over = [np.any(n > np.float64(bound)) for n in measured.values()]
                above[strict] += any(over)
    assert above[True] == 0
    assert above[False] > 50


def test_strict_holds_where_the_norm_found_is_just_the_bound():
    """In float32, half of all norms are found a little too small."""

    @functools.partial(jax.jit, static_argnums=1)
    def at_its_norm(x, strict):
        bound = norms.global_norm(x)
        return bound, first(clip_by(bound, strict=strict), x)[0]

    above = {True: 0, False: 0}
    for seed in range(100):
        for strict in above:
            bound, out = at_its_norm(normal((50,), seed=seed), strict)
            above[strict] += np.linalg.norm(np.float64(out)) > np.float64(bound)
    assert above[True] == 0
    assert above[False] > 20


def test_strict_twice_is_strict_once():
    update = jax.jit(lambda x: first(clip_by(0.5, strict=True), x)[0])
    for dtype in ("float32", "bfloat16"):
        once = update(normal((50,), dtype=dtype))
        assert_same(update(once), once, rtol=0)


# What is not finite


def test_three_policies_for_what_is_not_finite():
    policies = (responses.propagate, responses.zero_scope, responses.skip)
    cases = [(scope, p) for scope in ("tree", "leaf", "unit") for p in policies]

    @jax.jit
    def outcomes(updates):
        return {
            (name, policy.__name__): first(
                clip_by(Bound(1.0, scope=SCOPES[name][1]), nonfinite=policy), updates
            )
            for name, policy in cases
        }

    parts = {"dense": {"kernel": jnp.array([[0.0, 3.0], [1.0, 4.0]])}}
    parts["dense"]["bias"] = jnp.array([6.0, 8.0])
    unit = jnp.array([0.6, 0.8])
    for bad in (np.nan, np.inf, -np.inf):
        kernel = parts["dense"]["kernel"].at[0, 0].set(bad)
        updates = {"dense": {"kernel": kernel, "bias": parts["dense"]["bias"]}}
        nothing = jax.tree.map(jnp.zeros_like, updates)
        columns = jnp.stack([kernel[:, 0], unit], axis=1)
        other = columns.at[:, 0].set(0.0)
        expected = [
            *(updates, nothing, nothing),
            {"dense": {"kernel": kernel, "bias": unit}},
            {"dense": {"kernel": nothing["dense"]["kernel"], "bias": unit}},
            nothing,
            {"dense": {"kernel": columns, "bias": unit}},
            {"dense": {"kernel": other, "bias": unit}},
            nothing,
        ]
        actual = outcomes(updates)
        for case, result in zip(cases, expected, strict=True):
            out, state = actual[case[0], case[1].__name__]
            assert_same(out, result, equal_nan=True)
            assert state.clip.nonfinite_steps == 1


def test_a_bad_step_is_remembered_nowhere():
    """Also not by the parts that were finite: the next steps are as without it."""
    tx = clip_by(Bound(thresholds.MovingMean(1.0, warmup=1), scope=scopes.Leaf()))
    update = jax.jit(tx.update)
    good = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    _, state = update(good, tx.init(good))
    bad = {"a": jnp.array([jnp.nan, 4.0]), "b": jnp.array([0.1])}
    _, after = update(bad, state)
    assert_same(after.threshold_memory, state.threshold_memory, rtol=0)


# Which leaves, and which are together


def test_what_is_left_out_neither_counts_nor_changes():
    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan, 100.0])}
    tx = clip_by(1.0, where=lambda path, leaf: path == "a")
    out, state = tx.update(updates, tx.init(updates))
    expected = {"a": jnp.array([0.6, 0.8]), "b": updates["b"]}
    assert_same(out, expected, equal_nan=True)
    assert (state.clip.norm, state.clip.nonfinite_steps) == (5, 0)


@pytest.mark.parametrize("given", [True, False])
def test_a_bias_that_is_left_out_still_tells_the_units(given):
    """Or the memory would have another shape than the norms."""
    params = normal({"kernel": (6, 4, 5), "bias": (4, 5)})
    rule = thresholds.MovingMean(1.0, warmup=1)
    tx = clip_by(
        Bound(rule, scope=scopes.Unit()), where=lambda path, _: path == "kernel"
    )
    state = tx.init(params)
    assert state.threshold_memory[0]["kernel"].norm_mean.shape == (1, 4, 5)
    _, after = tx.update(params, state, params if given else None)
    assert_same(
        after.threshold_memory[0]["kernel"].norm_mean,
        norms.unit_norm(params["kernel"], 0),
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["layers", "units"])
def test_stacked_layers_are_clipped_one_by_one(axis, kind):
    """One bad layer of a scan must not wreck the others."""
    layers = [normal({"kernel": (6, 4), "bias": (4,)}, seed=seed) for seed in range(4)]
    layers[1] = jax.tree.map(lambda x: x * 1e6, layers[1])
    layers[2]["kernel"] = layers[2]["kernel"].at[0, 0].set(jnp.nan)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs, axis), *layers)
    whole, alone = {
        "layers": (scopes.Layer(axis), scopes.Leaf()),
        "units": (scopes.Unit(stacked=axis), scopes.Unit()),
    }[kind]
    actual, _ = jax.jit(functools.partial(first, clip_by(Bound(0.5, scope=whole))))(
        stacked
    )
    update = jax.jit(lambda layer: first(clip_by(Bound(0.5, scope=alone)), layer)[0])
    expected = jax.tree.map(lambda *xs: jnp.stack(xs, axis), *map(update, layers))
    assert_same(actual, expected, equal_nan=True)


def test_a_stack_has_a_history_for_each_layer():
    rule = thresholds.WindowedQuantile(0.5, 2.0, window=3)
    steps = [normal({"kernel": (3, 6, 4)}, seed=seed) for seed in range(3)]
    steps[2]["kernel"] = steps[2]["kernel"].at[1].multiply(50.0)
    tx, one = (
        clip_by(Bound(rule, scope=scopes.Layer(0))),
        clip_by(Bound(rule, scope=scopes.Leaf())),
    )
    state, update, alone = tx.init(steps[0]), jax.jit(tx.update), jax.jit(one.update)
    states = [one.init({"kernel": steps[0]["kernel"][i]}) for i in range(3)]
    for step in steps:
        clipped, state = update(step, state)
        for i in range(3):
            layer, states[i] = alone({"kernel": step["kernel"][i]}, states[i])
            assert_same(clipped["kernel"][i], layer["kernel"])
    assert state.threshold_memory[0]["kernel"].shape == (3, 1, 1, 3)


# Eight devices


SPLIT = {
    "rows": {"kernel": (16, 24)},
    "columns": {"kernel": (8, 64)},
    "whole": {"kernel": (6, 10), "bias": (10,)},
}
SPECS = {
    "rows": {"kernel": P("devices")},
    "columns": {"kernel": P(None, "devices")},
    "whole": {"kernel": P(), "bias": P()},
}
PASSES = {  # one program for all of them
    "unit_rms": [Bound(0.5, scopes.Unit(), norms.rms)],
    "layer": [Bound(0.5, scopes.Layer(lambda _, leaf: () if leaf.ndim < 2 else 0))],
    "leaf": [3.0, Bound(0.5, scopes.Leaf())],
    "unit_then_whole": [Bound(0.5, scopes.Unit()), 1.0],
    "group": [Bound(0.5, scopes.Group(lambda path, _: str("w" in path)))],
    "entry_history": [
        Bound(thresholds.MovingSquare(1.0, decay=0.5, warmup=1), scopes.Element())
    ],
}


def all_passes(**options):
    return {name: clip_by(*bounds, **options) for name, bounds in PASSES.items()}


def init_all(txs, params):
    return {name: tx.init(params) for name, tx in txs.items()}


def update_all(txs, updates, states):
    pairs = {name: tx.update(updates, states[name]) for name, tx in txs.items()}
    return tuple({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))


def run_all(update, states):
    results = []
    for seed in (1, 2, 3):
        out, states = update(normal(SPLIT, seed=seed), states)
        results.append(out)
    return results, states


@functools.cache
def on_one_device():
    txs = all_passes()
    update = jax.jit(functools.partial(update_all, txs))
    return run_all(update, init_all(txs, normal(SPLIT)))


def mesh_of(kind):
    axis_type = getattr(jax.sharding.AxisType, kind)
    return jax.make_mesh((8,), ("devices",), axis_types=(axis_type,))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_changes_nothing(kind):
    mesh, txs = mesh_of(kind), all_passes()
    shardings = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    # Arguments that only lend their types are dropped, and the mesh with them.
    init = jax.jit(functools.partial(init_all, txs), keep_unused=True)
    states = init(jax.device_put(normal(SPLIT), shardings))
    update = jax.jit(functools.partial(update_all, txs))
    actual = run_all(lambda u, s: update(jax.device_put(u, shardings), s), states)
    assert_same(*jax.device_get((actual, on_one_device())), rtol=2e-6)


def memory_spec(keys, leaf):
    """A memory is split as its leaf is, but along axes that were measured."""
    name = next((k.key for k in keys if "/" in str(getattr(k, "key", ""))), None)
    if name is None:
        return P()
    layer, kind = name.split("/")
    spec = SPECS[layer][kind]
    if leaf.ndim < len(SPLIT[layer][kind]):
        return P()
    return P(*(None if leaf.shape[i] == 1 else axis for i, axis in enumerate(spec)))


def test_shard_map_changes_nothing():
    txs = all_passes(
        axis_name="devices",
        specs=lambda path, _: SPECS[path.split("/")[0]][path.split("/")[1]],
    )
    init, update = (functools.partial(f, txs) for f in (init_all, update_all))
    shapes = jax.eval_shape(functools.partial(init_all, all_passes()), normal(SPLIT))
    state_specs = jax.tree_util.tree_map_with_path(memory_spec, shapes)
    mapped = functools.partial(jax.shard_map, mesh=mesh_of("Auto"))
    out_specs = dict.fromkeys(PASSES, SPECS), state_specs
    init = mapped(init, in_specs=(SPECS,), out_specs=state_specs)
    update = mapped(update, in_specs=(SPECS, state_specs), out_specs=out_specs)
    actual = run_all(jax.jit(update), jax.jit(init)(normal(SPLIT)))
    assert_same(*jax.device_get((actual, on_one_device())), rtol=2e-6)


# What it refuses


def test_what_cannot_be_right_is_refused():
    for error, message, make in [
        (ValueError, "threshold must not be negative", lambda: clip_by(-1.0)),
        (ValueError, "threshold must not be", lambda: clip_by({"a": 1.0, "b": -1.0})),
        (
            TypeError,
            "scope must be a value",
            lambda: clip_by(Bound(1.0, scope=scopes.Leaf)),
        ),
        (
            ValueError,
            "norm must be `norms.global",
            lambda: clip_by(Bound(1.0, norm=abs)),
        ),
        (ValueError, "bounds must not be empty", clip_by),
        (
            ValueError,
            "bounds must all go by",
            lambda: clip_by(1.0, Bound(1.0, norm=norms.inf_norm)),
        ),
        (
            ValueError,
            "only in the last place",
            lambda: clip_by(Bound(1.0, response=responses.clamp), 1.0),
        ),
    ]:
        with pytest.raises(error, match=message):
            make()


def test_what_does_not_fit_is_refused():
    updates = {"a": jnp.ones(2), "b": jnp.ones(())}
    relative = clip_by(thresholds.Relative(0.1))
    with pytest.raises(ValueError, match=r"params is None. Call `tx.update"):
        first(relative, updates)
    with pytest.raises(ValueError, match="no parameter for the update at 'b'"):
        first(relative, updates, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="at 'a' the update has shape"):
        first(relative, updates, updates | {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="do not fit the leaf at 'b'"):
        first(clip_by(Bound(1.0, scope=scopes.Layer(0))), updates)
    with pytest.raises(ValueError, match=r"names \['a'\], but there is a part 'b'"):
        first(clip_by(Bound({"a": 1.0}, scope=scopes.Leaf())), updates)


def test_lower_peaks_goes_by_the_largest_entry():
    with pytest.raises(ValueError, match=r"needs norm=norms\.inf_norm"):
        clipjax.clip_by(clipjax.Bound(1.0, response=responses.lower_peaks))
    tx = clipjax.clip_by(
        clipjax.Bound(2.0, norm=clipjax.norms.inf_norm, response=responses.lower_peaks)
    )
    updates = {"w": jnp.array([8.0, -4.0, 1.0])}
    out, state = tx.update(updates, tx.init(updates))
    np.testing.assert_allclose(out["w"], [2.0, -1.0, 1.0], rtol=1e-6)
    assert state.clip.clipped_steps == 1


def test_a_clamp_counts_what_it_changed():
    tx = clipjax.clip_by(clipjax.Bound(5.0, response=responses.clamp))
    updates = {"w": jnp.array([4.0, 4.0])}
    _, state = tx.update(updates, tx.init(updates))
    assert state.clip.clipped_steps == 0


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_dropping_lets_what_is_not_finite_pass(bad):
    tx = clipjax.clip_by(clipjax.Bound(1.0, response=responses.zero))
    out, _ = tx.update({"w": jnp.array([bad, 1.0])}, tx.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(out["w"], [bad, 1.0])


def test_a_bound_of_zero_and_tiny_norms():
    smooth, whole = (
        clip_by(Bound(0.0, response=responses.smooth)),
        clipjax.normalize_by_update_norm(10.0),
    )
    zeros, tiny = {"w": jnp.zeros(2)}, {"w": jnp.full(2, 1.2e-38)}
    assert (smooth.update(zeros, smooth.init(zeros))[0]["w"] == 0).all()
    assert jnp.isfinite(whole.update(tiny, whole.init(tiny))[0]["w"]).all()


def test_histories_stay_finite_beyond_float32():
    with x64():
        updates = {"w": jnp.full(3, 1e100)}
        for tx in (contrib.autoclip(window=4), clipjax.adaptive_clip()):
            _, state = jax.jit(tx.update)(updates, tx.init(updates))
            chex.assert_tree_all_finite(state)


def test_a_bound_among_rules_may_follow_a_schedule():
    tx = contrib.zclip(max_norm=lambda step: 1.0 + step.astype(jnp.float32))
    updates = {"w": jnp.array([9.0])}
    first, state = tx.update(updates, tx.init(updates))
    second, _ = tx.update(updates, state)
    np.testing.assert_allclose([first["w"][0], second["w"][0]], [1.0, 2.0], rtol=1e-6)


def test_strict_has_a_gradient():
    tx = clipjax.clip_by(1.0, strict=True)

    def total(u):
        return tx.update({"w": u}, tx.init({"w": u}))[0]["w"].astype(jnp.float32).sum()

    for dtype in ("float32", "bfloat16"):
        assert jnp.isfinite(jax.jit(jax.grad(total))(jnp.ones(4, dtype))).all()


# Several bounds on one measurement


def test_bounds_do_what_a_chain_of_clips_does():
    updates, params = normal(SHAPES, seed=1), normal(SHAPES, seed=2)
    bounds = [
        Bound(thresholds.Relative(0.3), scopes.Unit()),
        Bound(0.5, scopes.Leaf(), norms.rms),
        1.0,
    ]
    for order in (bounds, bounds[::-1], bounds[1:]):
        together, state = jax.jit(functools.partial(first, clip_by(*order)))(
            updates, params=params
        )
        clips = [clip_by(bound) for bound in order]
        apart, states = jax.jit(functools.partial(first, optax.chain(*clips)))(
            updates, params=params
        )
        assert_same(together, apart, rtol=2e-6)
        for name in ("norm", "clipped_norm"):
            last = states[0 if name == "norm" else -1].clip
            actual, expected = getattr(state.clip, name), getattr(last, name)
            np.testing.assert_allclose(actual, expected, rtol=2e-6)
        np.testing.assert_array_equal(state.clip.clipped_steps, 1)


def test_every_leaf_is_read_once_however_many_bounds_there_are():
    """But for the norms of norms, which are few."""

    def sums(*bounds):
        step = jax.make_jaxpr(functools.partial(first, clip_by(*bounds)))
        equations = step(normal(SHAPES)).jaxpr.eqns  # but for those in a branch
        large = max(leaf.size for leaf in jax.tree.leaves(normal(SHAPES)))
        read = [eqn for eqn in equations if eqn.primitive.name == "reduce_sum"]
        return sum(eqn.invars[0].aval.size == large for eqn in read)

    assert sums(Bound(0.5, scopes.Unit())) == 1
    assert sums(Bound(0.5, scopes.Unit()), Bound(0.5, scopes.Leaf()), 1.0) == 1


@pytest.mark.parametrize("state", [None, optax.EmptyState()])
def test_a_caller_may_keep_no_state_where_there_is_nothing_to_remember(state):
    updates = {"w": jnp.array([3.0, 4.0])}
    params = {"w": jnp.ones(2)}
    for tx in (
        clipjax.clip_by_global_norm(1.0),
        clipjax.clip_by_block_rms(0.5),
        clipjax.clip(1.0),
        clipjax.normalize_by_update_norm(),
        clipjax.adaptive_grad_clip(0.1),
    ):
        clipped, after = tx.update(updates, state, params)
        assert after is state
        assert_same(clipped, tx.update(updates, tx.init(params), params)[0], rtol=0)
    for tx in (clipjax.adaptive_clip(), clip_by(lambda step: step + 1.0)):
        with pytest.raises(
            ValueError, match=r"^state must be what `tx\.init\(params\)`"
        ):
            tx.update(updates, state, params)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """A rule of a user's own, with a function of its own."""

    pick: Callable

    def empty(self, norm):
        return jnp.zeros_like(norm)

    def threshold(self, memory, norm):
        return jnp.where(memory > 0, memory, jnp.inf)

    def remember(self, memory, norm, threshold, clipped_norm):
        return self.pick(memory, norm)


def test_a_rule_of_ones_own_may_hold_functions():
    tx = clip_by(Bound(Peaks(jnp.maximum), scopes.Leaf()))
    state, out = tx.init({"w": jnp.zeros(1)}), []
    for norm in [2.0, 1.0, 9.0, 9.0]:
        updates, state = tx.update({"w": jnp.array([norm])}, state)
        out.append(float(updates["w"][0]))
    np.testing.assert_allclose(out, [2, 1, 2, 9])


# What a number as a bound meets on a mesh, and other corners


@pytest.mark.parametrize(
    "bound",
    [
        Bound(1.0, scopes.Element()),
        Bound(1.0, scopes.Unit(), norms.inf_norm, responses.lower_peaks),
    ],
)
def test_a_number_bounds_split_parts_on_an_explicit_mesh(bound):
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(explicit,))
    updates = normal(SPLIT, seed=3)
    shardings = jax.tree.map(functools.partial(jax.NamedSharding, mesh), SPECS)
    tx, split = clip_by(bound), jax.device_put(updates, shardings)
    actual, _ = jax.jit(tx.update)(split, jax.jit(tx.init)(split))
    expected, _ = tx.update(updates, tx.init(updates))
    assert_same(jax.device_get(actual), jax.device_get(expected), rtol=2e-6)


@pytest.mark.parametrize("scope", [scopes.Tree(), scopes.Leaf()])
def test_leaves_may_differ_over_an_axis_that_is_not_named(scope):
    """As the gradients of every device do, before their mean is taken."""
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axis_types)
    tx = clip_by(Bound(1.0, scope), axis_name="model")
    a, b = normal((8, 3), seed=1), normal((4,), seed=2)

    def clipped(a, b):
        updates = {"a": a, "b": b}
        return tx.update(updates, tx.init(updates))[0]["a"]

    run = jax.shard_map(
        clipped, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    actual = jax.jit(run)(a, b)
    alone = clip_by(Bound(1.0, scope))  # what each device has, by itself
    parts = [{"a": a[i : i + 2], "b": b} for i in range(0, 8, 2)]
    expected = [alone.update(own, alone.init(own))[0]["a"] for own in parts]
    np.testing.assert_allclose(actual, jnp.concatenate(expected), rtol=2e-6)


def test_the_first_bounds_of_units_go_by_their_parameters():
    rule, start = thresholds.WindowedQuantile(), thresholds.Relative(0.1)
    params, updates = normal(SHAPES, seed=1), normal(SHAPES, seed=2)
    starts = clip_by(Bound(rule, scopes.Unit(), start=start))
    expected, _ = first(clip_by(Bound(start, scopes.Unit())), updates, params)
    actual, _ = first(starts, updates, params)
    assert_same(actual, expected, rtol=2e-6)


def test_entries_that_are_not_plainly_clamped_are_measured():
    element = scopes.Element()
    updates = {"w": jnp.array([3.0, -0.5]), "b": jnp.array([np.nan, 4.0])}

    def out(bound, **options):
        return first(
            clip_by(bound, **options), updates, {"w": updates["w"], "b": updates["w"]}
        )[0]

    peaks = out(Bound(1.0, element, norms.inf_norm, responses.lower_peaks))
    np.testing.assert_allclose(peaks["w"], [1.0, -0.5])
    clamp = Bound(1.0, element, response=responses.clamp)
    np.testing.assert_array_equal(out(clamp, nonfinite=responses.skip)["w"], [0, 0])
    zeroed = out(clamp, nonfinite=responses.zero_scope)
    np.testing.assert_allclose(zeroed["b"], [0, 1])
    relative = Bound(thresholds.Relative(0.1), element, response=responses.clamp)
    np.testing.assert_allclose(out(relative)["w"], [0.3, -0.05])


def test_groups_of_one_leaf_may_share_a_norm():
    scope = scopes.Group(lambda path, leaf: path, shared=True)
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, _ = first(clip_by(Bound({"a": 1.0, "b": 10.0}, scope)), updates)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [0.6, 4.0])


def test_bounds_in_float32_and_float64_together():
    with x64():
        tree = {"a": jnp.full(3, 2.0, jnp.float32), "b": jnp.full(3, 2.0, jnp.float64)}
        tx = clip_by(
            Bound({"a": 1.0, "b": jnp.float64(1.0)}, scopes.Leaf()),
            Bound(thresholds.Relative(0.1), scopes.Tree()),
        )
        out, _ = jax.jit(functools.partial(first, tx))(tree, tree)
        assert (out["a"].dtype, out["b"].dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(
            np.linalg.norm([*out["a"], *out["b"]]), 0.4899, rtol=1e-4
        )


def test_what_is_complex_and_infinite_passes():
    updates = {"z": jnp.array([np.inf + 0j, 1.0 - 2.0j])}
    clipped, state = first(clip_by(1.0), updates)
    np.testing.assert_array_equal(clipped["z"], updates["z"])
    assert state.clip.nonfinite_steps == 1


def test_norms_of_whole_leaves_are_added_over_devices_once():
    """Also where JAX does not track which blocks differ."""
    split = jax.P("x")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    updates = {"w": jnp.array([3.0, 4.0])}
    for bound in (1.0, Bound(9.0, scopes.Leaf(), response=responses.clamp)):
        for check_vma in (True, False):
            specs = (lambda path, leaf: split) if bound == 1.0 else None
            tx = clipjax.clip_by(bound, specs=specs, axis_name="x")

            def step(u, tx=tx):
                changed, state = tx.update(u, tx.init(u))
                return changed, state.clip.norm, state.clip.clipped_norm

            mapped = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=({"w": split},),
                out_specs=({"w": split}, jax.P(), jax.P()),
                check_vma=check_vma,
            )
            changed, norm, clipped_norm = jax.jit(mapped)(updates)
            limit = 1.0 if bound == 1.0 else 5.0
            np.testing.assert_allclose((norm, clipped_norm), (5, limit), rtol=1e-6)
            np.testing.assert_allclose(changed["w"], updates["w"] * limit / 5, 1e-6)


def test_each_label_starts_by_its_parameters():
    rule = thresholds.MovingMean(2.0)
    scope = scopes.Group(lambda path, leaf: path[0])
    bound = Bound({"a": rule, "b": rule}, scope, start=thresholds.Relative(0.1))
    tx = clipjax.clip_by(bound)
    params = {"a1": jnp.full(1, 3.0), "a2": jnp.full(1, 4.0), "b": jnp.full(1, 100.0)}
    changed, _ = tx.update(params, tx.init(params), params)
    assert_same(changed, {p: x / 10 for p, x in params.items()}, rtol=1e-6)
