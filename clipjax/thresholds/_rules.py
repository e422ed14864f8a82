"""What a rule with a history is: a frozen value of three methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree

Norms = Float[Array, "..."]
"""One norm, or one for each part that is measured by itself."""

Feed = Callable[[Norms, Norms, Norms], Norms]
"""From a norm, its threshold and the norm after the clip to what is remembered."""


@runtime_checkable
class History(Protocol):
    """The methods of a rule with a history."""

    def empty(self, norm: Norms) -> PyTree:
        """Returns the memory before the first norm, for norms of this shape."""
        ...

    def threshold(self, memory: PyTree, norm: Norms) -> Norms:
        """Returns the threshold for this norm; infinity where there is none yet."""
        ...

    def remember(
        self, memory: PyTree, norm: Norms, threshold: Norms, clipped_norm: Norms
    ) -> PyTree:
        """Returns the memory after this norm."""
        ...
