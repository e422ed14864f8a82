"""Scores that remember: sums and averages over many updates, or a random key.

A memory is made by an operation on its parameter, so that it has the parameter's
sharding.  It never takes in a number that is not finite.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from .._core import checks as check, sharding, trees
from .._core.types import Number
from ._plain import product


@runtime_checkable
class Tracked(Protocol):
    """The methods of a score that remembers one array for each leaf."""

    def init(self, path: str, param: Array) -> Array:
        """Returns the memory before the first step, an array of any shape."""
        ...

    def track(self, memory: Array, param: Array, update: Array) -> Array:
        """Returns the memory after a step whose update is finite."""
        ...

    def score(self, memory: Array, param: Array, update: Array) -> Array:
        """Returns the score of every entry; called when a mask is made."""
        ...


@dataclasses.dataclass(frozen=True)
class Movement:
    """Scores an entry by how far it has moved away from zero.

    s = Σₜ θₜ·uₜ, or -Σₜ θₜ·gₜ with gradients g

    Use it to fine-tune a pretrained network, whose magnitudes say more about the old
    task than about the new one.

    An entry that has been set to zero keeps its score.  Memory: a float32 an entry.

    Args:
        gradients: whether updates are gradients, which point uphill: `True` in
            `clipjax.sparse` and `clipjax.latent`, `False` in `clipjax.sparsify`.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> movement, param = clipjax.scores.Movement(), jnp.array([2.0, -1.0])
        >>> memory = movement.init("kernel", param)
        >>> memory = movement.track(memory, param, jnp.array([0.5, 0.5]))
        >>> movement.score(memory, param, param)
        Array([ 1. , -0.5], dtype=float32)

    Reference:
        Victor Sanh, Thomas Wolf, Alexander M. Rush, Movement Pruning: Adaptive Sparsity
        by Fine-Tuning, 2020, https://arxiv.org/abs/2005.07683
    """

    gradients: bool = False

    def __post_init__(self):
        check.flag(gradients=self.gradients)

    def init(self, path: str, param: Num[Array, "..."]) -> Float[Array, "..."]:
        """Returns zeros."""
        del path
        return trees.zeros(param, jnp.float32)

    def track(
        self, memory: Float[Array, "..."], param: Array, update: Array
    ) -> Float[Array, "..."]:
        """Adds one step."""
        moved = jnp.real(product(param, update)).astype(memory.dtype)
        return _finite(memory - moved if self.gradients else memory + moved, memory)

    def score(
        self, memory: Float[Array, "..."], param: Array, update: Array
    ) -> Float[Array, "..."]:
        """Returns the memory itself."""
        del param, update
        return memory


@dataclasses.dataclass(frozen=True)
class Fisher:
    """Scores an entry by what its removal costs, by the diagonal of the Fisher matrix.

    s = ½·θ²·F, Fₜ = d·Fₜ₋₁ + (1-d)·uₜ²

    Use it where gradients are at hand, in `clipjax.sparse` or `clipjax.latent`:
    `clipjax.sparsify` passes updates, which the optimizer has already rescaled.

    F is the empirical Fisher if u is the gradient of one example, and an estimate of it
    if u is the mean over a batch.  It starts at zero for all entries together, so that
    their order needs no correction.  Memory: a float32 an entry.

    Args:
        decay: d in [0, 1); 0.999 averages over about a thousand steps.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> fisher, param = clipjax.scores.Fisher(decay=0.5), jnp.array([2.0, -1.0])
        >>> memory = fisher.init("kernel", param)
        >>> memory = fisher.track(memory, param, jnp.array([1.0, 4.0]))
        >>> fisher.score(memory, param, param)
        Array([1., 4.], dtype=float32)

    Reference:
        Lucas Theis, Iryna Korshunova, Alykhan Tejani, Ferenc Huszár, Faster gaze
        prediction with dense networks and Fisher pruning, 2018,
        https://arxiv.org/abs/1801.05787
    """

    decay: Number = 0.999

    def __post_init__(self):
        check.number(decay=self.decay)
        check.below_one(decay=self.decay)

    def init(self, path: str, param: Num[Array, "..."]) -> Float[Array, "..."]:
        """Returns zeros."""
        del path
        return trees.zeros(param, jnp.float32)

    def track(
        self, memory: Float[Array, "..."], param: Array, update: Array
    ) -> Float[Array, "..."]:
        """Takes one step into the average."""
        del param
        decay = jnp.asarray(self.decay, jnp.float32)
        square = jnp.square(jnp.abs(trees.wide(update)).astype(memory.dtype))
        return _finite(decay * memory + (1 - decay) * square, memory)

    def score(
        self, memory: Float[Array, "..."], param: Array, update: Array
    ) -> Float[Array, "..."]:
        """Returns half the squared parameter times the average."""
        del update
        magnitude = jnp.abs(trees.wide(param)).astype(memory.dtype)
        return 0.5 * magnitude * memory * magnitude


@dataclasses.dataclass(frozen=True)
class Random:
    """Scores at random, anew in every step, entries that are zero below all others.

    s ~ U(0, 1] where θ ≠ 0, s ~ U(-1, 0] where θ = 0

    Use it as a baseline for other scores.

    Pruned entries stay pruned while the sparsity rises; when it falls, random ones
    return.  Under `jax.jit` the numbers are the same on every mesh; inside
    `jax.shard_map` every device draws its own.  Memory: one key a leaf.

    Args:
        key: a key from `jax.random.key`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> random = clipjax.scores.Random(jax.random.key(0))
        >>> param = jnp.array([2.0, 0.0, -1.0])
        >>> memory = random.init("kernel", param)
        >>> random.score(memory, param, param) > 0
        Array([ True, False,  True], dtype=bool)
    """

    key: Any

    def init(self, path: str, param: Num[Array, "..."]) -> UInt32[Array, " words"]:
        """Returns the data of this leaf's own key."""
        del param
        return jax.random.key_data(leaf_key(self.key, path))

    def track(
        self, memory: UInt32[Array, " words"], param: Array, update: Array
    ) -> UInt32[Array, " words"]:
        """Returns the data of the next key."""
        del param, update
        return jax.random.key_data(jax.random.fold_in(self._wrapped(memory), 1))

    def score(
        self, memory: UInt32[Array, " words"], param: Array, update: Array
    ) -> Float[Array, "..."]:
        """Draws a number for every entry."""
        del update
        return drawn(self._wrapped(memory), param)

    def _wrapped(self, memory: Array) -> Array:
        return jax.random.wrap_key_data(
            memory, impl=jax.random.key_impl(_typed(self.key))
        )


def leaf_key(key: Any, path: str) -> Array:
    """Returns the key of one leaf, which depends on its path alone."""
    return jax.random.fold_in(_typed(key), zlib.crc32(path.encode()))


def drawn(key: Array, param: Num[Array, "..."]) -> Float[Array, "..."]:
    """Draws a number for every entry, with the sharding of the parameter.

    Inside `jax.shard_map` each block of a split array draws its own.  Without
    `check_vma` a block cannot be told from a replica, and all draw the same.
    """
    key = sharding.own_key(key, sharding.differing_axes(param))
    values = jax.random.uniform(key, param.shape, jnp.float32)
    values = sharding.like(values, param)
    return jnp.where(param != 0, 1 - values, -values)


def _typed(key: Any) -> Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def _finite(new: Array, old: Array) -> Array:
    return jnp.where(jnp.isfinite(new), new, old)
