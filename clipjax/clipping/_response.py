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
    bound = jnp.maximum(bound, 0)  # a schedule may have gone below
    known = jnp.isfinite(norm)
    larger = jnp.maximum(bound, jnp.where(known, norm, 0))
    # Zero only where both are; what is scaled is then zero too.
    larger = jnp.where(larger > 0, larger, 1)
    return jnp.where(known, bound, larger) / larger


def exceeds(norm: Float[Array, "..."], bound: Float[Array, "..."]) -> Bool[Array, ""]:
    """Tells whether any norm is above its bound; a NaN is not."""
    return jnp.any(norm > bound.astype(norm.dtype))
