"""A whole chain on a mesh: what its program exchanges, and two processes."""

import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest
from jax import P

import clipjax
from helpers import normal, relaxed
from test_contract import MOST_BYTES, collectives, devices

SHAPES = {"in": {"kernel": (16, 64)}, "out": {"kernel": (64, 8), "bias": (8,)}}
SPECS = {
    "in": {"kernel": P(None, "devices")},
    "out": {"kernel": P("devices"), "bias": P()},
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_whole_chain_exchanges_a_few_numbers(kind):
    mesh = devices(kind)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), SPECS)
    params, grads = jax.device_put(
        (normal(SHAPES), normal(SHAPES, seed=1)), (shardings, shardings)
    )
    tx = optax.chain(
        clipjax.adaptive_grad_clip(0.01),
        clipjax.adaptive_clip(),
        optax.adamw(1e-3),
        clipjax.sparsify(0.5),
    )
    with relaxed():
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    found = list(collectives(compiled))
    assert {exchange for exchange, _ in found} == {"all-reduce"}
    assert max(size for _, size in found) <= MOST_BYTES
    # Outside of the search's loops and branches: norms, units, counts.
    assert len(found) <= 40


WORKER = """
import sys
import jax, numpy as np
port, rank = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
import jax.numpy as jnp, optax, clipjax

axis_types = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((2,), ("devices",), axis_types=axis_types)
sharding = jax.NamedSharding(mesh, jax.P("devices"))

def split(array):
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

rng = np.random.default_rng(0)
arrays = [rng.normal(size=(8, 6)).astype(np.float32) for _ in range(4)]
tx = optax.chain(
    clipjax.adaptive_grad_clip(0.1), clipjax.adaptive_clip(), clipjax.sparsify(0.5)
)

def train(arrays):
    params, *grads = ({"kernel": array} for array in arrays)
    state = jax.jit(tx.init)(params)
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"]

alone = np.asarray(train([jnp.asarray(array) for array in arrays]))
both = train([split(array) for array in arrays])
assert jax.process_count() == 2 and len(both.addressable_shards) == 1
(shard,) = both.addressable_shards
assert shard.data.shape == (4, 6)
np.testing.assert_allclose(shard.data, alone[shard.index], rtol=1e-5)
assert ((np.asarray(shard.data) == 0) == (alone[shard.index] == 0)).all()
print("same on process", rank)
"""


def test_two_processes_do_what_one_does():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(WORKER), port]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            assert f"same on process {rank}" in output
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_stacked_layers_are_clipped_as_if_apart():
    """One bad layer of a stack leaves the others alone."""
    layers = [normal({"kernel": (5, 4)}, seed=seed) for seed in range(3)]
    params = [normal({"kernel": (5, 4)}, seed=10 + seed) for seed in range(3)]
    layers[1] = jax.tree.map(lambda leaf: leaf * 1e3, layers[1])

    def stack(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    tx = clipjax.adaptive_grad_clip(0.1, stacked=0)
    stacked, _ = tx.update(stack(layers), tx.init(stack(params)), stack(params))
    alone = clipjax.adaptive_grad_clip(0.1)
    for i, (layer, own) in enumerate(zip(layers, params, strict=True)):
        expected, _ = alone.update(layer, alone.init(own), own)
        np.testing.assert_allclose(
            stacked["kernel"][i], expected["kernel"], rtol=1e-6, atol=0
        )
