"""What several test files need. Comparisons go through `assert_same`."""

import chex
import jax
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
