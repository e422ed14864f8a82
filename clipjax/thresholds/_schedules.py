"""Rules whose numbers follow schedules."""

import dataclasses
from typing import Any

from jaxtyping import Array, Int

from ._history import History


def at_step(rule: Any, step: int | Int[Array, ""]) -> Any:
    """Returns a rule with its schedules replaced by their values at this step.

    Example:
        >>> from clipjax.thresholds import Relative
        >>> at_step(Relative(lambda step: step * 2.0), 3).factor
        6.0
    """
    if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
        return rule
    changes = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, History):
            changes[field.name] = at_step(value, step)
        elif callable(value) and not field.metadata.get("static"):
            changes[field.name] = value(step)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_part_at(part, step) for part in value)
    return dataclasses.replace(rule, **changes)


def _part_at(part: Any, step: int | Int[Array, ""]) -> Any:
    if dataclasses.is_dataclass(part) or not callable(part):
        return at_step(part, step)
    return part(step)
