"""Moving a mask: some of the kept entries are dropped, and others grow.

Numbers of entries are exact, and nothing is sorted.  A dropped entry may grow again at
once, as in the published code; it then keeps its value.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .. import norms, selection
from .._core import sharding
from .._core.types import AxisName
from ..allocations import Budget
from ..selection import _counts as counts
from ..selection._counts import Count


def moved(
    masks: Sequence[Bool[Array, "..."]],
    params: Sequence[Array],
    growth: Sequence[Float[Array, "..."]],
    *,
    stay: Count,
    budget: Budget,
    axis_name: AxisName,
) -> list[Bool[Array, "..."]]:
    """Returns masks in which so many of the old entries stay and the others are new.

    Those with the largest magnitudes stay, at most; those with the highest growth are
    new, until every group has what its budget says.
    """
    options = {"floors": budget.floors, "axis_name": axis_name}
    sizes = [jnp.where(m, jnp.abs(x), -1) for m, x in zip(masks, params, strict=True)]
    largest = selection.select(sizes, stay, budget.groups, **options)
    left = [new & old for new, old in zip(largest, masks, strict=True)]
    order = [jnp.where(m, jnp.inf, x) for m, x in zip(left, growth, strict=True)]
    return selection.select(order, budget.kept, budget.groups, **options)


def part_of(number: Count, share: Float[Array, "..."]) -> Count:
    """Returns ⌊share·number⌋."""
    rounded = counts.floor(jnp.clip(share, 0, 1) * number.to_float())
    return counts.where(number.at_least(rounded), rounded, number)


def redistributed(
    total: Count, shares: Float[Array, " arrays"], room: Count, sizes: Sequence[int]
) -> Count:
    """Splits a number in proportion to shares, exactly, within the room of each array.

    What rounding and full arrays leave over goes to the largest array that has room.
    """
    part = part_of(total, shares)
    parts = counts.filled(total, counts.where(room.at_least(part), part, room))
    rest = total - counts.total(parts)
    more = counts.filled(rest, room - parts, order=counts.largest_first(sizes))
    return counts.plus(parts, more)


def means(
    scores: Sequence[Float[Array, "..."]],
    masks: Sequence[Bool[Array, "..."]],
    numbers: Count,
    axis_name: AxisName,
) -> Float[Array, " arrays"]:
    """Returns of every array the mean score of what the mask keeps, up to one scale.

    The largest score of all is one, so that no sum overflows.
    """
    kept = [
        jnp.where(m, x, 0).astype(jnp.float32)
        for x, m in zip(scores, masks, strict=True)
    ]
    peak = norms.inf_norm(kept, axis_name=axis_name)
    unit = jnp.where(peak > 0, peak, 1)
    sums = [sharding.over(lax.psum, jnp.sum(x / unit), x, axis_name) for x in kept]
    return jnp.stack(sums) / jnp.maximum(numbers.to_float(), 1)
