"""Clipping the singular values of each matrix of the update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from .. import responses, scopes
from .._core import checks as check, sharding, trees
from .._core.types import AxisName, Number, Schedule, Where
from ..responses import Response
from ._engine import Bound, anywhere, clip_by

_UNITS = scopes.Unit()


def spectral_clip(
    max_norm: Number | Schedule,
    *,
    response: Response | None = None,
    scope: scopes.Unit = _UNITS,
    where: Where | None = None,
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips every singular value of every matrix to c.

    U ← Σᵢ min(σᵢ, c)·pᵢ·qᵢᵀ, for U = Σᵢ σᵢ·pᵢ·qᵢᵀ

    Use it where few directions of a matrix dominate an update: the others stay as they
    are, where a clip by norm shrinks all alike.

    The result is the nearest matrix with a spectral norm of at most c.  A matrix within
    its bound passes bit for bit.  With `response=responses.smooth`, σ becomes
    σ/√(1 + σ²/c²), which changes every matrix a little: SPECTRA, to be used after the
    optimizer, with c times the learning rate.  Scalars and vectors pass unchanged.  So
    does a matrix with a NaN or an infinity; the step is counted.

    Computed in float32 from the eigenvalues of the smaller Gram matrix, m × m, in
    O(m²·n), right to 2·10⁻⁴·c and to the rounding of the largest value; once more for
    every factor of a hundred above 100·c.  On a mesh the Gram matrix of a split leaf is
    reduced over the devices: the only transform here that exchanges more than scalars.

    Args:
        max_norm: c ≥ 0, a number, a traced value or a schedule.
        response: the function from singular values and c to the factor of each, from
            `responses`.
        scope: which axes of a leaf are the rows of its matrix, a `scopes.Unit`; the
            others are its columns, except those that the scope calls stacked.
        where: which leaves are clipped, by path and leaf; by default all of rank 2 or
            more.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split;
            `()` if each device clips its own.

    Example:
        >>> import jax.numpy as jnp
        >>> import clipjax
        >>> tx = clipjax.spectral_clip(1.0)
        >>> updates = {"kernel": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
        >>> jnp.round(tx.update(updates, tx.init(updates))[0]["kernel"], 5)
        Array([[1. , 0. ],
               [0. , 0.5]], dtype=float32)

    Reference:
        Alexander Yukhimchuk, Mladen Kolar, Martin Takáč, Sayantan Choudhury, Gradient
        Clipping Beyond Vector Norms: A Spectral Approach for Matrix-Valued Parameters,
        2026, https://arxiv.org/abs/2605.11838; the smooth one is from Xiaowen Jiang,
        Andrei Semenov, Sebastian U. Stich, Enhancing LLM Training via Spectral
        Clipping, 2026, https://arxiv.org/abs/2603.14315
    """
    check.not_negative(max_norm=max_norm)
    check.has_method("stacked_axes", scope=scope)
    response = responses.scale if response is None else response
    check.function(response=response)
    spectral = _OfSpectrum(response, scope, where, specs, axis_name)
    return clip_by(Bound(max_norm, response=spectral), axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class _OfSpectrum:
    """The response that multiplies every singular value by what a function says."""

    response: Response
    scope: scopes.Unit
    where: Where | None
    specs: scopes.SpecRule | None
    axis_name: AxisName

    def __call__(self, norm: Array, threshold: Array) -> Array:
        """Returns one: no factor for all of a matrix."""
        del threshold
        return jnp.ones_like(norm)

    def at(self, path: str, leaves: Mapping[str, Array]) -> Callable[..., Array]:
        """Returns what becomes of the leaf at `path`, with all leaves beside it."""

        def entries(leaf, norm, bound):
            del norm
            rows = self.scope.part(path, leaves).axes or ()
            kept = self.scope.stacked_axes(path, leaf)
            rank = leaf.ndim - len(kept)
            is_matrix = rank > 1 and len(rows) < rank and leaf.size
            if not is_matrix or (self.where and not self.where(path, leaf)):
                return leaf
            sides = _sides(path, leaf, kept, rows, self.specs, self.axis_name)
            return sharding.laid_out_by_compiler(
                lambda x, limit: _clipped(x, sides, self.response, limit), leaf, bound
            )

        return entries


class _Sides(NamedTuple):
    """Which axes of a leaf are what of its matrices, and over which devices."""

    kept: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    over_rows: tuple[str, ...]
    over_columns: tuple[str, ...]
    over_all: tuple[str, ...]


def _sides(
    path: str,
    leaf: Array,
    kept: tuple[int, ...],
    rows: tuple[int, ...],
    specs: scopes.SpecRule | None,
    axis_name: AxisName,
) -> _Sides:
    columns = tuple(axis for axis in range(leaf.ndim) if axis not in (*rows, *kept))
    spec = sharding.matrix_spec(specs, axis_name, path, leaf)
    over = [sharding.split_axes(spec, axes) for axes in (rows, columns)]
    over = [sharding.axes_of(leaf, names) for names in over]
    if all(over):
        raise ValueError(
            f"The matrix at {path!r} is split along its rows over {over[0]} and along"
            f" its columns over {over[1]}, but can be clipped only where one of them is"
            " whole. Gather one with `jax.lax.all_gather`, or clip outside of"
            " `jax.shard_map`."
        )
    return _Sides(kept, rows, columns, *over, sharding.axes_of(leaf, axis_name))


def _clipped(
    leaf: Array, sides: _Sides, response: Response, bound: Float[Array, ""]
) -> Array:
    """Returns a leaf of clipped matrices."""
    order = (*sides.kept, *sides.rows, *sides.columns)
    turned = trees.wide(leaf).transpose(order)
    height = math.prod(leaf.shape[axis] for axis in sides.rows)
    matrix = turned.reshape(*turned.shape[: len(sides.kept)], height, -1)
    # Products are summed along the long side, or the one that is split.
    wide = not sides.over_rows and bool(sides.over_columns or matrix.shape[-1] > height)
    matrix = matrix if wide else matrix.swapaxes(-1, -2)
    over = _Over(sides.over_rows or sides.over_columns, sides.over_all)
    infinite = jnp.any(~jnp.isfinite(matrix), axis=(-1, -2), keepdims=True)
    known = ~over.any(infinite)
    sane = jnp.where(known, matrix, 0)
    bound = bound.astype(jnp.finfo(sane.dtype).dtype)
    lowered, values, vectors = _lowered(sane, bound, over)
    factors = response(values, bound)
    result = jnp.where(bound > 0, _times(lowered, vectors, factors, over), 0)
    above = jnp.any(factors < 1, axis=-1)[..., None, None] & known
    result = jnp.where(above, result, matrix)
    result = result if wide else result.swapaxes(-1, -2)
    back = tuple(order.index(axis) for axis in range(leaf.ndim))
    result = result.reshape(turned.shape).transpose(back)
    return result.astype(leaf.dtype)


class _Over(NamedTuple):
    """Over which devices matrices are split, and over which leaves are at all."""

    names: tuple[str, ...]
    every: tuple[str, ...]

    def sum(self, x: Array) -> Array:
        return lax.psum(x, self.names) if self.names else x

    def max(self, x: Array) -> Array:
        return lax.pmax(x, self.names) if self.names else x

    def any(self, flag: Array) -> Array:
        return self.max(flag.astype(jnp.int32)) > 0

    def anywhere(self, flag: Array) -> Array:
        """For a loop that all devices have to leave together."""
        return anywhere(flag, None, self.every)


def _lowered(matrix: Array, bound: Array, over: _Over) -> tuple[Array, Array, Array]:
    """Returns matrices whose singular values are told apart at the bound, and these.

    Squared, values below 3·10⁻⁴ of the largest are lost in its rounding.  So what is
    far above the bound comes down first, by a hundred at a time.
    """

    def is_far(carry):
        _, values, _ = carry
        # Above 100 by more than rounding, or what came down would do so again.
        return over.anywhere((bound > 0) & jnp.any(values > 110 * bound))

    def lower(carry):
        matrix, values, vectors = carry
        peak = jnp.max(values, axis=-1, keepdims=True)
        limit = jnp.maximum(100 * bound, peak / 100)
        far = values > limit
        factors = jnp.where(far, limit, 1) / jnp.where(far, values, 1)
        lower = _times(matrix, vectors, factors, over)
        matrix = jnp.where(jnp.any(far, axis=-1)[..., None, None], lower, matrix)
        return matrix, *_spectrum(matrix, over)

    return lax.while_loop(is_far, lower, (matrix, *_spectrum(matrix, over)))


def _spectrum(matrix: Array, over: _Over) -> tuple[Array, Array]:
    """Returns singular values, and the vectors on the side of the rows."""
    unit = _unit(matrix, over)
    shrunk = matrix / unit.astype(matrix.dtype)  # no square leaves the range
    gram = over.sum(_matmul(shrunk, jnp.conj(shrunk).swapaxes(-1, -2)))
    squares, vectors = jnp.linalg.eigh(gram)
    values = jnp.sqrt(jnp.maximum(squares, 0)) * unit[..., 0]
    return jnp.minimum(values, jnp.finfo(values.dtype).max), vectors


def _times(matrix: Array, vectors: Array, factors: Array, over: _Over) -> Array:
    """Multiplies singular values: U - P·(1 - r)·Pᴴ·U changes only what has r < 1."""
    unit = _unit(matrix, over).astype(matrix.dtype)
    shrunk = matrix / unit
    moved = vectors * (1 - factors).astype(vectors.dtype)[..., None, :]
    part = _matmul(jnp.conj(vectors).swapaxes(-1, -2), shrunk)
    return (shrunk - _matmul(moved, part)) * unit


def _unit(matrix: Array, over: _Over) -> Array:
    """Returns a power of two near the largest entry."""
    peak = jnp.max(jnp.abs(matrix), axis=(-1, -2), keepdims=True)
    return trees.power_of_two(over.max(peak))


def _matmul(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)
