"""Masks between two steps: which leaves have one, how it is kept, when it is due."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from .. import masks, norms
from .._core import bits as packed, checks as check, sharding, trees
from .._core.bits import Packed, mask_of
from .._core.types import AxisName, Number, Schedule, Where

NEVER = 2**31 - 1  # the age of a mask that has not been made yet
_BITS = masks.Bits()

Leaves = dict[str, Array]
Masks = Mapping[str, Bool[Array, "..."] | Packed]


class SparsifyState(NamedTuple):
    """What `sparsify` remembers; the dicts are keyed by path."""

    step: Int[Array, ""]  # updates seen
    mask_age: Int[Array, ""]  # updates since the masks were made
    mask_bits: dict[str, Array]  # empty if `storage` is `masks.Zeros()`
    leaf_sparsity: dict[str, Float[Array, ""]]  # share of zeros in each leaf's mask
    total_sparsity: Float[Array, ""]  # and in all of them
    score_memory: dict[str, Array]  # empty if the score has none

    keeps_zeros = True

    def measured(self) -> Iterator[tuple[str, Array]]:
        """Yields what `metrics` reads."""
        yield "sparsity", self.total_sparsity
        for path, share in self.leaf_sparsity.items():
            yield f"sparsity/{path}", share


@dataclasses.dataclass(frozen=True)
class Store:
    """Where there are masks, when they are made anew, and how they are kept."""

    every: Number | Schedule
    where: Where
    storage: masks.Storage
    axis_name: AxisName
    sparsity: Number | Schedule | None = None  # whose end is not waited for

    def __post_init__(self) -> None:
        check.at_least(1, every=self.every)
        check.function(where=self.where)
        check.one_of(masks.Bits, masks.Booleans, masks.Zeros, storage=self.storage)

    @property
    def stores(self) -> bool:
        """Tells whether anything is stored."""
        return not isinstance(self.storage, masks.Zeros)

    def full(self, x: Array) -> Array:
        """Returns as it is stored the mask that keeps all of a leaf."""
        return pack(masks.full(x), self.storage)

    def init(self, params: PyTree, memory: Leaves | None = None) -> SparsifyState:
        """Returns the state with full masks, which are due to be made."""
        leaves = chosen(params, self.where)
        state = SparsifyState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(NEVER, jnp.int32),
            {p: self.full(x) for p, x in leaves.items()} if self.stores else {},
            {p: jnp.zeros([], jnp.float32) for p in leaves},
            jnp.zeros([], jnp.float32),
            {} if memory is None else memory,
        )
        return as_kept(params, state)

    def leaves(self, params: PyTree, state: SparsifyState) -> Leaves:
        """Returns by path the leaves with a mask, as this state must have them."""
        leaves = trees.chosen(trees.float_arrays(params), self.where)
        check_masks(state, leaves, self.storage)
        return leaves

    def held(self, state: SparsifyState, leaves: Leaves) -> Masks:
        """Returns the masks as they are stored."""
        bits = state.mask_bits
        if self.stores:
            return {
                p: bits[p] if bits[p].dtype == bool else Packed(bits[p], x.shape)
                for p, x in leaves.items()
            }
        shares = state.leaf_sparsity
        return {p: masks.nonzero(x) | (shares[p] == 0) for p, x in leaves.items()}

    def change(
        self,
        state: SparsifyState,
        leaves: Leaves,
        due: Bool[Array, ""],
        make: Callable[[Masks, PyTree], tuple[Masks, PyTree]],
        *,
        other: PyTree = (),
        updates: Leaves | None = None,
    ) -> tuple[Callable[[], Masks], SparsifyState, PyTree, Bool[Array, ""]]:
        """Makes masks anew if they are due, and changes what else depends on them.

        Returns how to read the masks of this step, the state after it, what else there
        is, and whether masks were made.  Where updates are given, nothing changes
        unless all of them are finite; they are read only when masks are due.

        Masks are read where they are needed, since whatever enters a branch is written
        to memory: bits rather than masks.
        """

        def search():
            new, changed = make(self.held(state, leaves), other)
            bits, shares, total = measured(new, self.axis_name, self.storage)
            bits, shares = state.mask_bits | bits, state.leaf_sparsity | shares
            return bits, shares, total, changed

        def hold():
            bits = state.mask_bits
            if not self.stores:
                bits = {p: sharding.zeros(self.full, x) for p, x in leaves.items()}
            return bits, state.leaf_sparsity, state.total_sparsity, other

        def known():
            return jnp.isfinite(norms.inf_norm(updates, axis_name=self.axis_name))

        made = due if leaves else jnp.zeros([], bool)
        if updates:  # apart, so that only a number leaves the branch
            made = jax.lax.cond(due, known, lambda: jnp.zeros([], bool))
        result = jax.lax.cond(made, search, hold) if leaves else hold()
        bits, shares, total, changed = result

        def read():
            now = {p: unpack(bits[p], x) for p, x in leaves.items()}
            if self.stores:
                return now
            old = self.held(state, leaves)
            return {p: jnp.where(made, now[p], mask_of(old[p])) for p in leaves}

        after = state._replace(
            step=trees.next_step(state.step),
            mask_age=jnp.where(made, 1, trees.next_step(state.mask_age)),
            mask_bits=bits if self.stores else {},
            leaf_sparsity=shares,
            total_sparsity=total,
        )
        return read, after, changed, made


def chosen(params: PyTree, where: Where) -> Leaves:
    """Returns by path the leaves that are made sparse; some, if a user says which.

    A tree may well have none of those, such as the biases alone that are one group of
    `optax.partition`.
    """
    leaves, every = trees.chosen(params, where), trees.floats(params)
    has_matrix = any(jnp.ndim(x) > 1 for x in every.values())
    if has_matrix and not leaves and where is not masks.weights:
        raise ValueError(
            f"where chooses none of the {len(every)} leaves of params, such as"
            f" {next(iter(every))!r}: nothing would become sparse. It gets such a path"
            " and the leaf, and returns whether to choose it."
        )
    return leaves


def as_kept(params: PyTree, state: SparsifyState) -> SparsifyState:
    """Returns a new state with its dicts as they are kept between two steps."""
    keep = functools.partial(trees.remembered, params)
    return state._replace(
        mask_bits=keep(state.mask_bits),
        leaf_sparsity=keep(state.leaf_sparsity),
        score_memory=keep(state.score_memory),
    )


def check_masks(
    state: SparsifyState, leaves: Leaves, storage: masks.Storage | None
) -> None:
    """Raises where a state has other masks than it should; nothing is computed."""
    check.same_paths("mask", state.leaf_sparsity, leaves)
    stores = storage is not None and not isinstance(storage, masks.Zeros)
    for path, x in leaves.items():
        bits = state.mask_bits.get(path)
        is_bool = not (isinstance(storage, masks.Bits) and _is_whole(x))
        is_alike = bits is not None and (bits.dtype == bool) == is_bool
        if not is_alike if stores else bits is not None:
            kind = "no mask" if bits is None else f"a mask of {bits.dtype}"
            raise ValueError(
                f"state has {kind} for {path!r}, which is not how {storage!r} would"
                " keep it. Pass the `storage` that the state was made with, or make a"
                " new one by `tx.init(params)`."
            )
        if bits is not None:
            shape = x.shape if is_bool else packed.packed_shape(x.shape)
            check.same_kind("mask", path, bits, jax.ShapeDtypeStruct(shape, bits.dtype))


def check_storage(name: str, storage: masks.Storage) -> None:
    """Raises where zeros would be taken for pruned, but may be kept ones."""
    if isinstance(storage, masks.Zeros):
        raise ValueError(
            f"{name} keeps entries that may be zero for some steps, so storage must not"
            " be `Zeros()`, which takes them for pruned. Leave it at `Bits()`."
        )


def is_due(
    state: SparsifyState,
    every: Number | Schedule,
    sparsity: Number | Schedule | None = None,
) -> Bool[Array, ""]:
    """Tells whether masks are as old as they may get, or a schedule has come to rest.

    That is where it wants the same as long as masks may age, but they were made for
    another sparsity: a ramp is not left at the value of `every` steps before its end.
    """
    steps = jnp.minimum(trees.value_at(every, state.step), 2.0**30)  # fits an int32
    steps = steps.astype(jnp.int32)
    due = (state.mask_age == NEVER) | (state.mask_age >= steps)
    if callable(sparsity):
        made, now, later = (
            target(sparsity, state.step + n) for n in (-state.mask_age, 0, steps)
        )
        due |= (now == later) & (now != made)
    return due


def target(sparsity: Number | Schedule, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the sparsity of a mask: a schedule's now, or its next if it rests there.

    So a training that ends where the schedule does ends at its last value.
    """
    if not callable(sparsity):
        return jnp.clip(trees.value_at(sparsity, step), 0, 1)
    steps = step + jnp.arange(3)  # at once, or the schedule would be written thrice
    values = jax.vmap(lambda step: trees.value_at(sparsity, step))(steps)
    now, following, later = jnp.clip(values, 0, 1)
    return jnp.where(following == later, following, now)


def hidden(leaf: Any, mask: Bool[Array, "..."] | Packed) -> Array:
    """Returns a leaf with zeros for what is not kept."""
    return masks.apply(mask_of(mask), leaf)


def pack(
    mask: Bool[Array, "..."] | Packed, storage: masks.Storage = _BITS
) -> Bool[Array, "..."] | UInt8[Array, "..."]:
    """Packs a mask, unless booleans are wanted or a byte would lie on two devices."""
    if isinstance(storage, masks.Booleans):
        return mask_of(mask)
    if isinstance(mask, Packed):
        return mask.bits
    return packed.pack(mask) if _is_whole(mask) else mask


def _is_whole(x: Array) -> bool:
    return sharding.has_whole_columns(x, masks.BITS)


def unpack(bits: Array, param: Array) -> Bool[Array, "..."]:
    """Returns the mask of a parameter."""
    if bits.dtype == bool:
        return bits
    return packed.unpack(bits, param.shape)


def measured(
    kept: Masks, axis_name: AxisName, storage: masks.Storage = _BITS
) -> tuple[PyTree, ...]:
    """Packs the masks, and returns the share of zeros in each and in all."""
    shares, total = shares_of_zeros(kept, axis_name)
    return {path: pack(mask, storage) for path, mask in kept.items()}, shares, total


def shares_of_zeros(
    kept: Masks, axis_name: AxisName
) -> tuple[dict[str, Float[Array, ""]], Float[Array, ""]]:
    """Returns the share of what is not kept in each leaf and in all; there are some."""
    zeros, size = {}, {}
    for path, mask in kept.items():
        if isinstance(mask, Packed) and mask.kept is not None:
            size[path], number = math.prod(mask.shape), mask.kept
        else:
            mask = mask_of(mask)
            size[path] = mask.size * sharding.blocks(mask, axis_name)
            number = masks.count(mask, axis_name=axis_name)
        zeros[path] = (size[path] - number).astype(jnp.float32)
    shares = {path: zeros[path] / float(size[path]) for path in kept}
    return shares, jnp.sum(jnp.stack(list(zeros.values()))) / float(sum(size.values()))
