"""What is measured together: the axes that a unit of a leaf spans.

A unit is what feeds one output of a layer: a column of a Dense kernel, a filter of a
convolution.  The rank of a kernel does not tell which axes these are: (3, 64, 32) may
be a 1-D convolution with 32 outputs or a projection to 64 heads of 32.  The bias next
to it does, since it has the shape of the outputs.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

_WHOLE = ("bias", "scale")
_INPUT_FIRST = ("query", "key", "value", "qkv")  # kernels of Flax's attention


def unit_axes(path: str, leaf: Array, bias: Array | None = None) -> tuple[int, ...]:
    """Returns the axes that one unit of a leaf spans, as Flax lays its layers out.

    | leaf                                       | shape             | axes          |
    | ------------------------------------------ | ----------------- | ------------- |
    | scalar, vector, bias, scale                | any               | all           |
    | Embed                                      | (tokens, features) | 1            |
    | Dense                                      | (in, out)         | 0             |
    | Conv, 1-D to 3-D                           | (…, in, out)      | all but last  |
    | DenseGeneral                               | (in…, out…)       | the in…       |
    | attention: query, key, value               | (in, heads, size) | 0             |
    | attention: out                             | (heads, size, out) | 0, 1         |

    Layers stacked along an axis of their own, as by `nn.scan`, are not told apart: name
    the axes for those.

    Where there is a bias, the axes of the kernel that it does not have are the unit's.
    Without one, `query`, `key`, `value` and `qkv` in the path mean (0,), and else every
    axis but the last is taken.

    Args:
        path: where the leaf stands, such as `attention/query/kernel`.
        leaf: the parameter.
        bias: of the same layer, if it has one.

    Example:
        >>> unit_axes("Conv_0/kernel", jnp.ones((3, 64, 32)), bias=jnp.ones(32))
        (0, 1)
        >>> unit_axes("attention/query/kernel", jnp.ones((64, 4, 16)))
        (0,)
    """
    *parents, name = path.split("/")
    rank = jnp.ndim(leaf)
    if rank <= 1 or name in _WHOLE:
        return tuple(range(rank))
    if name == "embedding":
        return (rank - 1,)
    if bias is not None and 0 < bias.ndim < rank:
        inputs = rank - bias.ndim
        if leaf.shape[inputs:] == bias.shape:
            return tuple(range(inputs))
    if parents and parents[-1] in _INPUT_FIRST:
        return (0,)
    return tuple(range(rank - 1))


def bias_of(path: str, leaves: Mapping[str, Array]) -> Array | None:
    """Returns the bias of the layer that a leaf belongs to.

    Args:
        path: of the leaf.
        leaves: all leaves by path.

    Example:
        >>> bias_of("Dense_0/kernel", {"Dense_0/bias": jnp.zeros(2)})
        Array([0., 0.], dtype=float32)
    """
    parent, slash, _ = path.rpartition("/")
    return leaves.get(f"{parent}{slash}bias")
