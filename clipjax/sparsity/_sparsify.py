"""Parameters that come out exactly sparse: the projection at the end of a chain."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from .. import (
    _checks as check,
    _meshes as meshes,
    _trees as trees,
    allocations,
    masks,
    norms,
    patterns,
    scores,
)
from .._types import AxisName, Number, Schedule, Where

_BITS = masks.Bits()
_NEVER = 2**31 - 1  # the age of a mask that has not been made yet


class SparsifyState(NamedTuple):
    """What `sparsify` remembers; the dicts are keyed by path."""

    step: Int[Array, ""]  # updates seen
    mask_age: Int[Array, ""]  # updates since the masks were made
    mask_bits: dict[str, Array]  # empty if `storage` is `masks.Zeros()`
    leaf_sparsity: dict[str, Float[Array, ""]]  # share of zeros in each leaf's mask
    total_sparsity: Float[Array, ""]  # and in all of them
    score_memory: dict[str, Array]  # empty if the score has none


def sparsify(
    sparsity: Number | Schedule,
    *,
    score: scores.Score | scores.Tracked = scores.magnitude,
    pattern: patterns.Pattern | patterns.PatternByPath = patterns.Unstructured(),
    allocation: allocations.Allocation = allocations.uniform,
    every: Number | Schedule = 1,
    where: Where = masks.weights,
    storage: masks.Storage = masks.Bits(),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Sets all but the parameters with the highest scores to zero, exactly.

    uᵢ ← -θᵢ where mᵢ = 0, m = pattern(score(θ, u), s(t))

    Stands last in the chain: `optax.apply_updates` then gives θ + (-θ) = 0.0, bit for
    bit, in every dtype.  Whatever follows it in the chain would move the zeros.

    A mask is made from the parameters as they are at the start of a step, and holds
    until `every` steps are over.  It is due until it is made: a step that a wrapper
    discards is made up for.  With a magnitude score a pruned entry stays pruned, unless
    the sparsity falls.  A NaN parameter ranks lowest but cannot be repaired, since
    NaN + (-NaN) is NaN.

    Under `jax.vmap` a mask is searched for in every step, since both branches of a
    condition run; use `jax.lax.map` for a population with a large `every`.

    Memory beside the parameters, and beside what the score remembers: one bit a
    parameter with `storage=masks.Bits()`, none with `masks.Zeros()`.  The two differ
    only for entries that are kept and exactly zero: without a stored mask these stay at
    zero until the next is made.  On a mesh with explicit axes, a leaf whose last axis
    is split into pieces that are no multiple of eight stores a byte an entry; with
    automatic axes, its bits are gathered.

    An update narrower than its parameter leaves in the parameter's dtype, since a
    rounded -θ would not cancel θ.  `optax.apply_if_finite` refuses such a change of
    dtype; cast the gradients before the chain.

    Args:
        sparsity: s in [0, 1], the share of zeros in all selected leaves together; a
            number, a traced value or a schedule.  At least that share is zero, unless
            the floors of the allocation ask for more entries.
        score: a function of a parameter and its update, the highest to keep; or one
            with a memory, such as `scores.Movement()`, which takes in every step but
            those with an update that is not finite.
        pattern: in what shape zeros come, from `patterns`; or a function from path and
            leaf to a pattern, whose leaves then meet the sparsity by themselves.
        allocation: how the leaves share the sparsity, from `allocations`.
        every: steps between two masks, ≥ 1, rounded down; or a schedule of them.
        where: which leaves are made sparse, by path and leaf; floating leaves of rank 2
            or more that are no bias, scale or embedding.
        storage: how a mask is kept between two steps.
        axis_name: inside `jax.shard_map`, the mesh axes over which leaves are split.

    Example:
        >>> tx = optax.chain(optax.sgd(0.5), sparsify(0.5))
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]])}
        >>> grads = {"kernel": jnp.ones((2, 2))}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 2.5,  0. ],
               [ 0. , -4.5]], dtype=float32)

    Reference:
        Michael Zhu, Suyog Gupta, To Prune, or Not to Prune: Exploring the Efficacy of
        Pruning for Model Compression, 2017, https://arxiv.org/abs/1710.01878
    """
    check.between(0, 1, sparsity=sparsity)
    check.at_least(1, every=every)
    check.function(allocation=allocation, where=where)
    tracked = score if isinstance(score, scores.Tracked) else None
    if tracked is None:
        check.function(score=score)
    if isinstance(pattern, type) or not callable(pattern):
        check.has_method("masks", pattern=pattern)
    check.one_of(masks.Bits, masks.Booleans, masks.Zeros, storage=storage)
    stores = not isinstance(storage, masks.Zeros)
    full = functools.partial(_full_bits, storage=storage)

    def chosen(params):
        leaves = trees.floats(params)
        return {p: x for p, x in leaves.items() if x.size and where(p, x)}

    def init(params):
        leaves = chosen(params)
        return SparsifyState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(_NEVER, jnp.int32),
            {p: full(x) for p, x in leaves.items()} if stores else {},
            {p: jnp.zeros([], jnp.float32) for p in leaves},
            jnp.zeros([], jnp.float32),
            {p: tracked.init(p, x) for p, x in leaves.items()} if tracked else {},
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check.given_params("sparsify", params)
        leaves, moves = chosen(params), trees.floats(updates)
        due = _is_due(state, every)

        moved = {p: x for p, x in leaves.items() if p in moves}
        memory = state.score_memory
        if tracked is not None:
            memory = _tracked(tracked, memory, moved, moves, axis_name)

        def search():
            kept = patterns.marks(
                _scored(score, memory, moved, moves),
                moved,
                jnp.clip(trees.value_at(sparsity, state.step), 0, 1),
                pattern=pattern,
                allocation=allocation,
                axis_name=axis_name,
            )
            new = _measured(kept, axis_name, storage)
            old = hold()
            return old[0] | new[0], old[1] | new[1], new[2]

        def hold():
            bits = state.mask_bits
            if not stores:
                bits = {p: meshes.zeros(full, x) for p, x in leaves.items()}
            return bits, state.leaf_sparsity, state.total_sparsity

        bits, shares, total = jax.lax.cond(due, search, hold) if moved else hold()

        def emit(update, param, bits, share):
            mask = _unpack(bits, param)
            if not stores:
                mask = jnp.where(due, mask, masks.nonzero(param) | (share == 0))
            return _projected(update, param, mask)

        new_state = SparsifyState(
            trees.next_step(state.step),
            jnp.where(due, 1, trees.next_step(state.mask_age)),
            bits if stores else {},
            shares,
            total,
            memory,
        )
        return trees.map_by_path(emit, updates, leaves, bits, shares), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _projected(update: Any, param: Array, mask: Bool[Array, "..."]) -> Array:
    """Returns the update that takes what is not kept to zero."""
    with jax.numpy_dtype_promotion("standard"):  # this cast is meant
        dtype = jnp.promote_types(jnp.result_type(update), jnp.result_type(param))
    return jnp.where(mask, jnp.asarray(update, dtype), -param.astype(dtype))


def _is_due(state: SparsifyState, every: Number | Schedule) -> Bool[Array, ""]:
    steps = jnp.minimum(trees.value_at(every, state.step), 2.0**30)  # fits an int32
    return (state.mask_age == _NEVER) | (state.mask_age >= steps.astype(jnp.int32))


def _tracked(
    score: scores.Tracked,
    memory: dict[str, Array],
    params: dict[str, Array],
    updates: dict[str, Array],
    axis_name: AxisName,
) -> dict[str, Array]:
    """Takes a step into the memory of a score, unless an update is not finite."""
    if not params:
        return memory
    moves = [updates[path] for path in params]
    known = jnp.isfinite(norms.inf_norm(moves, axis_name=axis_name))
    result = dict(memory)
    for path, param in params.items():
        new = score.track(memory[path], param, updates[path])
        result[path] = jnp.where(known, new, memory[path])
    return result


def _scored(
    score: scores.Score | scores.Tracked,
    memory: dict[str, Array],
    params: dict[str, Array],
    updates: dict[str, Array],
) -> dict[str, patterns.Scores]:
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


def _pack(
    mask: Bool[Array, "..."], storage: masks.Storage = _BITS
) -> Bool[Array, "..."] | UInt8[Array, "..."]:
    """Packs a mask, unless booleans are wanted or a byte would lie on two devices."""
    is_plain = isinstance(storage, masks.Booleans)
    if is_plain or not meshes.has_whole_columns(mask, masks.BITS):
        return mask
    return masks.pack(mask if mask.ndim else mask[None])


def _unpack(bits: Array, param: Array) -> Bool[Array, "..."]:
    if bits.dtype == bool:
        return bits
    columns = param.shape[-1] if param.ndim else 1
    return masks.unpack(bits, columns).reshape(param.shape)


def _full_bits(x: Array, storage: masks.Storage = _BITS) -> Array:
    return _pack(masks.full(x), storage)


def _measured(
    kept: dict[str, Array], axis_name: AxisName, storage: masks.Storage = _BITS
) -> tuple[PyTree, ...]:
    """Packs the masks, and returns the share of zeros in each and in all."""
    dropped, size = {}, {}
    for path, mask in kept.items():
        size[path] = mask.size * meshes.blocks(mask, axis_name)
        dropped[path] = size[path] - masks.count(mask, axis_name=axis_name)
    zeros = {path: number.astype(jnp.float32) for path, number in dropped.items()}
    shares = {path: zeros[path] / float(size[path]) for path in kept}
    total = jnp.sum(jnp.stack(list(zeros.values()))) / float(sum(size.values()))
    return {path: _pack(mask, storage) for path, mask in kept.items()}, shares, total
