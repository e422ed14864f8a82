"""Norms in a chain: measured once, known to the next transform, and right."""

import functools
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from clipjax import contrib, norms, responses, scopes, thresholds
from clipjax._clipping import _known as known
from helpers import assert_same, normal

SHAPES = {"in": {"kernel": (64, 32), "bias": (32,)}, "out": {"kernel": (32, 8)}}
BARRIER = optax.stateless(lambda u, _: jax.tree.map(lambda x: x + 0.0, u))


def global_clip(**options):
    return clipjax.clip_by(1.0, **options)


CHAINS = {  # the second needs no more than the first has measured
    "twice": (global_clip(), clipjax.normalize_by_update_norm(0.3)),
    "adaptive first": (clipjax.adaptive_clip(), clipjax.clip_by_global_norm(0.01)),
    "leaves, then all": (clipjax.clip_by_leaf_norm(0.5), global_clip()),
    "groups, then all": (
        global_clip(scope=scopes.Group(lambda path, _: path.split("/")[0])),
        global_clip(),
    ),
    "units, then leaves": (
        clipjax.adaptive_grad_clip(0.01),
        clipjax.clip_by_block_rms(0.001),
    ),
    "largest": (
        global_clip(norm=norms.inf_norm, scope=scopes.Leaf()),
        global_clip(norm=norms.inf_norm),
    ),
    "history": (contrib.adagc(), contrib.zclip(max_norm=0.7)),
    "skipped": (
        global_clip(nonfinite=responses.skip),
        clipjax.clip_by_global_norm(0.1),
    ),
}


def reads(tx, updates, params):
    """How many instructions outside of branches take the updates, weighed by size."""
    state = jax.jit(tx.init)(params)
    compiled = jax.jit(tx.update).lower(updates, state, params).compile()
    entry = compiled.as_text().split("ENTRY", 1)[1].splitlines()
    read, leaves = 0, jax.tree.leaves(updates)
    for i, leaf in enumerate(leaves):
        (line,) = [x for x in entry if f"parameter({i})" in x]
        name = re.escape(line.split("=")[0].split()[-1])
        uses = [x for x in entry if re.search(rf"{name}[,)]", x)]
        read += leaf.size * sum(
            not re.search(r" (tuple|conditional|while)\(", x) for x in uses
        )
    return read / sum(leaf.size for leaf in leaves)


def apart(first, second):
    """Two clips between which the arrays change, so that nothing is known of them."""
    return optax.chain(first, BARRIER, second)


def updated(tx, updates, params):
    return tx.update(updates, tx.init(params), params)


def outgoing(tx, updates, params):
    return updated(tx, updates, params)[0]


PARAMS, UPDATES = normal(SHAPES), normal(SHAPES, seed=1)


# What is known


@pytest.mark.parametrize("name", CHAINS)
def test_two_clips_read_the_updates_as_often_as_one(name):
    first, second = CHAINS[name]
    alone = reads(first, UPDATES, PARAMS)
    assert reads(optax.chain(first, second), UPDATES, PARAMS) <= alone
    assert reads(apart(first, second), UPDATES, PARAMS) > alone


def test_the_values_are_the_same():
    @jax.jit
    def both(updates):
        return {
            name: [
                updated(tx, updates, PARAMS)
                for tx in (optax.chain(*pair), apart(*pair))
            ]
            for name, pair in CHAINS.items()
        }

    for scale in (1e-3, 1.0, 1e3):
        updates = jax.tree.map(lambda x, s=scale: x * s, UPDATES)
        for actual, expected in both(updates).values():
            assert_same(actual[0], expected[0], rtol=2e-6)
            states = actual[1], (expected[1][0], expected[1][2])
            assert_same(*states, rtol=2e-6)


@jax.jit
def at_any_scale(updates):
    return [
        outgoing(
            optax.chain(first, clipjax.normalize_by_update_norm(2.0)), updates, PARAMS
        )
        for first in (clipjax.clip_by_leaf_norm(1e36), clipjax.adaptive_grad_clip(1e36))
    ]


@pytest.mark.parametrize("scale", [1e-30, 1e-17, 1e17, 1e30])
def test_norms_of_parts_are_right_at_any_scale(scale):
    """Their squares are not."""
    updates = jax.tree.map(lambda x: x * jnp.float32(scale), UPDATES)
    for out in at_any_scale(updates):
        flat = np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(out)])
        np.testing.assert_allclose(np.linalg.norm(flat), 2, rtol=1e-5)


def sums(tx):
    """How many sums over whole kernels are in the program, branches and all."""
    text = str(jax.make_jaxpr(lambda u: updated(tx, u, PARAMS))(UPDATES))
    return len(re.findall(r"reduce_sum\[\s*axes=\(0, 1\)", text))


def test_wrappers_let_the_clip_inside_know():
    clip, none = clipjax.clip_by_global_norm(1.0), optax.identity()
    for wrap in (
        clipjax.skip_spikes,
        lambda tx: clipjax.reset_moments(tx, on_spike=thresholds.WindowedQuantile()),
    ):
        assert sums(wrap(clip)) == sums(wrap(none)) > 0
        assert sums(wrap(optax.chain(BARRIER, clip))) > sums(wrap(none))


# What is not


def test_what_was_rounded_is_measured_anew():
    updates = normal({"w": (4000,)}, dtype="bfloat16")
    tx = optax.chain(clipjax.clip_by_global_norm(1.0), clipjax.clip_by_global_norm(0.5))
    middle = outgoing(clipjax.clip_by_global_norm(1.0), updates, updates)["w"]
    _, (_, second) = jax.jit(tx.update)(updates, tx.init(updates))
    expected = np.linalg.norm(np.float64(middle))
    assert abs(expected - 1) > 1e-6
    np.testing.assert_allclose(second.clip.norm, expected, rtol=3e-7)


OTHERS = {  # of the same arrays, but not the same norm
    "where": (clipjax.clip_by(0.5, where=lambda path, _: "in" in path), global_clip()),
    "whole, then part": (
        global_clip(),
        clipjax.clip_by(0.1, where=lambda path, _: "in" in path),
    ),
    "norm": (global_clip(), global_clip(norm=norms.inf_norm)),
    "axes": (
        clipjax.adaptive_grad_clip(0.1, axis=lambda _, x: 0),
        clipjax.adaptive_grad_clip(0.1, axis=lambda _, x: x.ndim - 1),
    ),
    "strict": (global_clip(strict=True), global_clip(strict=True)),
    "clamp": (
        clipjax.clip_by(0.5, response=responses.clamp),
        clipjax.clip_by_global_norm(0.3),
    ),
    "policy": (
        global_clip(nonfinite=lambda leaf, *_: jnp.nan_to_num(leaf)),
        global_clip(),
    ),
}


@pytest.mark.parametrize("bad", [False, True])
def test_other_norms_are_not_taken_for_one_another(bad):
    updates = jax.tree.map(lambda x: x, UPDATES)
    if bad:
        updates["in"]["bias"] = updates["in"]["bias"].at[0].set(jnp.nan)

    @jax.jit
    def both(updates):
        return [
            [outgoing(make(*pair), updates, PARAMS) for make in (optax.chain, apart)]
            for pair in OTHERS.values()
        ]

    for actual, expected in both(updates):
        assert_same(actual, expected, rtol=2e-6, equal_nan=bad)


def test_what_a_branch_has_measured_is_unknown_outside():
    tx = clipjax.clip_by_global_norm(1.0)

    @jax.jit
    def after(updates):
        first = jax.lax.cond(
            updates["in"]["bias"][0] > 0,
            lambda: outgoing(tx, updates, PARAMS),
            lambda: updates,
        )
        return first, outgoing(tx, updates, PARAMS)

    with jax.checking_leaks():
        _, actual = after(UPDATES)
    assert_same(actual, outgoing(tx, UPDATES, PARAMS), rtol=1e-6)


def test_devices_that_measure_apart_are_told_from_those_that_do_it_together():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    together = functools.partial(clipjax.clip_by_global_norm, axis_name="d")
    specs = {"in": {"kernel": P("d"), "bias": P()}, "out": {"kernel": P(None, "d")}}

    def run(make, first, second):
        def update(updates):
            return outgoing(make(first, second), updates, updates)

        mapped = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs)
        return jax.jit(mapped)(UPDATES)

    def spec_of(path, _):
        layer, kind = path.split("/")
        return specs[layer][kind]

    units = clipjax.adaptive_clip(axis_name="d", specs=spec_of)
    no_bias = functools.partial(clipjax.clip_by, where=lambda path, _: "kernel" in path)
    for first, second in [
        (together(0.5), together(0.1)),
        (together(0.5), no_bias(0.1)),
        (no_bias(0.5), together(0.1)),
        (units, together(0.01)),
    ]:
        actual, expected = (run(make, first, second) for make in (optax.chain, apart))
        assert_same(*jax.device_get((actual, expected)), rtol=2e-6)


# Anywhere


def test_nothing_outlives_its_trace():
    gc.collect()
    before = len(known._found)

    def update(bound, updates):
        tx = optax.chain(
            clipjax.clip_by_leaf_norm(bound),
            clipjax.skip_spikes(clipjax.normalize_by_update_norm(bound)),
        )
        return outgoing(tx, updates, updates)

    def total(bound, updates):
        return sum(jnp.sum(x) for x in jax.tree.leaves(update(bound, updates)))

    def scanned(bound, updates):
        step = functools.partial(update, bound)
        return jax.lax.scan(lambda u, _: (step(u), None), updates, length=2)

    small = normal({"a": (3, 2), "b": (2,)})
    with jax.checking_leaks():
        for function in (update, scanned, jax.grad(total, argnums=1)):
            jax.eval_shape(jax.jit(function), jnp.float32(0.5), small)
            many = jax.jit(jax.vmap(function, (0, None)))
            jax.eval_shape(many, jnp.array([0.5, 2.0]), small)
    outgoing(clipjax.clip_by_leaf_norm(0.5), small, small)
    del small
    gc.collect()
    assert len(known._found) == before


def test_the_values_are_the_same_in_every_transformation():
    small = normal({"a": (3, 2), "b": (2,)})
    pair = clipjax.clip_by_leaf_norm, clipjax.normalize_by_update_norm

    def through(make, transform):
        def update(bound, updates):
            tx = make(pair[0](bound), pair[1](2.0))
            return outgoing(tx, updates, updates)

        def total(bound, updates):
            out = update(bound, updates)
            return sum(jnp.sum(x**3) for x in jax.tree.leaves(out))

        bounds, many = jnp.array([0.5, 2.0]), jax.tree.map(lambda x: x[None] * 2, small)
        return {
            "eager": lambda: update(bounds[0], small),
            "bounds": lambda: jax.vmap(update, (0, None))(bounds, small),
            "updates": lambda: jax.vmap(update, (None, 0))(bounds[0], many),
            "slope": lambda: jax.grad(total, argnums=(0, 1))(bounds[0], small),
            "scan": lambda: jax.lax.scan(
                lambda u, b: (update(b, u), None), small, bounds
            )[0],
        }[transform]

    for transform in ("eager", "bounds", "updates", "slope", "scan"):
        actual, expected = (through(make, transform) for make in (optax.chain, apart))
        expected = jax.jit(expected)()
        if transform in ("eager", "updates"):  # operation by operation takes long
            assert_same(actual(), expected, rtol=1e-5, atol=1e-6)
        assert_same(jax.jit(actual)(), expected, rtol=1e-5, atol=1e-6)
