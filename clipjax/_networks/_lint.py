"""Does a projection stand where its zeros last?  Read from the state of an optimizer.

A transform is a pair of closures, but what it remembers is not: the state of a chain is
the tuple of its members' states, in their order, and that of a wrapper holds its inner.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

_HARMLESS = (optax.SnapshotState, optax.MonitorState)  # change no update
_OUTSIDE = "Put the projection after the wrapper, in a chain with it"
_BREAKS = {  # wrappers that move the parameters by more than what the projection said
    optax.contrib.ScheduleFreeState: (
        "schedule_free adds the update to other parameters than it was made for."
        f" {_OUTSIDE}, and call `finalize` on what `schedule_free_eval_params` returns."
    ),
    optax.LookaheadState: (
        "lookahead mixes the fast parameters with slow ones that are dense."
        f" {_OUTSIDE}: it then makes both sparse."
    ),
    optax.contrib.MechanicState: (
        f"mechanize rescales the sum of all updates so far. {_OUTSIDE}."
    ),
    optax.ConditionallyTransformState: (
        "conditionally_transform lets updates pass unprojected in the other steps."
        f" {_OUTSIDE}."
    ),
    optax.contrib.SAMState: (
        "sam moves the parameters off between two steps of the optimizer, so they are"
        " sparse after these only. Evaluate and save there."
    ),
}
_SPOILED = {  # what stays dense, or becomes stale, when a projection follows
    optax.contrib.ScheduleFreeState: (
        "the parameters are sparse, but those of `schedule_free_eval_params` are not."
        " Call `finalize` on them, with the parameters as `like`."
    ),
    optax.LookaheadState: (
        "the fast and the slow parameters are sparse, each with masks of its own. After"
        " training, call `finalize` on `params.slow` with `params.fast` as `like`."
    ),
    optax.ScaleByBacktrackingLinesearchState: (
        "a line search remembers the loss where it stopped, before the projection. Do"
        " not use `optax.value_and_grad_from_state` with it."
    ),
    optax.ScaleByZoomLinesearchState: (
        "a line search remembers the loss where it stopped, before the projection. Do"
        " not use `optax.value_and_grad_from_state` with it."
    ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place in an optimizer where exact zeros do not last, and what to do."""

    place: str  # in the optimizer's state
    message: str

    def __str__(self) -> str:
        """Says both."""
        return f"{self.place}: {self.message}" if self.place else self.message


def lint(tx: Any, params: PyTree = None) -> list[Finding]:
    """Reports where in an optimizer a projection's exact zeros do not last.

    | around what sets zeros, such as `sparsify`      | exact | what to do             |
    | ----------------------------------------------- | ----- | ---------------------- |
    | any optimizer of Optax before it, in a chain    | yes   |                        |
    | scale, decay, noise, clip, cast, … after it     | no    | put it last            |
    | `MultiSteps`, `apply_if_finite`, `masked`,      | yes   |                        |
    | `partition`, `inject_hyperparams`,              |       |                        |
    | `conditionally_mask` around it or before it     |       |                        |
    | `flatten`, `conditionally_transform`,           | no    | put it after them      |
    | `mechanize` around it                           |       |                        |
    | `schedule_free` around it                       | no    | put it after it        |
    | `schedule_free` before it                       | yes   | `finalize` the         |
    |                                                 |       | parameters to evaluate |
    | `lookahead` around it                           | no    | put it after it        |
    | `lookahead` before it                           | yes   | `finalize` the slow    |
    |                                                 |       | half, if one mask is   |
    |                                                 |       | wanted                 |
    | `sam` around it                                 | then  | evaluate after a sync  |
    | a line search before it                         | yes   | compute loss and       |
    |                                                 |       | gradient anew          |
    | an average, or masters outside of the optimizer | no    | `finalize` them        |
    | bfloat16 parameters of float32 masters that are | yes   |                        |
    | sparse, by rounding                             |       |                        |
    | updates narrower than the parameters, within    | raises | cast the gradients    |
    | `apply_if_finite`                               |       | before                 |

    What moves parameters without a state is seen too, as `optax.EmptyState`; the
    harmless `optax.identity` and `optax.keep_params_nonnegative` look the same and are
    reported for nothing.  Not seen: what happens outside of the optimizer, and what a
    wrapper does that this module does not know.

    Args:
        tx: a transform, or the state of one (that of an `nnx.Optimizer` too).
        params: to make the state from, where a transform depends on the names or shapes
            of the leaves; by default a kernel and a bias.

    Example:
        >>> import optax
        >>> import clipjax
        >>> clipjax.lint(optax.chain(optax.adam(1e-3), clipjax.sparsify(0.5)))
        []
        >>> for finding in clipjax.lint(
        ...     optax.chain(clipjax.sparsify(0.5), optax.scale(0.1))
        ... ):
        ...     print(finding)
        1: EmptyState follows the projection, whose zeros it may move. Put the
        projection last.
    """
    state = tx
    if callable(getattr(tx, "init", None)):
        state = jax.eval_shape(tx.init, _sample() if params is None else params)
    return list(_findings(state, ()))


def _sample() -> PyTree:
    return {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}


def _findings(node: Any, place: tuple[str, ...]) -> Iterator[Finding]:
    if _keeps_zeros(node):
        if getattr(node, "leaf_sparsity", None) == {}:
            message = (
                "sparsify chooses no leaf. Look at `where`; and keep it out of"
                " `optax.flatten`, which hides all names."
            )
            yield Finding("/".join(place), message)
        return
    if not _any(_keeps_zeros, node):
        return
    for kind, message in _BREAKS.items():
        if isinstance(node, kind):
            yield Finding("/".join(place), message)
    children = _children(node)
    if _is_chain(node):
        yield from _in_chain(children, place)
        return
    for name, child in children:
        yield from _findings(child, (*place, name))


def _in_chain(
    members: list[tuple[str, Any]], place: tuple[str, ...]
) -> Iterator[Finding]:
    """Reports what members of a chain do to the last of its projections.

    What is wrong with an earlier one, the last one mends.
    """
    last = max(i for i, (_, node) in enumerate(members) if _any(_keeps_zeros, node))
    for name, node in members[:last]:
        for kind, message in _SPOILED.items():
            if _any(functools.partial(_is, kind), node):
                yield Finding("/".join((*place, name)), message)
    name, node = members[last]
    yield from _findings(node, (*place, name))
    for name, node in members[last + 1 :]:
        if not _is_harmless(node):
            message = (
                f"{type(node).__name__} follows the projection, whose zeros it may"
                " move. Put the projection last."
            )
            yield Finding("/".join((*place, name)), message)


def _is_harmless(node: Any) -> bool:
    if _keeps_zeros(node) or isinstance(node, _HARMLESS):
        return True
    return _is_chain(node) and all(_is_harmless(child) for _, child in _children(node))


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _is_chain(node: Any) -> bool:
    """Tells whether a node is the state of `optax.chain` or `optax.named_chain`."""
    return not _is_named(node) and isinstance(node, tuple | Mapping)


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, optax.transforms.PartitionState):
        return [(str(name), child) for name, child in node.inner_states.items()]
    if _is_named(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, Mapping):
        return [(str(name), child) for name, child in node.items()]
    return [(str(i), child) for i, child in enumerate(node)]


def _keeps_zeros(node: Any) -> bool:
    """Tells whether a node is the state of what makes parameters exactly zero."""
    return getattr(node, "keeps_zeros", False) is True


def _is(kind: type, node: Any) -> bool:
    return isinstance(node, kind)


def _any(holds: Callable[[Any], bool], node: Any) -> bool:
    return any(map(holds, jax.tree.leaves(node, is_leaf=holds)))
