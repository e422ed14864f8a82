"""When masks of latent weights are made, and of what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import masks
from .._core import checks as check, sharding, trees
from .._core.bits import mask_of
from .._core.types import AxisName, Number, Schedule
from .._sparsity._ranked import check_score, check_sees_gradients, scored
from .._sparsity._store import (
    NEVER,
    Leaves,
    SparsifyState,
    check_storage,
    is_due,
    measured,
    pack,
    target,
    unpack,
)
from ..allocations import Allocation
from ..patterns import Pattern, PatternByPath
from ..patterns._by_path import marks
from ..scores import Score, Tracked, magnitude
from ..selection._keys import Magnitude
from ._reparametrizations import Identity, Power, Reparametrization

Scores = dict[str, Array | Magnitude]


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which entries of the weights ψ(z) the network has; see `latent`."""

    sparsity: Number | Schedule | None
    rule: Reparametrization
    score: Score | Tracked
    pattern: Pattern | PatternByPath
    allocation: Allocation
    every: Number | Schedule
    storage: masks.Storage
    axis_name: AxisName

    def __post_init__(self):
        if self.sparsity is not None:
            check.between(0, 1, sparsity=self.sparsity)
        check.at_least(1, every=self.every)
        check.pattern(pattern=self.pattern)
        check.met_by(self.pattern, sparsity=self.sparsity)
        check.function(allocation=self.allocation)
        check_score(self.score)
        check_sees_gradients(self.score)
        check.one_of(masks.Bits, masks.Booleans, masks.Zeros, storage=self.storage)
        check_storage("latent", self.storage)
        by_itself = self.rule.threshold is not None
        if by_itself and self.sparsity is not None:
            raise ValueError(
                "sparsity must be None where the reparametrization has thresholds of"
                f" its own, but is {self.sparsity!r}. Pass None, or leave the"
                " thresholds out."
            )
        makes_zeros = by_itself or not isinstance(self.rule.curve, Identity | Power)
        if self.sparsity is None and not makes_zeros:
            raise ValueError(
                "sparsity is None, and the reparametrization has no thresholds of its"
                " own: nothing would be zero. Pass a number or a schedule."
            )

    @property
    def stores(self) -> bool:
        """Tells whether there are masks, or only zeros that the curve makes."""
        return self.sparsity is not None or self.rule.threshold is not None

    def thresholds(self, weights: Leaves) -> dict[str, Float[Array, ""]]:
        """Returns the fixed threshold of each leaf, if there are any."""
        threshold = self.rule.threshold
        if threshold is None:
            return {}
        return {p: threshold(w, self.axis_name) for p, w in weights.items()}

    @functools.cached_property
    def first(self) -> Callable[..., tuple[SparsifyState, Leaves]]:
        """Makes the first masks; compiled, since piece by piece a search is slow."""
        return jax.jit(self._first)

    def here(self) -> "Masking":
        """Returns this, or where there are no mesh axes, the same without them.

        `init` may be called outside of `jax.shard_map`, if only for its shapes.
        """
        try:
            sharding.size(self.axis_name)
        except NameError:
            return self._alone
        return self

    @functools.cached_property
    def _alone(self) -> "Masking":
        return dataclasses.replace(self, axis_name=None)

    def _first(
        self,
        weights: Leaves,
        thresholds: dict[str, Float[Array, ""]],
        memory: Leaves,
    ) -> tuple[SparsifyState, Leaves]:
        """Returns the first masks, by magnitude, and which entries get a gradient.

        They hold for one step only: another score may need a gradient.
        """
        step = jnp.zeros([], jnp.int32)
        ranks = scored(magnitude, {}, weights, weights)
        old = {p: masks.full(w) for p, w in weights.items()}
        bits, shares, total, explored = self._made(
            step, weights, ranks, old, thresholds
        )
        age = jnp.asarray(NEVER, jnp.int32)
        return SparsifyState(step, age, bits, shares, total, memory), explored

    def next(
        self, known: Bool[Array, ""], state: Any, weights: Leaves, slopes: Leaves
    ) -> tuple[SparsifyState, Leaves]:
        """Returns the masks after a step, made anew if they are due."""
        old = state.latent_masks
        due = known
        if self.stores:
            due &= is_due(old, self.every, self.sparsity)

        def hold():
            shares = old.leaf_sparsity
            return old.mask_bits, shares, old.total_sparsity, state.explored_bits

        def search():
            kept = {p: kept_of(old, p, w) for p, w in weights.items()}
            ranks = scored(self.score, old.score_memory, weights, slopes)
            bits, shares, total, explored = self._made(
                old.step, weights, ranks, kept, state.fixed_thresholds
            )
            return (
                old.mask_bits | bits,
                old.leaf_sparsity | shares,
                total,
                state.explored_bits | explored,
            )

        bits, shares, total, explored = (
            jax.lax.cond(due, search, hold) if weights else hold()
        )
        age = jnp.where(due, 1, trees.next_step(old.mask_age))
        new = SparsifyState(
            jnp.where(known, trees.next_step(old.step), old.step),
            jnp.where(known, age, old.mask_age),
            bits,
            shares,
            total,
            old.score_memory,
        )
        return new, explored

    def _made(
        self,
        step: Int[Array, ""],
        weights: Leaves,
        ranks: Scores,
        kept: Leaves,
        thresholds: dict[str, Float[Array, ""]],
    ) -> tuple[Leaves, Leaves, Array, Leaves]:
        """Makes masks: bits, shares of zeros, and bits of what gets a gradient."""
        if not weights:
            return {}, {}, jnp.zeros([], jnp.float32), {}
        share = jnp.ones([], jnp.float32)
        if self.rule.threshold is not None:
            margin = trees.value_at(self.rule.hysteresis, step)
            kept = {
                p: _crossed(w, kept[p], thresholds[p], margin)
                for p, w in weights.items()
            }
        elif self.sparsity is None:
            kept = {p: masks.nonzero(w) for p, w in weights.items()}
        else:
            share = target(self.sparsity, step)
            kept = self._selected(self._favoring(kept, ranks, step), weights, share)
        explored = {}
        if self.rule.backward_sparsity is not None:
            least = trees.value_at(self.rule.backward_sparsity, step)
            wider = self._selected(ranks, weights, jnp.clip(least, 0, share))
            explored = {
                p: pack(wider[p] | mask, self.storage) for p, mask in kept.items()
            }
        bits, shares, total = measured(kept, self.axis_name, self.storage)
        return bits if self.stores else {}, shares, total, explored

    def _selected(
        self, scored: Scores, weights: Leaves, share: Float[Array, ""]
    ) -> Leaves:
        found = marks(
            scored,
            weights,
            share,
            pattern=self.pattern,
            allocation=self.allocation,
            axis_name=self.axis_name,
        )
        return {path: mask_of(mask) for path, mask in found.items()}

    def _favoring(self, kept: Leaves, scored: Scores, step: Int[Array, ""]) -> Scores:
        """Raises the scores of what is kept, by the ratio of the two thresholds."""
        hysteresis = self.rule.hysteresis
        if isinstance(hysteresis, int | float) and not hysteresis:
            return scored
        margin = trees.value_at(hysteresis, step)
        ratio = (1 + margin) / (1 - margin)  # hysteresis is below one
        return {p: _raised(s, kept[p], ratio) for p, s in scored.items()}


def kept_of(state: SparsifyState, path: str, weights: Array) -> Bool[Array, "..."]:
    """Returns which entries of a leaf the network has."""
    if path in state.mask_bits:
        return unpack(state.mask_bits[path], weights)
    return masks.nonzero(weights)


def _raised(
    scored: Array | Magnitude, kept: Bool[Array, "..."], ratio: Float[Array, ""]
) -> Array | Magnitude:
    if isinstance(scored, Magnitude):
        raised = scored.x * ratio.astype(jnp.abs(scored.x).dtype)
        return Magnitude(jnp.where(kept, raised, scored.x))
    ratio = ratio.astype(scored.dtype)
    raised = jnp.where(scored > 0, scored * ratio, scored / ratio)
    return jnp.where(kept, raised, scored)


def _crossed(
    weights: Array,
    kept: Bool[Array, "..."],
    threshold: Float[Array, ""],
    margin: Float[Array, ""],
) -> Bool[Array, "..."]:
    size = jnp.abs(weights)
    low, high = (
        (bound * threshold).astype(size.dtype) for bound in (1 - margin, 1 + margin)
    )
    return size > jnp.where(kept, low, high)
