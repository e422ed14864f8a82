"""Masks of one bit an entry."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

BITS = 8  # in a byte


def pack(mask: Bool[Array, "..."]) -> UInt8[Array, "..."]:
    """Packs eight entries of the last axis into a byte; a scalar into one of its own.

    A last axis that is no multiple of eight is filled up with zeros.
    """
    return jnp.packbits(mask if mask.ndim else mask[None], axis=-1, bitorder="little")


def unpack(bits: UInt8[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Turns packed bits back into a mask of this shape."""
    # Not `unpackbits`, whose loop XLA does not fuse into the one that reads the mask.
    shifts = jnp.arange(BITS, dtype=jnp.uint8).reshape((1,) * bits.ndim + (BITS,))
    spread = (bits[..., None] >> shifts) & jnp.uint8(1)
    flat = spread.reshape(*bits.shape[:-1], bits.shape[-1] * BITS)
    length = shape[-1] if shape else 1
    return flat[..., :length].astype(bool).reshape(shape)
