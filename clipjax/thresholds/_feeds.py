"""What is remembered of a norm."""

import dataclasses

import jax.numpy as jnp

from .._core import checks as check
from .._core.types import Number
from ._history import Norms
from ._numbers import like


def raw(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it came.

    Example:
        >>> raw(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(9., dtype=float32)
    """
    del threshold, clipped_norm
    return norm


def clipped(norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
    """Remembers the norm as it went.

    Example:
        >>> clipped(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(2., dtype=float32)
    """
    del norm, threshold
    return clipped_norm


@dataclasses.dataclass(frozen=True)
class Winsorized:
    """Remembers a norm at no more than so many thresholds.

    Args:
        most: ≥ 1.

    Example:
        >>> Winsorized(3.0)(jnp.float32(9.0), jnp.float32(2.0), jnp.float32(2.0))
        Array(6., dtype=float32)
    """

    most: Number = 3.0

    def __post_init__(self):
        """Checks the argument."""
        check.at_least(1, most=self.most)

    def __call__(self, norm: Norms, threshold: Norms, clipped_norm: Norms) -> Norms:
        """Returns what is remembered."""
        del clipped_norm
        return jnp.minimum(norm, like(self.most, norm) * threshold)
