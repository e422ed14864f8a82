"""Reductions by rows: the same numbers, whatever the shape and wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import clipjax
from clipjax import masks
from clipjax.selection import _reductions as passes
from helpers import assert_same, normal

SHAPES = [
    (),
    (0,),
    (0, 256),
    (256, 0),
    (16411,),  # a prime
    (16384,),  # rows are made
    (1, 16384),
    (7, 3000),
    (128, 128),
    (3, 5, 200),  # few
    (64, 128),  # just as many as are few
    (16, 16, 64),
    (5, 5, 16, 64),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
END = np.int32(2**31 - 1)


def summary(x):
    """The sum, the least and the largest entry."""

    def merge(left, right):
        return (
            left[0] + right[0],
            jax.lax.min(left[1], right[1]),
            jax.lax.max(left[2], right[2]),
        )

    return jnp.stack(passes.reduce((x, x, x), (np.int32(0), END, -END), merge))


def draw(shape):
    return np.random.default_rng(0).integers(-99, 99, shape, dtype=np.int32)


def expected(x):
    return np.array([x.sum(), x.min(initial=END), x.max(initial=-END)], np.int32)


@each_shape
def test_numbers_are_those_of_numpy(shape):
    x = draw(shape)
    assert_same(jax.jit(summary)(jnp.asarray(x)), expected(x), rtol=0)


@pytest.mark.parametrize("size", [100, 16384])
def test_a_batch_is_reduced_one_by_one(size):
    x = draw((3, size))
    mapped = jax.jit(jax.vmap(summary))(jnp.asarray(x))
    assert_same(mapped, np.stack([expected(row) for row in x]), rtol=0)


@each_shape
def test_blocks_of_an_array_are_reduced_apart(shape):
    x = draw((8, *shape))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def own(block):
        return summary(block[0])[None]

    mapped = jax.shard_map(own, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    assert_same(jax.jit(mapped)(x), np.stack([expected(part) for part in x]), rtol=0)


def test_a_mesh_of_one_device_is_as_no_mesh():
    shapes = {"a": (4096, 16), "b": (64, 16, 16), "c": (8, 2048), "d": (8, 2048)}
    specs = {"a": P("d"), "b": P("d", "m"), "c": P(None, "d"), "d": P(None, "m")}
    plain, tx = normal(shapes), clipjax.sparsify(0.5, where=lambda path, leaf: True)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    expected, _ = update(plain, init(plain), plain)
    for kind in ("Auto", "Explicit"):
        axis_types = (getattr(jax.sharding.AxisType, kind),) * 2
        mesh = jax.make_mesh((1, 1), ("d", "m"), axis_types=axis_types)
        places = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
        there = jax.device_put(plain, places)
        assert_same(update(there, init(there), there)[0], expected, rtol=0)
        for kernel in there.values():
            assert masks.count(masks.nonzero(kernel)) == kernel.size


def test_states_move_between_a_mesh_and_its_blocks():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = P(None, "d")
    params = {"kernel": normal((4, 512))}
    split = jax.device_put(params, jax.NamedSharding(mesh, columns))
    outside, inside = clipjax.sparsify(0.5), clipjax.sparsify(0.5, axis_name="d")
    state = jax.jit(outside.init)(split)
    specs = jax.tree.map(lambda x: columns if x.ndim == 2 else P(), state)
    mapped = jax.jit(
        jax.shard_map(
            inside.update,
            mesh=mesh,
            in_specs=(columns, specs, columns),
            out_specs=(columns, specs),
        )
    )
    expected, there = jax.jit(outside.update)(params, outside.init(params), params)
    updates, state = mapped(split, state, split)
    assert_same(updates["kernel"], expected["kernel"], rtol=0)
    assert_same(state.mask_bits["kernel"], there.mask_bits["kernel"], rtol=0)
    again, _ = jax.jit(outside.update)(split, state, split)  # and out again
    assert_same(again["kernel"], expected["kernel"], rtol=0)


def test_no_byte_of_a_mask_is_gathered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, P(None, "d"))
    tx = clipjax.sparsify(0.5, every=2)
    for columns in (64, 128, 1024):
        params = {"kernel": jax.device_put(normal((4, columns)), split)}
        state = jax.jit(tx.init)(params)
        step = jax.jit(tx.update).lower(params, state, params).compile()
        assert "all-gather" not in step.as_text()
        assert (
            step(params, state, params)[1]
            .mask_bits["kernel"]
            .sharding.is_equivalent_to(split, 2)
        )
