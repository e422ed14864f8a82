"""Masks by rank: the highest scores are kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .. import allocations, norms, patterns, scores
from .._core import checks as check
from .._core.types import AxisName, Number, Schedule
from ..allocations._budget import Scores
from ..patterns._by_path import marks
from ._store import Leaves, Masks, target


class Now(NamedTuple):
    """What a rule for masks may look at, by path: only leaves that have an update."""

    params: Leaves
    updates: Leaves  # raw
    memory: Leaves
    step: Int[Array, ""]
    masks_made: Int[Array, ""] | int = 0  # where they are counted


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Keeps what has the highest scores."""

    sparsity: Number | Schedule
    score: scores.Score | scores.Tracked
    pattern: patterns.Pattern | patterns.PatternByPath
    allocation: allocations.Allocation
    axis_name: AxisName

    def __post_init__(self) -> None:
        check.between(0, 1, sparsity=self.sparsity)
        check.function(allocation=self.allocation)
        check_score(self.score)
        check.pattern(pattern=self.pattern)
        check.met_by(self.pattern, sparsity=self.sparsity)

    def init(self, params: Leaves) -> Leaves:
        """Returns what the score remembers before the first step."""
        if not isinstance(self.score, scores.Tracked):
            return {}
        return {path: self.score.init(path, x) for path, x in params.items()}

    def track(self, now: Now) -> Leaves:
        """Takes a step into the memory of the score, if its updates are finite."""
        check_memory(self.score, now.memory, now.params)
        if not isinstance(self.score, scores.Tracked):
            return now.memory
        return tracked(self.score, now.memory, now.params, now.updates, self.axis_name)

    def masks(self, now: Now, old: Masks) -> Masks:
        """Returns the masks of this step's sparsity."""
        del old
        return marks(
            scored(self.score, now.memory, now.params, now.updates),
            now.params,
            target(self.sparsity, now.step),
            pattern=self.pattern,
            allocation=self.allocation,
            axis_name=self.axis_name,
        )


def check_score(score: scores.Score | scores.Tracked) -> None:
    """Raises unless it is a function, or a value that remembers."""
    if isinstance(score, scores.Tracked):
        check.has_method("init", score=score)
    else:
        check.function(score=score)


def check_memory(
    score: scores.Score | scores.Tracked, memory: Leaves, params: Leaves
) -> None:
    """Raises where a state remembers what another score would."""
    for path, x in params.items():
        new = None
        if isinstance(score, scores.Tracked):
            new = jax.eval_shape(functools.partial(score.init, path), x)
        check.same_kind("memory of the score", path, memory.get(path), new)


def check_sees_gradients(score: scores.Score | scores.Tracked) -> None:
    """Raises where gradients would be taken for what is added to the parameters."""
    if isinstance(score, scores.Movement) and not score.gradients:
        raise ValueError(
            f"score is {score!r}, but sees gradients here, which point the other way:"
            " what moves away from zero would be pruned. Pass"
            " `scores.Movement(gradients=True)`."
        )


def tracked(
    score: scores.Tracked,
    memory: Leaves,
    params: Leaves,
    updates: Leaves,
    axis_name: AxisName,
) -> Leaves:
    """Takes a step into the memory of a score, unless an update is not finite."""
    if not params:
        return memory
    own = [updates[path] for path in params]
    known = jnp.isfinite(norms.inf_norm(own, axis_name=axis_name))
    result = dict(memory)
    for path, param in params.items():
        new = score.track(memory[path], param, updates[path])
        result[path] = jnp.where(known, new, memory[path])
    return result


def scored(
    score: scores.Score | scores.Tracked,
    memory: Leaves,
    params: Leaves,
    updates: Leaves,
) -> dict[str, Scores]:
    """Scores every parameter; magnitudes are not written to memory."""
    if score is scores.magnitude:
        return {path: scores.Magnitude(x) for path, x in params.items()}
    result = {}
    for path, param in params.items():
        if isinstance(score, scores.Tracked):
            own = score.score(memory[path], param, updates[path])
        else:
            own = score(param, updates[path])
        check.score_shape(path, own, param)
        result[path] = own
    return result
