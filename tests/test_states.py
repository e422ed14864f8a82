"""What every state is made of: a change of it is a change of the checkpoint format.

    PYTHONPATH=. python tests/test_states.py

writes `states.txt` anew. A change of that file is a line in the changelog.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import clipjax
from clipjax import contrib, latents, masks, scores, thresholds
from helpers import relaxed
from transforms import TRANSFORMS

FILE = pathlib.Path(__file__).with_name("states.txt")
SHAPES = {"dense": {"kernel": (8, 4), "bias": (4,)}, "gain": (), "half": (4, 6)}


def params():
    def array(keys, shape):
        half = keys[0] == jax.tree_util.DictKey("half")
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if half else jnp.float32)

    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    return jax.tree_util.tree_map_with_path(array, SHAPES, **is_shape)


def described(name, node, indent=""):
    """A line for each node of a state: its name, and its kind or type."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind, children = type(node).__name__, node._asdict().items()
    elif isinstance(node, dict):
        kind, children = "dict", sorted(node.items())
    elif isinstance(node, tuple | list):
        kind, children = type(node).__name__, enumerate(node)
    elif node is None:
        kind, children = "None", ()
    else:
        kind, children = f"{node.dtype}{list(node.shape)}", ()
    yield f"{indent}{name}: {kind}"
    for key, child in children:
        yield from described(key, child, indent + "  ")


def all_states():
    for name, row in TRANSFORMS.items():
        state = jax.eval_shape(row.make().init, params())
        yield "\n".join(described(name, state)) + "\n"


def test_states_are_those_of_the_file():
    assert "\n".join(all_states()) == FILE.read_text(), (
        "A state has changed. If that is meant, write the file anew, as the first lines"
        " of this test say, and a line in CHANGELOG.md."
    )


KERNEL = {"kernel": jnp.ones((4, 16))}
BOTH = KERNEL | {"other": KERNEL["kernel"]}
OTHER = {"where": lambda path, leaf: path == "other"}
SGD = optax.sgd(0.1)
sparsify = functools.partial(clipjax.sparsify, 0.5)
latent = functools.partial(clipjax.latent, SGD, 0.5)
Window = thresholds.WindowedQuantile
MISMATCHES = {  # the transform of the state, that of the step, what is said
    "where": (sparsify(**OTHER), sparsify(), "no mask for 'kernel'"),
    "elsewhere": (sparsify(), sparsify(**OTHER), "does not choose"),
    "no storage": (sparsify(storage=masks.Zeros()), sparsify(), "no mask .* `storage`"),
    "storage": (sparsify(), sparsify(storage=masks.Zeros()), "of uint8 .* `storage`"),
    "bits": (sparsify(storage=masks.Booleans()), sparsify(), "of bool .* `storage`"),
    "score": (sparsify(), sparsify(score=scores.Movement()), "no memory of the score"),
    "no score": (sparsify(score=scores.Movement()), sparsify(), "need none"),
    "other score": (
        sparsify(score=scores.Random(jax.random.key(0))),
        sparsify(score=scores.Fisher()),
        r"of shape \(2,\), but .* one of shape \(4, 16\)",
    ),
    "sparse": (
        clipjax.sparse(SGD, 0.5),
        clipjax.sparse(SGD, 0.5, storage=masks.Booleans()),
        "`storage`",
    ),
    "snfs": (
        clipjax.sparse(SGD, 0.5),
        contrib.sparse_momentum(SGD, 0.5, total_steps=9, key=jax.random.key(0)),
        "no mean gradient for 'kernel'",
    ),
    "latent": (latent(**OTHER), latent(), "no mask for 'kernel'"),
    "explored": (
        latent(),
        latent(reparametrization=latents.top_kast(0.2)),
        "no mask of gradients for 'kernel'",
    ),
    "levels": (
        latent(),
        clipjax.latent(SGD, None, reparametrization=latents.soft_threshold()),
        "'kernel'",
    ),
    "window": (
        clipjax.clip_by(Window(window=8)),
        clipjax.clip_by(Window(window=9)),
        r"memory of norms of shape \(8,\), but .* one of shape \(9,\)",
    ),
    "rule": (clipjax.clip_by(1.0), clipjax.clip_by(Window()), "no memory of norms"),
    "bounds": (clipjax.clip_by(1.0), clipjax.clip_by(1.0, 2.0), "of 1 bounds, but"),
    "spikes": (
        clipjax.skip_spikes(SGD, window=8),
        clipjax.skip_spikes(SGD, window=9),
        r"window of norms of shape \(8,\)",
    ),
    "resets": (
        clipjax.reset_moments(SGD, on_spike=Window(window=8)),
        clipjax.reset_moments(SGD, on_spike=Window(window=9)),
        r"memory of norms of shape \(8,\)",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_state_of_other_arguments_is_told(name):
    old, new, said = MISMATCHES[name]
    with relaxed():
        state = jax.eval_shape(old.init, BOTH)
        with pytest.raises(ValueError, match=f"(?s)state .*{said}.* `tx.init"):
            jax.eval_shape(new.update, BOTH, state, BOTH)


OF_PARAMETERS = {
    "sparsify": (sparsify(), "no mask for 'kernel'"),
    "latent": (latent(), "no mask for 'kernel'"),
    "rewinding": (contrib.rewinding(SGD, every=1, rounds=1), "no mask for 'kernel'"),
    "adagc": (contrib.adagc(), "no memory of norms for 'kernel'"),
    "carry_clipped": (clipjax.carry_clipped(SGD), "no carry for 'kernel'"),
    "proximal": (
        clipjax.proximal(clipjax.prox.L1(0.1), 0.1),
        "no share of zeros for 'kernel'",
    ),
    "error_feedback": (
        TRANSFORMS["error_feedback"].make(),
        "no memory for 'kernel'",
    ),
    "regularized_dual_averaging": (
        TRANSFORMS["regularized_dual_averaging"].make(),
        "no start for 'kernel'",
    ),
}


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_a_state_of_other_parameters_is_told(name):
    tx, said = OF_PARAMETERS[name]
    with relaxed():
        state = jax.eval_shape(tx.init, {"other": KERNEL["kernel"]})
        with pytest.raises(ValueError, match=f"state has {said}"):
            jax.eval_shape(tx.update, KERNEL, state, KERNEL)


@pytest.mark.parametrize("name", ["sparsify", "latent", "carry_clipped"])
def test_a_state_of_other_shapes_is_told(name):
    tx, _ = OF_PARAMETERS[name]
    with relaxed():
        state = jax.eval_shape(tx.init, {"kernel": jnp.ones((6, 24))})
        with pytest.raises(ValueError, match=r"for 'kernel' of shape \(6, "):
            jax.eval_shape(tx.update, KERNEL, state, KERNEL)


if __name__ == "__main__":
    FILE.write_text("\n".join(all_states()))
