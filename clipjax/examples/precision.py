"""What rounding, overflow and bias do to a clip, in Optax and in clipjax.

References are computed on the host in float64.  Every function returns plain numbers by
side, `optax` or `clipjax`, for the notebook to draw and the benchmark to print.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .. import (
    adaptive_grad_clip,
    carry_clipped,
    clip_by,
    clip_by_block_rms,
    clip_by_global_norm,
    normalize_by_update_norm,
    norms,
)

CLIPS = {"optax": optax.clip_by_global_norm, "clipjax": clip_by_global_norm}
STRICT = CLIPS | {"clipjax, strict": functools.partial(clip_by, strict=True)}
NORMS = {"optax": optax.tree.norm, "clipjax": norms.global_norm}
DTYPES = ("float32", "bfloat16", "float16")

Sides = dict[str, Any]


class Extreme(NamedTuple):
    """A leaf of equal entries whose norm is hard to compute.

    Args:
        entries: the number of entries.
        value: the value of each entry.
        dtype: the dtype of the entries.
    """

    entries: int
    value: float
    dtype: str

    def __str__(self) -> str:
        """The words for it."""
        return f"{self.dtype}: {self.entries:,} entries of {self.value:g}"


EXTREMES = (
    Extreme(4, 300, "float16"),
    Extreme(1_000_000, 1e-4, "float16"),
    Extreme(4, 1e20, "bfloat16"),
    Extreme(4, 1e-20, "bfloat16"),
    Extreme(4, 1e20, "float32"),
    Extreme(4, 1e-20, "float32"),
)


class Markdown(str):
    """A text that a notebook shows as Markdown."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def table(rows: Mapping[str, Mapping[str, float | str]], *, corner: str = "") -> str:
    """Returns the rows as a table in Markdown.

    Args:
        rows: from the name of each row to its cells, by column.
        corner: the header of the column of names.
    """
    columns = list(next(iter(rows.values())))
    lines = [f"| {corner} | {' | '.join(columns)} |", f"| - |{' -: |' * len(columns)}"]
    for name, row in rows.items():
        words = (x if isinstance(x, str) else f"{x:.2g}" for x in row.values())
        lines.append(f"| {name} | {' | '.join(words)} |")
    return Markdown("\n".join(lines))


def norm_errors(dtype: str, leaves: Sequence[int], *, entries: int = 16) -> Sides:
    """Returns the relative errors of the norms of trees of normal numbers.

    Args:
        dtype: the dtype of the trees.
        leaves: the number of leaves of each tree.
        entries: the number of entries of a leaf.
    """
    host = np.random.default_rng(0).standard_normal((max(leaves), entries))
    rounded = jnp.asarray(host, dtype)
    squares = np.square(np.asarray(rounded, np.float64)).sum(axis=1)
    tree = list(rounded)

    def error(norm, count):  # not compiled: that would take XLA hours
        return abs(float(norm(tree[:count])) / squares[:count].sum() ** 0.5 - 1)

    return {side: [error(norm, n) for n in leaves] for side, norm in NORMS.items()}


def clipped_shares(extreme: Extreme) -> Sides:
    """Returns the share of the norm that is left by a clip to half the norm.

    Args:
        extreme: the leaf to clip.
    """
    leaf = jnp.full(extreme.entries, extreme.value, extreme.dtype)
    norm = _exact(leaf)
    return {
        side: _exact(clipped(clip(norm / 2), leaf)) / norm
        for side, clip in CLIPS.items()
    }


def excesses(dtype: str, *, cases: int = 2000, entries: int = 64) -> Sides:
    """Returns how often the norm is above its bound of 1 after a clip, and how much.

    Args:
        dtype: the dtype of the updates.
        cases: the number of updates, which hold normal numbers and have norms from 3 to
            3,000.
        entries: the number of entries of an update.
    """
    random = np.random.default_rng(0)
    sizes = 10 ** random.uniform(0, 2, (cases, 1)) * 3 / entries**0.5
    updates = jnp.asarray(random.standard_normal((cases, entries)) * sizes, dtype)
    found = {}
    for side, clip in STRICT.items():
        out = jax.jit(jax.vmap(functools.partial(clipped, clip(1.0))))(updates)
        over = np.linalg.norm(np.asarray(out, np.float64), axis=1) - 1
        found[side] = {"share": float((over > 0).mean()), "worst": float(over.max())}
    return found


def slopes_at_zero() -> dict[str, Sides]:
    """Returns the derivatives of the sum of a clipped zero, by the name of the clip."""
    makers = {
        "clip_by_global_norm(1.0)": (optax.clip_by_global_norm, clip_by_global_norm, 1),
        "clip_by_block_rms(1.0)": (optax.clip_by_block_rms, clip_by_block_rms, 1),
        "adaptive_grad_clip(0.01)": (
            optax.adaptive_grad_clip,
            adaptive_grad_clip,
            0.01,
        ),
        "normalize_by_update_norm(1.0)": (
            optax.normalize_by_update_norm,
            normalize_by_update_norm,
            1,
        ),
    }

    def slope(make, bound):
        tx, ones = make(bound), jnp.ones((2, 2))
        whole = jax.grad(lambda u: jnp.sum(clipped(tx, u, ones)))
        return float(jax.jit(whole)(jnp.zeros((2, 2)))[0, 0])

    return {
        name: {"optax": slope(theirs, bound), "clipjax": slope(ours, bound)}
        for name, (theirs, ours, bound) in makers.items()
    }


def skewed(steps: int = 1000) -> Float[Array, " steps"]:
    """Gradients of mean 1.01: one in ten is 11, the others are -0.1.

    Args:
        steps: the number of gradients, a multiple of ten.
    """
    host = np.where(np.arange(steps) % 10, np.float32(-0.1), np.float32(11))
    return jnp.asarray(np.random.default_rng(0).permutation(host))


def mean_after(
    tx: optax.GradientTransformation, updates: Float[Array, " steps"]
) -> Float[Array, ""]:
    """Returns the mean of the updates that leave a transform.

    Args:
        tx: the transform.
        updates: the incoming updates, one for each step.
    """

    def step(state, update):
        out, state = tx.update(update, state)
        return state, jnp.asarray(out, update.dtype)

    _, outgoing = jax.lax.scan(step, tx.init(jnp.zeros([])), updates)
    return jnp.mean(outgoing)


def biases(bounds: Sequence[float], *, steps: int = 1000) -> Sides:
    """Returns the mean of clipped `skewed` gradients, for each bound.

    Args:
        bounds: the bounds on the absolute value.
        steps: the number of gradients.
    """
    grads, each = skewed(steps), jnp.asarray(bounds, jnp.float32)

    def means(make):
        return jax.jit(jax.vmap(lambda bound: mean_after(make(bound), grads)))(each)

    found = {side: means(clip) for side, clip in CLIPS.items()}
    for side, clip in CLIPS.items():
        found[f"carry_clipped({side})"] = means(
            lambda bound, clip=clip: carry_clipped(clip(bound))
        )
    found["clip of the mean"] = jnp.minimum(jnp.mean(grads), each)
    return {name: np.asarray(mean, np.float64) for name, mean in found.items()}


def clipped(tx: optax.GradientTransformation, updates: Any, params: Any = None) -> Any:
    """Returns the updates after the first step of a transform.

    Args:
        tx: the transform.
        updates: the incoming updates.
        params: the parameters, for transforms that read them.
    """
    return tx.update(updates, tx.init(updates), params)[0]


def _exact(leaf: Array) -> float:
    """Returns the norm, in float64."""
    return float(np.linalg.norm(np.asarray(leaf, np.float64)))
