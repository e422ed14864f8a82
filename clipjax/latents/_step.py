"""One step of an optimizer on latent weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .. import masks
from .._core import sharding, trees
from .._core.steps import as_before
from .._core.types import AxisName
from .._sparsity._store import Leaves, unpack
from ..scores import Score, Tracked
from ._masks import kept_of
from ._reparametrizations import Reparametrization, Sets


class Moved(NamedTuple):
    """What a step moves; see `LatentState`."""

    latents: Leaves
    levels: Leaves
    memory: Leaves
    inner: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """From gradients of the sparse weights to new latent weights."""

    inner: optax.GradientTransformationExtraArgs
    rule: Reparametrization
    score: Score | Tracked
    axis_name: AxisName

    def first(self, params: PyTree, leaves: Leaves) -> Moved:
        """Returns what there is before the first step."""
        curve = self.rule.curve
        levels, latents, memory = {}, {}, {}
        for path, leaf in leaves.items():
            if curve.level is not None:
                levels[path] = jnp.asarray(curve.level).astype(jnp.float32)
            start = curve.latent(_finite(trees.wide(leaf)), levels.get(path))
            latents[path] = _finite(start)
            if isinstance(self.score, Tracked):
                memory[path] = self.score.init(path, leaf)
        if curve.level is not None:
            levels = trees.remembered(params, levels)
        inner = self.inner.init(_seen(params, latents, levels))
        return Moved(latents, levels, memory, inner)

    def take(
        self,
        known: Bool[Array, ""],
        updates: PyTree,
        state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[Moved, Leaves]:
        """Takes the step, if all is known, and returns the updates of other leaves."""
        incoming = trees.floats(updates)

        def step():
            return self._taken(updates, state, params, extra_args)

        def rest():
            kinds = jax.eval_shape(step)[1]
            zeros = {
                p: jnp.zeros_like(incoming[p], dtype=kinds[p].dtype) for p in kinds
            }
            memory = state.latent_masks.score_memory
            return Moved(state.latents, state.levels, memory, state.latent_inner), zeros

        # Not `where`, which would need memory for both states.
        return lax.cond(known, step, rest)

    def _taken(
        self, updates: PyTree, state: Any, params: PyTree, extra_args: dict[str, Any]
    ) -> tuple[Moved, Leaves]:
        incoming = trees.floats(updates)
        slopes = {p: g for p, g in incoming.items() if p in state.latents}
        pulled, level_slopes = self._pulled_back(slopes, state)
        stepped: Any
        stepped, inner = self.inner.update(
            _seen(updates, pulled, level_slopes),
            state.latent_inner,
            _seen(params, state.latents, state.levels),
            **extra_args,
        )
        outgoing, level_moves = stepped if state.levels else (stepped, {})
        moves = trees.floats(outgoing)
        moved = Moved(
            {p: _moved(z, moves.get(p)) for p, z in state.latents.items()},
            {p: _moved(x, level_moves[p]) for p, x in state.levels.items()},
            self._tracked(slopes, state),
            as_before(inner, state.latent_inner),
        )
        return moved, {p: u for p, u in moves.items() if p not in slopes}

    def weights(self, moved: Any, path: str) -> Array:
        """Returns ψ(z)."""
        return self.rule.curve.weights(moved.latents[path], moved.levels.get(path))

    def _pulled_back(self, slopes: Leaves, state: Any) -> tuple[Leaves, Leaves]:
        """Returns the gradients of the latent weights and of the levels."""
        pulled = {}
        level_slopes = {p: jnp.zeros_like(level) for p, level in state.levels.items()}
        for path, slope in slopes.items():
            latent, level = state.latents[path], state.levels.get(path)
            slope = jnp.asarray(slope, latent.dtype)
            if path in state.explored_bits:
                slope = masks.apply(unpack(state.explored_bits[path], latent), slope)
            slope, of_level = self.rule.curve.pull_back(slope, latent, level)
            if self.rule.penalty is not None:
                step = state.latent_masks.step
                slope += self.rule.penalty(latent, self._sets(path, state), step)
            pulled[path] = slope
            if of_level is not None:
                total = jnp.sum(of_level).astype(jnp.float32)
                level_slopes[path] = sharding.over(
                    lax.psum, total, of_level, self.axis_name
                )
        return pulled, level_slopes

    def _sets(self, path: str, state: Any) -> Sets:
        latent = state.latents[path]
        explored = masks.full(latent)
        if path in state.explored_bits:
            explored = unpack(state.explored_bits[path], latent)
        return Sets(
            kept_of(state.latent_masks, path, self.weights(state, path)),
            explored,
            1 - state.latent_masks.leaf_sparsity[path],
        )

    def _tracked(self, slopes: Leaves, state: Any) -> Leaves:
        score, memory = self.score, state.latent_masks.score_memory
        if not isinstance(score, Tracked):
            return memory
        return memory | {
            p: score.track(memory[p], self.weights(state, p), slope)
            for p, slope in slopes.items()
        }


def _seen(tree: PyTree, latents: Leaves, levels: PyTree) -> PyTree:
    """Returns what the optimizer sees: latent weights, or a pair with the levels."""
    seen = trees.replaced(tree, latents)
    return (seen, levels) if jax.tree.leaves(levels) else seen


def _moved(old: Array, update: Array | None) -> Array:
    """Adds an update, but for entries that would not be finite."""
    if update is None:
        return old
    new = old + jnp.asarray(update, old.dtype)
    return jnp.where(jnp.isfinite(new), new, old)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
