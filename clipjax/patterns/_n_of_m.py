"""A fixed number of entries in every few neighbors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import masks
from .._core import checks as check
from .._core.types import AxisName, Number
from ..allocations import Allocation
from ..allocations._budget import Scores, written
from ..selection import _keys as ranking
from ._pattern import Masks, axis_of, is_whole


@dataclasses.dataclass(frozen=True)
class NofM:
    """Keeps the best `n` of every `m` neighbors along an axis.

    Of equal scores the first stays.  The sparsity is fixed by the pattern, 1 - n/m, and
    what is asked for counts only as zero, where all stays, or not zero: a number that
    is neither zero nor that one is refused.  The allocation is not used.

    Args:
        n: how many of the neighbors stay, in [0, m].
        m: how many neighbors are compared, ≥ 1.  No leaf is moved between devices as
            long as each holds a multiple of m along the axis.
        axis: along which neighbors stand.  The default is Flax's axis of outputs;
            hardware that skips zeros wants them along the inputs, -2.
        dense_if_ragged: whether a leaf whose axis is no multiple of m stays dense;
            otherwise it is refused.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> scores = {"kernel": jnp.array([3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 9.0])}
        >>> masks = clipjax.patterns.NofM(2, 4).masks(
        ...     scores, 0.5, allocation=clipjax.allocations.uniform
        ... )
        >>> masks["kernel"].astype(int)
        Array([1, 0, 1, 0, 1, 0, 0, 1], dtype=int32)

    Reference:
        Asit Mishra, Jorge Albericio Latorre, Jeff Pool, Darko Stosic, Dusan Stosic,
        Ganesh Venkatesh, Chong Yu, Paulius Micikevicius, Accelerating Sparse Deep
        Neural Networks, 2021, https://arxiv.org/abs/2104.08378
    """

    n: int
    m: int
    axis: int = -1
    dense_if_ragged: bool = False

    def __post_init__(self):
        check.whole(1, m=self.m)
        check.whole(0, n=self.n)
        check.between(0, self.m, n=self.n)
        check.flag(dense_if_ragged=self.dense_if_ragged)

    @property
    def own_sparsity(self) -> float:
        """Returns the only sparsity that there is beside zero."""
        return 1 - self.n / self.m

    def masks(
        self,
        scores: Mapping[str, Scores],
        sparsity: Number,
        *,
        allocation: Allocation,
        axis_name: AxisName = None,
    ) -> Masks:
        """Marks what stays; arguments as for `Unstructured.masks`."""
        del allocation, axis_name
        dense = jnp.asarray(sparsity) == 0
        return {p: self._mask(written(x)) | dense for p, x in scores.items()}

    def _mask(self, scores: Float[Array, "..."]) -> Bool[Array, "..."]:
        axis = axis_of(self, self.axis, scores)
        if not is_whole(self, scores, axis, self.m, self.dense_if_ragged):
            return masks.full(scores)
        groups = (scores.shape[axis] // self.m, self.m)
        split = (*scores.shape[:axis], *groups, *scores.shape[axis + 1 :])
        is_double = scores.dtype == jnp.float64
        keys = ranking.key_of(scores, jnp.int64 if is_double else jnp.int32)
        keys = jnp.moveaxis(keys.reshape(split), axis + 1, -1)
        # Ranked by a count, which XLA fuses: a sort would be a loop over the groups.
        own, other = keys[..., :, None], keys[..., None, :]
        place = jnp.arange(self.m, dtype=jnp.int32)
        earlier = (place[None, :] < place[:, None]).reshape(
            (1,) * (keys.ndim - 1) + (self.m, self.m)
        )
        ahead = (other > own) | ((other == own) & earlier)
        kept = jnp.sum(ahead, axis=-1, dtype=jnp.int32) < self.n
        return jnp.moveaxis(kept, -1, axis + 1).reshape(scores.shape)
