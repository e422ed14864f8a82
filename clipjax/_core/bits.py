"""Masks of one bit an entry."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

BITS = 8  # in a byte


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A mask as bits: whoever needs it unpacks it, in the loop that reads it."""

    bits: UInt8[Array, "..."]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    kept: Any = None  # how many entries, an int32, if that is known


def mask_of(mask: Bool[Array, "..."] | Packed) -> Bool[Array, "..."]:
    """Returns a mask that may be packed."""
    return unpack(mask.bits, mask.shape) if isinstance(mask, Packed) else mask


def pack(mask: Bool[Array, "..."]) -> UInt8[Array, "..."]:
    """Packs eight entries of the last axis into a byte; a scalar into one of its own.

    A last axis that is no multiple of eight is filled up with zeros.
    """
    return jnp.packbits(mask if mask.ndim else mask[None], axis=-1, bitorder="little")


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a mask's bits."""
    *others, last = shape or (1,)
    return *others, -(-last // BITS)


def unpack(bits: UInt8[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Turns packed bits back into a mask of this shape."""
    # Not `unpackbits`, whose loop XLA does not fuse into the one that reads the mask.
    shifts = jnp.arange(BITS, dtype=jnp.uint8).reshape((1,) * bits.ndim + (BITS,))
    spread = (bits[..., None] >> shifts) & jnp.uint8(1)
    flat = spread.reshape(*bits.shape[:-1], bits.shape[-1] * BITS)
    length = shape[-1] if shape else 1
    return flat[..., :length].astype(bool).reshape(shape)
