"""What becomes of an update whose norm is above its bound: it is scaled down."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def shrink(
    norm: Float[Array, "..."], bound: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns c / max(c, n): one, exactly, for a norm that is within its bound.

    One also for a norm or a bound that is not finite.  The division comes last, where
    XLA does not repeat it for every entry that is scaled.
    """
    most = jnp.finfo(norm.dtype).max
    bound = jnp.nan_to_num(bound.astype(norm.dtype), nan=most, posinf=most)
    known = jnp.where(jnp.isfinite(norm), norm, jnp.zeros_like(norm))
    larger = jnp.maximum(bound, known)
    # Zero only where both are; what is scaled is then zero too.
    return bound / jnp.where(larger > 0, larger, jnp.ones_like(larger))


def exceeds(norm: Float[Array, "..."], bound: Float[Array, "..."]) -> Bool[Array, ""]:
    """Tells whether any norm is above its bound; a NaN is not."""
    return jnp.any(norm > bound.astype(norm.dtype))
