"""What several test files need. Comparisons go through `assert_same`."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np


def x64(new_val=True):
    """A context with float64, also for JAX before 0.8, which has it elsewhere."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(new_val)
    from jax.experimental import enable_x64

    return enable_x64(new_val)


def assert_same(actual, expected, *, rtol=1e-6, atol=0.0, equal_nan=False):
    """Same structure, shapes, dtypes and, within the tolerances, values.

    chex's comparison of values alone takes bfloat16 for float32, a scalar for an
    array and NaN for NaN. Both tolerances 0 ask for equality, in which 0.0 is -0.0.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    if not equal_nan:
        for path, leaf in jax.tree_util.tree_leaves_with_path((actual, expected)):
            side = ("actual", "expected")[path[0].idx]
            name = jax.tree_util.keystr(path[1:])
            assert not np.isnan(np.asarray(leaf)).any(), f"{side}{name} holds NaN"
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


@contextlib.contextmanager
def relaxed():
    """Lets optax and flax promote dtypes and ranks in their own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(shapes, *, seed=0, dtype="float32"):
    """Replaces every shape in a tree by an array of normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(  # rounded by NumPy, as JAX would compile each shape's rounding
        lambda shape: jnp.asarray(np.asarray(rng.normal(size=shape), dtype), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def integers(count):
    """Python integers from the two words of each of many counts."""
    high, low = (np.asarray(word, np.int64) for word in count)
    return (high * 2**16 + low).tolist()


def spec(tree):
    """What has to stay the same for a compiled step to be used again."""
    kinds = [
        leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        for leaf in jax.tree.leaves(tree)
    ]
    details = [(kind.shape, kind.dtype, kind.weak_type) for kind in kinds]
    return jax.tree.structure(tree), details
