"""What a transform adds to a program, and to what a reader visits, may not grow.

Programs are counted by shape alone, before optimization: nothing is compiled, and every
figure is the same on every machine. `python -m benchmarks.compile` has the seconds.
"""

import jax
import optax
import pytest

import clipjax
from benchmarks import compile as programs, shapes
from helpers import relaxed
from transforms import TRANSFORMS

BUDGETS = {  # operations a leaf, operations beside these; loops, branches
    "clip": (9, 41, 0, 0),
    "clip_by_global_norm": (13, 192, 0, 1),
    "adaptive_grad_clip": (32, 263, 0, 1),
    "adaptive_clip": (20, 443, 0, 2),
    "adaptive_clip_units": (39, 682, 0, 2),
    "spectral_clip": (60, 2000, 8, 1),
    "skip_spikes": (16, 390, 0, 2),
    "reset_moments": (23, 280, 0, 2),
    "carry_clipped": (22, 60, 0, 0),
    "greedy_clip": (30, 345, 1, 2),
    "sparsify": (18, 1368, 2, 4),
    "sparse": (31, 1399, 2, 5),
    "rigl": (32, 2170, 6, 5),
    "latent": (52, 1438, 2, 5),
    "proximal": (31, 75, 0, 0),
    "rewinding": (140, 1080, 1, 2),
    "regularized_dual_averaging": (38, 80, 0, 0),
    "error_feedback": (55, 1340, 2, 5),
    "deep_gradient_compression": (69, 1340, 2, 5),
    "keep_zeros": (4, 12, 0, 0),
}
UNROLLED = pytest.mark.xfail(reason="its iterations are written once for each matrix")
PEERS = {  # at most so many times the operations of the peer
    "clip_by_global_norm": 1.3,
    "clip_by_block_rms": 2.0,
    "adaptive_grad_clip": 2.0,
    "adaptive_clip": 1.5,
    "sparsify": 0.6,
    "rigl": 2.2,
    "chain": 1.7,
}
WALKS = {  # functions and files of the package, from the factory to the traced update
    "clip_by_global_norm": (47, 7),
    "adaptive_grad_clip": (71, 10),
    "adaptive_clip": (79, 10),
    "sparsify": (138, 21),
    "rigl": (166, 24),
}
PAIRS = programs.pairs()


def blocks(count):
    """Six leaves a block, of several types and ranks."""
    shapes = {"dense": (16, 24), "out": (24, 16), "conv": (3, 3, 4, 8)}
    shapes |= {"half": (8, 16), "bias": (24,), "gain": ()}
    block = {
        name: jax.ShapeDtypeStruct(shape, "bfloat16" if name == "half" else "float32")
        for name, shape in shapes.items()
    }
    return {f"block_{i}": block for i in range(count)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=UNROLLED if name == "spectral_clip" else ())
        for name in TRANSFORMS
    ],
)
def test_a_program_grows_with_the_leaves_and_no_faster(name):
    each, beside, *most = BUDGETS[name]
    small, large = blocks(2), blocks(4)
    few, many = (
        programs.counted(programs.lowered(TRANSFORMS[name].make(), tree))
        for tree in (small, large)
    )
    measured = (many[0] - few[0]) / 12, 2 * few[0] - many[0], *few[1:]
    said = f"{name}: {measured} operations a leaf, beside, loops, branches"
    assert few[0] <= beside + 12 * each, said
    assert many[0] <= beside + 24 * each, said
    assert few[1:] == many[1:], f"{said}, and {many[1:]} with twice the leaves"
    assert all(count <= limit for count, limit in zip(few[1:], most, strict=True)), said


@pytest.mark.parametrize("name", PEERS)
def test_a_program_is_near_the_size_of_its_peer(name):
    with relaxed():
        params = shapes.arrays(shapes.gpt2())
        ours, peer = (
            programs.counted(programs.lowered(make(), params))[0]
            for make in PAIRS[name]
        )
    assert len(jax.tree.leaves(params)) == 148
    assert ours <= PEERS[name] * peer, f"{ours:,}: {ours / peer:.2f} times {peer:,}"


@pytest.mark.parametrize("name", WALKS)
def test_a_reader_visits_few_functions_in_few_files(name):
    with relaxed():
        params = shapes.arrays(shapes.gpt2(layers=1))
        found = programs.visited(PAIRS[name][0], params, clipjax)
    files = {path for path, *_ in found}
    functions, most_files = WALKS[name]
    assert len(found) <= functions, f"{len(found)} functions"
    assert len(files) <= most_files, f"{len(files)} files"


def test_the_budget_sees_a_loop_over_leaves():
    """A budget that nothing exceeds would not be one."""

    def update(updates, state, params=None):
        del params
        rolled = jax.tree.map(
            lambda u: jax.lax.fori_loop(0, 3, lambda _, x: x + x, u), updates
        )
        return rolled, state

    tx = optax.GradientTransformation(optax.identity().init, update)
    counts = [programs.counted(programs.lowered(tx, blocks(n))) for n in (1, 2)]
    assert [loops for _, loops, _ in counts] == [6, 12]
