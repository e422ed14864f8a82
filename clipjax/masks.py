"""Masks: which entries stay (`True`) and which are zero; how to count and pack them.

A mask is made by an operation on its parameter, never from its shape alone: so it has
the parameter's sharding.
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Num, UInt8

from ._core import bits as _bits, sharding, trees
from ._core.types import AxisName
from .selection import _reductions as passes

__all__ = [
    "BITS",
    "Bits",
    "Booleans",
    "Storage",
    "Zeros",
    "apply",
    "count",
    "full",
    "nonzero",
    "pack",
    "unpack",
    "weights",
]


_DENSE_NAMES = re.compile(  # biases, scales, embeddings, learned tokens
    r"(bias|(^|_)scale|offset|embeddings?|_emb|_embed|tokens?|bias_table)$"
    r"|^(b|emb|embed|gain|gamma|beta|wte|wpe)$"
)
_DENSE_PARENTS = re.compile(  # of a `weight`
    r"(layer|batch|group|rms|instance|^|_)norm(_|\d|$)"
    r"|(^|_)(embeddings?|embed_?tokens|tok_embed)$|^(ln|wte|wpe|emb)(_|\d|$)"
)
BITS = _bits.BITS  # in a byte


def weights(path: str, leaf: Array) -> bool:
    """Tells whether a leaf holds weights: a floating leaf of rank 2 or more.

    The default of `where` in every transform that makes parameters sparse.  Biases,
    scales, embeddings and learned tokens are no weights, as Flax, Haiku, Equinox and
    PyTorch name them: `bias`, `b`, `scale`, `offset`, `embedding`, `pos_embed`, `wte`,
    `cls_token`; and a `weight` in what is called `norm`, `ln_1` or `embed…`.  Whatever
    has another name needs a `where` of your own.

    Args:
        path: the path of the leaf, such as `layers/0/kernel`.
        leaf: the parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.weights("Dense_0/kernel", jnp.ones((2, 3)))
        True
        >>> clipjax.masks.weights("attention/query/bias", jnp.ones((2, 3)))
        False
    """
    *_, parent, name = ["", *path.lower().split("/")]
    is_dense = bool(_DENSE_NAMES.search(name))
    is_dense |= name == "weight" and bool(_DENSE_PARENTS.search(parent))
    return trees.is_float(leaf) and jnp.ndim(leaf) >= 2 and not is_dense


def full(x: Num[Array, "..."]) -> Bool[Array, "..."]:
    """Returns a mask that keeps every entry, with the sharding of `x`.

    Args:
        x: an array; only its shape and its sharding matter.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.full(jnp.array([0.0, 2.0]))
        Array([ True,  True], dtype=bool)
    """
    return jnp.isfinite(x) | True


def nonzero(x: Num[Array, "..."]) -> Bool[Array, "..."]:
    """Returns the mask of the entries that are not zero.

    Args:
        x: an array; -0.0 counts as zero, NaN does not.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.nonzero(jnp.array([0.0, -0.0, 2.0]))
        Array([False, False,  True], dtype=bool)
    """
    return x != 0


def apply(mask: Bool[Array, "..."], x: Num[Array, "..."]) -> Num[Array, "..."]:
    """Sets every entry that the mask does not keep to zero, also a NaN or an infinity.

    Args:
        mask: `True` for the entries to keep.
        x: an array of the shape of the mask.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.apply(jnp.array([True, False]), jnp.array([3.0, jnp.nan]))
        Array([3., 0.], dtype=float32)
    """
    return jnp.where(mask, x, jnp.zeros_like(x))


def count(mask: Bool[Array, "..."], *, axis_name: AxisName = None) -> Int[Array, ""]:
    """Returns how many entries a mask keeps.

    Args:
        mask: a mask of fewer than 2³¹ entries.
        axis_name: inside `jax.shard_map`, the mesh axes over which the mask is split.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.count(jnp.array([True, False, True]))
        Array(2, dtype=int32)
    """
    kept = passes.passing([mask])[0].astype(jnp.int32)
    return sharding.over(lax.psum, kept, mask, axis_name)


def pack(mask: Bool[Array, "*rest n"]) -> UInt8[Array, "*rest bytes"]:
    """Packs eight entries of the last axis into a byte, the first in the lowest bit.

    A last axis whose length is no multiple of eight is padded with zeros.  On a mesh no
    entry leaves its device if each device holds a multiple of eight.

    Args:
        mask: a mask of rank 1 or more.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.pack(jnp.array([True, True, False, True]))
        Array([11], dtype=uint8)
    """
    return _bits.pack(mask)


def unpack(bits: UInt8[Array, "*rest bytes"], length: int) -> Bool[Array, "*rest n"]:
    """Turns packed bits back into a mask.

    Args:
        bits: what `pack` returned.
        length: the length of the mask's last axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> clipjax.masks.unpack(jnp.uint8([11]), 4)
        Array([ True,  True, False,  True], dtype=bool)
    """
    return _bits.unpack(bits, (*bits.shape[:-1], length))


@dataclasses.dataclass(frozen=True)
class Bits:
    """Stores a mask as it was made, in one bit a parameter."""


@dataclasses.dataclass(frozen=True)
class Booleans:
    """Stores a mask as it was made, in one byte a parameter; a CPU reads it faster."""


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Stores nothing: entries that are zero stay zero until the next mask is made."""


Storage = Bits | Booleans | Zeros
"""How a mask is kept between two steps."""


def __dir__() -> list[str]:
    return __all__
