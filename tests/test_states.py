"""What every state is made of: a change of it is a change of the checkpoint format.

    PYTHONPATH=. python tests/test_states.py

writes `states.txt` anew. A change of that file is a line in the changelog.
"""

import pathlib

import jax
import jax.numpy as jnp

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


if __name__ == "__main__":
    FILE.write_text("\n".join(all_states()))
