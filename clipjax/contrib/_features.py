"""Which input features a sparse network still reads."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._core import trees


def selected_features(
    params: PyTree, path: str, *, axis: int = 0
) -> Bool[Array, " features"]:
    """Returns a mask of the input features whose weights are not all zero.

    Use it after a training that selects features: a group lasso on the rows of the
    first kernel, last in the chain, sets all weights of a feature to zero together.

        clipjax.proximal(
            clipjax.prox.GroupLasso(strength),
            learning_rate,
            scope=clipjax.scopes.Unit(axis=1),
            where=lambda path, leaf: path == "Dense_0/kernel",
        )

    A network without the other features, and without their rows of the kernel, computes
    the same.

    Args:
        params: the parameters of the network.
        path: the path of its first kernel, such as `Dense_0/kernel`.
        axis: the axis of the kernel along which the features lie: 0 for Dense, -2 for
            Conv.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> params = {"dense": {"kernel": jnp.array([[0.0, 0.0], [0.0, -2.0]])}}
        >>> clipjax.contrib.selected_features(params, "dense/kernel")
        Array([False,  True], dtype=bool)

    Reference:
        Ismael Lemhadri, Feng Ruan, Louis Abraham, Robert Tibshirani, LassoNet: A Neural
        Network with Feature Sparsity, 2021, https://arxiv.org/abs/1907.12207
    """
    leaves = trees.by_path(params)
    if path not in leaves:
        names = ", ".join(map(repr, leaves)) or "none"
        raise ValueError(
            f"path must name a parameter, but is {path!r}. There: {names}."
        )
    kernel = jnp.asarray(leaves[path])
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(
            f"axis must be one of the {kernel.ndim} axes of the parameter at {path!r},"
            f" but is {axis}."
        )
    others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
    return jnp.any(kernel != 0, axis=others)
