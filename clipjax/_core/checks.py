"""What is said to a user whose argument cannot be right.

A tracer has no value yet and a schedule has one a step: neither can be checked here.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

_RESUME = (
    "Make a new state by `tx.init(params)`, or go on with the arguments that this one"
    " was made with."
)


def positive(**values: Any) -> None:
    """Raises unless every value is above zero."""
    for name, value in _concrete(values):
        if not value > 0:  # also refuses NaN
            raise ValueError(f"{name} must be positive, but is {value!r}.")


def not_negative(**values: Any) -> None:
    """Raises unless every value is zero or more."""
    for name, value in _concrete(values):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, but is {value!r}.")


def between(_low: int | float, _high: int | float, **values: Any) -> None:
    """Raises unless every value lies in [low, high]."""
    for name, value in _concrete(values, is_share=(_low, _high) == (0, 1)):
        if not _low <= value <= _high:
            raise ValueError(
                f"{name} must lie between {_low} and {_high}, but is {value!r}."
            )


def below_one(**values: Any) -> None:
    """Raises unless every value lies in [0, 1)."""
    for name, value in _concrete(values, is_share=True):
        if not 0 <= value < 1:
            raise ValueError(
                f"{name} must be at least 0 and below 1, but is {value!r}."
            )


def at_least(_low: int | float, **values: Any) -> None:
    """Raises unless every value is `_low` or more."""
    for name, value in _concrete(values):
        if not value >= _low:
            raise ValueError(f"{name} must be at least {_low}, but is {value!r}.")


def number(**values: Any) -> None:
    """Raises unless every value is one number, no schedule and not NaN."""
    for name, value in values.items():
        if callable(value):
            raise TypeError(
                f"{name} must be a number, but is the function {value!r}. No schedule"
                " can stand here: call it with a step."
            )
    for name, value in _concrete(values):
        if value != value:
            raise ValueError(f"{name} must be a number, but is {value!r}.")


def rises(**values: Any) -> None:
    """Raises unless the product of all values is above one."""
    product = 1.0
    for _, value in (known := list(_concrete(values))):
        product *= value
    if len(known) == len(values) and not product > 1:
        raise ValueError(
            f"{' times '.join(values)} must be above 1, or the threshold could only"
            f" fall, but is {product!r}. Raise one of them."
        )


def whole(_least: int, **values: Any) -> None:
    """Raises unless every value is a Python integer of at least `_least`."""
    for name, value in values.items():
        _static(name, value, "a Python integer")
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(
                f"{name} must be an integer, but is {value!r} of type"
                f" {type(value).__name__}."
            )
        if int(value) < _least:
            raise ValueError(f"{name} must be at least {_least}, but is {value!r}.")


def flag(**values: Any) -> None:
    """Raises a TypeError unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but is {value!r}.")


def function(**values: Any) -> None:
    """Raises unless every value can be called."""
    for name, value in values.items():
        _static(name, value, "a function")
        if not callable(value):
            raise TypeError(
                f"{name} must be a function, but is {value!r} of type"
                f" {type(value).__name__}. Pass the function itself."
            )


def has_method(method: str, **values: Any) -> None:
    """Raises unless every value is an object with this method."""
    for name, value in values.items():
        _static(name, value, f"a value with a method `{method}`")
        if isinstance(value, type) or not callable(getattr(value, method, None)):
            raise TypeError(
                f"{name} must be a value with a method `{method}`, but is {value!r}."
                " Pass an instance."
            )


def pattern(**values: Any) -> None:
    """Raises unless every value is a pattern, or a function that returns one."""
    for name, value in values.items():
        if isinstance(value, type) or not callable(value):
            has_method("masks", **{name: value})


def met_by(pattern: Any, **values: Any) -> None:
    """Raises unless a pattern with a sparsity of its own is asked for that, or none.

    A schedule says when it starts, and what is traced is not known.
    """
    own = getattr(pattern, "own_sparsity", None)
    for name, value in values.items():
        if own is None or not isinstance(value, int | float):
            continue
        if value != 0 and abs(value - own) > 1e-6:
            raise ValueError(
                f"{name} is {value!r}, but {pattern!r} has a sparsity of its own,"
                f" {own:.6g}. Pass that, or change the pattern."
            )


def one_of(*kinds: type, **values: Any) -> None:
    """Raises unless every value is an instance of one of these classes."""
    for name, value in values.items():
        if not isinstance(value, kinds):
            *first, last = (f"`{kind.__name__}()`" for kind in kinds)
            names = f"{', '.join(first)} or {last}" if first else last
            raise TypeError(f"{name} must be {names}, but is {value!r}.")


def given_params(transform: str, params: Any) -> None:
    """Raises where a transform that reads the parameters was not given them."""
    if params is None:
        raise ValueError(
            f"{transform} reads the parameters, but params is None. Call"
            " `tx.update(updates, state, params)`."
        )


def same_shape(transform: str, path: str, leaf: Any, param: Any) -> None:
    """Raises unless an update has a parameter, and that of its own shape."""
    if param is None:
        raise ValueError(
            f"{transform} found no parameter for the update at {path!r}. Pass the"
            " parameters that the updates belong to."
        )
    if jnp.shape(leaf) != jnp.shape(param):
        raise ValueError(
            f"{transform} needs updates shaped like the parameters, but at {path!r} the"
            f" update has shape {jnp.shape(leaf)} and the parameter"
            f" {jnp.shape(param)}."
        )


def score_shape(path: str, score: Any, param: Any) -> None:
    """Raises unless a score has the shape of its parameter."""
    if jnp.shape(score) != jnp.shape(param):
        raise ValueError(
            f"score must return an array shaped like the parameter, but at {path!r} it"
            f" returned shape {jnp.shape(score)} for {jnp.shape(param)}."
        )


def same_paths(kept: str, entries: Iterable[str], leaves: Iterable[str]) -> None:
    """Raises unless a state holds something for each of these leaves, and no other."""
    for path in leaves:
        if path not in entries:
            raise ValueError(
                f"state has no {kept} for {path!r}: it was made of other parameters or"
                f" with another `where`. {_RESUME}"
            )
    for path in entries:
        if path not in leaves:
            raise ValueError(
                f"state has a {kept} for {path!r}, which is not among the parameters,"
                f" or which `where` does not choose any more. {_RESUME}"
            )


def same_kind(kept: str, path: str, old: Any, new: Any) -> None:
    """Raises unless what a state holds has the shapes of what a new one would."""
    has, needs = (
        ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
        for tree in (old, new)
    )
    if has != needs:
        place = f" for {path!r}" if path else ""
        has = f"a {kept}{place} of shape {has}" if has else f"no {kept}{place}"
        needs = f"one of shape {needs}" if needs else "none"
        raise ValueError(
            f"state has {has}, but these arguments and parameters need {needs}."
            f" {_RESUME}"
        )


def _concrete(
    values: dict[str, Any], *, is_share: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields what has a value; a share must not have been rounded, in bfloat16 to 1."""
    for name, value in values.items():
        if is_share and getattr(value, "dtype", None) in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} must be float32, but is {value.dtype}, which rounds 0.999 to"
                f" {float(jnp.asarray(0.999, value.dtype))}. Under"
                " `optax.inject_hyperparams`, pass `hyperparam_dtype=jnp.float32`."
            )
        if isinstance(value, Tracer) or callable(value):
            continue
        is_array = hasattr(value, "item") and getattr(value, "ndim", None) == 0
        is_scalar = is_array or isinstance(value, numbers.Real)
        if isinstance(value, bool) or not is_scalar:
            raise TypeError(
                f"{name} must be a number, a scalar array or a schedule, but is"
                f" {value!r} of type {type(value).__name__}."
            )
        yield name, value if isinstance(value, numbers.Number) else value.item()


def _static(name: str, value: Any, kind: str) -> None:
    """Raises where `optax.inject_hyperparams` made an array of an argument."""
    if isinstance(value, Tracer | Array):
        raise TypeError(
            f"{name} is static and must be {kind}, but is an array or traced. Under"
            " `optax.inject_hyperparams`, name it in `static_args`."
        )
