"""The types that every layer speaks of."""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

Number = float | int | Float[Array, ""] | Int[Array, ""]
"""A scalar hyperparameter: a Python number or a traced value."""

Schedule = Callable[[Int[Array, ""]], Number]
"""What Optax calls a schedule: from the step to the value."""

Axes = int | tuple[int, ...]
"""Axes of an array."""

AxisName = str | tuple[str, ...] | None
"""Mesh axes to reduce over inside `jax.shard_map`; `None` outside of it."""

Where = Callable[[str, Array], bool]
"""A predicate on the path of a leaf and the leaf itself."""
