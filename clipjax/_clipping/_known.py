"""Norms that were measured already, found again by the arrays that they are of.

Two transforms of one chain see the same arrays while they are traced: the second asks
here before it measures.  Arrays are held weakly, so that nothing outlives its trace: a
norm that is gone is measured anew.  A norm is known only where it belongs to the trace
of its arrays, since one from within a branch of `jax.lax.cond` is no use after it.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.core import Tracer
from jaxtyping import Array


class Kind(NamedTuple):
    """Which norm, of what, over which devices, and among how many."""

    norm: Callable[..., Any]
    axes: tuple[int, ...] | None  # of a single leaf; `None` for all, over all leaves
    names: tuple[Any, ...]  # mesh axes, or how a matrix is split
    beside: int  # leaves measured at once: what is tiny beside others may be lost


class _Measure(NamedTuple):
    kind: Kind
    leaves: tuple[weakref.ref, ...]
    made_of: tuple[weakref.ref, ...]
    make: Callable[..., Array]

    def is_alive(self) -> bool:
        return all(own() is not None for own in self.made_of)

    def size(self) -> Array | None:
        parts = [own() for own in self.made_of]
        return None if any(part is None for part in parts) else self.make(*parts)


_found: dict[int, list[_Measure]] = {}  # by the identity of the first leaf


def remember(
    leaves: Sequence[Array],
    kind: Kind,
    *made_of: Array,
    make: Callable[..., Array] = lambda size: size,
) -> None:
    """Lets others know the norm of some leaves, by what it is made of when asked for.

    What it is made of has to be in use elsewhere, or it is gone at once; `make` must
    hold no array.
    """
    arrays = (*leaves, *made_of)
    if not leaves or any(_trace(x) is not _trace(leaves[0]) for x in arrays):
        return
    key = id(leaves[0])
    first = weakref.ref(leaves[0], lambda _: _found.pop(key, None))
    rest = (weakref.ref(leaf) for leaf in leaves[1:])
    new = _Measure(kind, (first, *rest), tuple(map(weakref.ref, made_of)), make)
    alive = [old for old in _found.get(key, ()) if old.is_alive()]
    _found[key] = [*alive, new]


def recall(leaves: Sequence[Array], kind: Kind) -> Array | None:
    """Returns the norm of just these leaves, if it is known."""
    for measure in _beginning(leaves):
        is_same = len(measure.leaves) == len(leaves) and measure.kind == kind
        if is_same and (size := measure.size()) is not None:
            return size
    return None


def recall_parts(leaves: Sequence[Array], kind: Kind) -> list[Array]:
    """Returns norms of the parts of which these leaves consist; none if one lacks."""
    sizes, rest = [], leaves
    while rest:
        for measure in _beginning(rest):
            is_part = measure.kind._replace(axes=None) == kind
            if is_part and (size := measure.size()) is not None:
                sizes.append(size)
                rest = rest[len(measure.leaves) :]
                break
        else:
            return []
    return sizes


def _beginning(leaves: Sequence[Array]) -> list[_Measure]:
    """Returns what was measured of the first of these leaves, together or alone."""
    return [
        measure
        for measure in (_found.get(id(leaves[0]), ()) if leaves else ())
        if len(measure.leaves) <= len(leaves)
        and all(own() is x for own, x in zip(measure.leaves, leaves, strict=False))
    ]


def _trace(x: Array) -> Any:
    """Returns what an array belongs to; for a tracer that does not say, to nothing."""
    return getattr(x, "_trace", object()) if isinstance(x, Tracer) else None
