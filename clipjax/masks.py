"""Masks: which entries stay (`True`) and which are zero, and how few bits hold that.

A mask is made from its parameter by an operation on it, never from its shape: that is
what gives it the parameter's sharding.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Num, UInt8

from ._core import sharding, trees
from ._core.types import AxisName
from .selection import _counts as counts

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


_DENSE_NAMES = ("bias", "scale", "embedding", "embeddings")
BITS = 8  # in a byte


def weights(path: str, leaf: Array) -> bool:
    """Tells whether a leaf holds weights: what is made sparse unless told otherwise.

    A floating leaf of rank 2 or more whose path does not end in a bias, a scale or an
    embedding.

    Args:
        path: where the leaf stands, such as `layers/0/kernel`.
        leaf: the parameter.

    Example:
        >>> weights("Dense_0/kernel", jnp.ones((2, 3)))
        True
        >>> weights("attention/query/bias", jnp.ones((2, 3)))
        False
    """
    name = path.rsplit("/", 1)[-1]
    is_dense = name.lower().endswith(_DENSE_NAMES)
    return trees.is_float(leaf) and jnp.ndim(leaf) >= 2 and not is_dense


def full(x: Num[Array, "..."]) -> Bool[Array, "..."]:
    """Returns a mask that keeps everything, laid out as `x` is.

    Example:
        >>> full(jnp.array([0.0, 2.0]))
        Array([ True,  True], dtype=bool)
    """
    return jnp.isfinite(x) | True


def nonzero(x: Num[Array, "..."]) -> Bool[Array, "..."]:
    """Returns the mask that a sparse array carries in itself.

    Example:
        >>> nonzero(jnp.array([0.0, -0.0, 2.0]))
        Array([False, False,  True], dtype=bool)
    """
    return x != 0


def apply(mask: Bool[Array, "..."], x: Num[Array, "..."]) -> Num[Array, "..."]:
    """Sets to zero what the mask does not keep: NaN and infinity too.

    Example:
        >>> apply(jnp.array([True, False]), jnp.array([3.0, jnp.nan]))
        Array([3., 0.], dtype=float32)
    """
    return jnp.where(mask, x, jnp.zeros_like(x))


def count(mask: Bool[Array, "..."], *, axis_name: AxisName = None) -> Int[Array, ""]:
    """Returns how many entries a mask keeps.

    Args:
        mask: of fewer than 2³¹ entries.
        axis_name: inside `jax.shard_map`, the mesh axes over which it is split.

    Example:
        >>> count(jnp.array([True, False, True]))
        Array(2, dtype=int32)
    """
    kept = counts.passing([mask])[0].astype(jnp.int32)
    return sharding.over(lax.psum, kept, mask, axis_name)


def pack(mask: Bool[Array, "*rest n"]) -> UInt8[Array, "*rest bytes"]:
    """Packs eight entries of the last axis into a byte, the first in the lowest bit.

    A last axis that is no multiple of eight is filled up with zeros.  No entry leaves
    its device as long as each holds a multiple of eight.

    Args:
        mask: of rank 1 or more.

    Example:
        >>> pack(jnp.array([True, True, False, True]))
        Array([11], dtype=uint8)
    """
    return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack(bits: UInt8[Array, "*rest bytes"], length: int) -> Bool[Array, "*rest n"]:
    """Turns packed bits back into a mask whose last axis has this length.

    Args:
        bits: as `pack` returned them.
        length: of the last axis of the mask.

    Example:
        >>> unpack(jnp.uint8([11]), 4)
        Array([ True,  True, False,  True], dtype=bool)
    """
    # Not `unpackbits`, whose loop XLA does not fuse into the one that reads the mask.
    shifts = jnp.arange(BITS, dtype=jnp.uint8).reshape((1,) * bits.ndim + (BITS,))
    spread = (bits[..., None] >> shifts) & jnp.uint8(1)
    flat = spread.reshape(*bits.shape[:-1], bits.shape[-1] * BITS)
    return flat[..., :length].astype(bool)


@dataclasses.dataclass(frozen=True)
class Bits:
    """Stores a mask as it was made: one bit a parameter."""


@dataclasses.dataclass(frozen=True)
class Booleans:
    """Stores a mask as it was made, unpacked: a byte a parameter."""


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Stores nothing: between two masks, what is zero stays zero."""


Storage = Bits | Booleans | Zeros
"""How a mask is kept between two steps."""


def __dir__() -> list[str]:
    return __all__
