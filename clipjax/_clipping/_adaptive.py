"""Clipping against the parameters and the recent past: no threshold to tune."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .. import norms, responses, scopes
from .._core import checks as check, sharding, trees
from .._core.types import Axes, AxisName, Number, Schedule
from ..thresholds import WindowedQuantile, Winsorized
from . import _measure as parts_of, _state as states
from ._state import ClipState

_LEAST_PARAM_NORM = 1e-3  # as in adaptive gradient clipping
_LEAST_SHARE = 0.1  # of the parameters' root mean square; see the docstring


class AdaptiveClipState(NamedTuple):
    """What `adaptive_clip` remembers."""

    clip: ClipState
    norm_history: Float[Array, " window"]  # newest first, -1 where there is none yet


class _Units(NamedTuple):
    """An update, unit by unit."""

    norm: Float[Array, ""]  # of the whole update as it came
    clipped_norm: Float[Array, ""]  # and with every unit within its bound
    sizes: dict[str, Array]  # of the units then, by pool
    factors: dict[str, Array]  # that bring each unit there, by path
    clipped: Bool[Array, ""]  # whether any was above
    param_norm: Float[Array, ""]  # infinity if there are no parameters to go by
    parts: dict[str, scopes.Part]
    names: parts_of.Names


def adaptive_clip(
    *,
    quantile: Number | Schedule = 0.9,
    factor: Number | Schedule = 1.05,
    growth: Number | Schedule = 3.0,
    start: Number | Schedule = 0.01,
    ratio: Number | Schedule = 0.02,
    window: int = 64,
    stacked: Axes | Callable[[str, Array], Axes] = (),
    specs: scopes.SpecRule | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips to what the parameters bear and what was usual lately; needs no argument.

    First every unit, relative to its own parameters θ, which have a scale where a
    history has none yet:

    u ← u · B / max(B, ‖u‖₂), B = λ·max(‖θ‖₂, 10⁻³, RMS·√m/10), for a unit of m entries

    and RMS the root mean square of all parameters, so that units that start at zero can
    move.  Then the global norm n of what that leaves, relative to its own past:

    u ← u · Tₜ / max(Tₜ, nₜ), Tₜ = f·Q_q(n̂ₜ₋₁, …, n̂ₜ₋w), n̂ₜ = min(nₜ, g·Tₜ)

    The threshold T stands a little above the norms that are usual, so with units within
    their bounds ordinary steps pass bit for bit, 95 of 100 of them.  A spike comes out
    at the threshold and is remembered at no more than g thresholds: it can neither lift
    the threshold nor hide the next one.  A lasting rise passes as soon as it fills a
    tenth of the window: one of 10x after some 8 steps, and 15 more for each further
    factor of ten.  Norms that never stop rising, by 2 % a step, pass at nine tenths of
    their size.

    The first step has no past.  Its threshold is T₀ = s·max(‖θ‖₂, 10⁻³), a small share
    of the parameters' own norm, and while the history is short the threshold can grow
    by f·g a step: a bad first step cannot wreck the parameters, and a scale that is
    far off costs a few steps.  Without `params` only the history is left, and the first
    step passes unchanged.

    A step with a NaN or an infinity becomes zero, is counted, and is not remembered.

    Args:
        quantile: q in [0, 1], which of the recent norms is the measure.  This and the
            next four are numbers, traced values or schedules.
        factor: f > 0, how far above it the threshold stands.
        growth: g ≥ 1, how many thresholds a norm is remembered at, at most; f·g > 1.
        start: s > 0, the first threshold relative to the parameters.
        ratio: λ > 0, the largest ratio of a unit's norm to that of its parameters;
            infinity leaves the history alone.
        window: w ≥ 2, how many norms are remembered; a static integer.
        stacked: axes along which `nn.scan` or `nnx.vmap` stacks layers, for all leaves
            or by path and leaf; never part of a unit.
        specs: inside `jax.shard_map`, how each leaf is split, by path and leaf; without
            it, every leaf that is split has to be split along the axes of a unit.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = adaptive_clip()
        >>> params = {"w": jnp.full(4, 500.0)}  # norm 1000, so T₀ is 10
        >>> state = tx.init(params)
        >>> for size in [1.0, 1.0, 1000.0]:
        ...     updates = {"w": jnp.array([size, 0.0, 0.0, 0.0])}
        ...     updates, state = tx.update(updates, state, params)
        >>> updates["w"]
        Array([1.05, 0.  , 0.  , 0.  ], dtype=float32)

    Reference:
        The bound of a unit is that of Andrew Brock, Soham De, Samuel L. Smith, Karen
        Simonyan, High-Performance Large-Scale Image Recognition Without Normalization,
        2021, https://arxiv.org/abs/2102.06171; the windowed quantile that of Prem
        Seetharaman, Gordon Wichern, Bryan Pardo, Jonathan Le Roux, AutoClip: Adaptive
        Gradient Clipping for Source Separation Networks, 2020,
        https://arxiv.org/abs/2007.14469; the bounded memory, the first threshold and
        their composition are ours.
    """
    check.between(0, 1, quantile=quantile)
    check.positive(factor=factor, start=start, ratio=ratio)
    check.at_least(1, growth=growth)
    check.rises(factor=factor, growth=growth)
    check.whole(2, window=window)
    scope = scopes.Unit(stacked=stacked)

    def init(params):
        del params
        history = WindowedQuantile(window=window).empty(jnp.zeros([], jnp.float32))
        return AdaptiveClipState(states.first(), history)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        step, history = state.clip.step, state.norm_history
        least, most = (trees.value_at(x, step) for x in (start, ratio))
        units = _units(updates, params, most, scope, specs, axis_name)
        rule = WindowedQuantile(
            trees.value_at(quantile, step),
            trees.value_at(factor, step),
            Winsorized(trees.value_at(growth, step)),
            window,
        )
        norm = units.clipped_norm
        single = trees.single(norm)
        bound = jnp.where(
            history[0] < 0,  # nothing is remembered
            least * units.param_norm,
            rule.threshold(history, single),
        )
        scale = responses.scale(norm, bound)
        known = jnp.isfinite(norm)
        longer = rule.remember(
            history, single, bound, single * scale.astype(jnp.float32)
        )
        new_state = AdaptiveClipState(
            states.after(
                state.clip,
                norm=units.norm,
                clipped_norm=norm * scale,
                threshold=bound,
                clipped=units.clipped | (scale != 1),
            ),
            jnp.where(known & (norm > 0), longer, history),
        )
        return _scaled(updates, units, scale, known), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(
    updates: PyTree, units: _Units, scale: Float[Array, ""], known: Bool[Array, ""]
) -> PyTree:
    """Returns the new updates, and lets the next transform know their norms."""

    def times(leaf, factor):
        out = trees.scale(leaf, factor * scale.astype(factor.dtype))
        return jnp.where(known, out, jnp.zeros_like(out))

    changed = trees.map_by_path(times, updates, units.factors)
    outgoing = {p: x for p, x in trees.floats(changed).items() if p in units.parts}
    sizes = {pool: (size, scale, known) for pool, size in units.sizes.items()}
    parts_of.emitted(
        outgoing, units.parts, norms.global_norm, units.names, sizes, _size_of
    )
    return changed


def _size_of(size: Array, scale: Array, known: Array) -> Array:
    return jnp.where(known, size * scale.astype(size.dtype), 0)


def _units(
    updates: PyTree,
    params: PyTree,
    ratio: Float[Array, ""],
    scope: scopes.Unit,
    specs: scopes.SpecRule | None,
    axis_name: AxisName,
) -> _Units:
    """Compares every unit with its parameters."""
    leaves = trees.floats(updates)
    if params is None:
        return _alone(updates, leaves, axis_name)
    found = trees.floats(params)
    for path, leaf in leaves.items():
        check.same_shape("adaptive_clip", path, leaf, found.get(path))
    own = {path: found[path] for path in leaves}
    parts = {path: scope.part(path, found) for path in leaves}
    l2 = norms.global_norm
    names = parts_of.names_of(leaves, parts, l2, specs, axis_name)
    over = None if specs is None else axis_name
    sizes, relative = (parts_of.measure(x, parts, l2, names) for x in (leaves, own))
    param_norm = parts_of.total(relative, l2, over)
    known = jnp.isfinite(param_norm)
    counted = parts_of.entries(leaves, parts, names)
    all_entries = sum(x.size * sharding.blocks(x, axis_name) for x in leaves.values())
    mean = param_norm / parts_of.root(all_entries, param_norm)
    factors = {}
    for path, size in sizes.items():
        root = parts_of.root(counted[path], size)
        least = jnp.maximum(_LEAST_SHARE * mean.astype(size.dtype) * root, 1e-3)
        own_norm = relative[path].astype(size.dtype)
        bound = ratio.astype(size.dtype) * jnp.maximum(own_norm, least)
        factors[path] = responses.scale(size, jnp.where(known, bound, jnp.inf))
    after = {path: sizes[path] * factors[path] for path in sizes}
    above = parts_of.anywhere([factor != 1 for factor in factors.values()], over)
    whole, clipped = (parts_of.total(x, l2, over) for x in (sizes, after))
    param_norm = jnp.where(known, param_norm, jnp.inf).astype(jnp.float32)
    least = jnp.maximum(param_norm, _LEAST_PARAM_NORM)
    return _Units(whole, clipped, after, factors, above, least, parts, names)


def _alone(updates: PyTree, leaves: dict[str, Array], axis_name: AxisName) -> _Units:
    """Measures an update without parameters: as one."""
    norm = parts_of.whole(updates, axis_name)
    part = scopes.Tree().part("", {})
    ones = {path: jnp.ones([], norm.dtype) for path in leaves}
    parts, none = dict.fromkeys(leaves, part), jnp.zeros([], bool)
    far = jnp.float32(jnp.inf)
    return _Units(norm, norm, {part.pool: norm}, ones, none, far, parts, axis_name)
