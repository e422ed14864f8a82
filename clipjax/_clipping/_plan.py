"""The arguments of a clip, checked."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, PyTree

from .. import norms, responses, scopes
from .._core import checks as check, trees
from .._core.types import AxisName, Number, Schedule, Where
from ..responses import Entrywise, Policy, Response
from ..scopes import Scope
from ..thresholds import History, Relative

Threshold = Number | Schedule | Relative | History
"""A bound: a number, or a rule that finds one."""

_TREE = scopes.Tree()
_NORMS = (norms.global_norm, norms.rms, norms.inf_norm, norms.spectral_norm)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of `clip_by`, and the name that its errors give."""

    name: str
    threshold: Threshold | Mapping[str, Threshold]
    scope: Scope = _TREE
    norm: Callable[..., Any] = norms.global_norm
    response: Response | Entrywise = responses.scale
    nonfinite: Policy = responses.propagate
    ceiling: Number | Schedule | None = None
    strict: bool = False
    where: Where | None = None
    specs: scopes.SpecRule | None = None
    axis_name: AxisName = None

    def __post_init__(self):
        """Checks the arguments."""
        _check(self)

    @property
    def kind(self) -> Callable[..., Any]:
        """What is measured: a root mean square follows from the Euclidean norm."""
        return norms.global_norm if self.norm is norms.rms else self.norm

    def rule(self, key: str) -> Threshold:
        """Returns the threshold of a part."""
        if not isinstance(self.threshold, Mapping):
            return self.threshold
        if key not in self.threshold:
            raise ValueError(
                f"threshold names {sorted(self.threshold)}, but there is a part"
                f" {key!r}. Add one for it, or leave its leaves out with `where`."
            )
        return self.threshold[key]

    def rules(self) -> list[Threshold]:
        """Returns all thresholds."""
        whole = self.threshold
        return list(whole.values()) if isinstance(whole, Mapping) else [whole]

    def chosen(self, tree: PyTree) -> dict[str, Array]:
        """Returns the leaves that are clipped, by path."""
        leaves = trees.floats(tree).items()
        return {p: x for p, x in leaves if self.where is None or self.where(p, x)}


def _check(plan: Plan) -> None:
    for rule in plan.rules():
        if isinstance(rule, type):
            raise TypeError(
                f"threshold must be a value, but is the class {rule.__name__}. Call it."
            )
        if not isinstance(rule, Relative | History):
            check.not_negative(threshold=rule)
    check.has_method("part", scope=plan.scope)
    if plan.response is responses.lower_peaks and plan.norm is not norms.inf_norm:
        raise ValueError(
            "response=responses.lower_peaks goes by the largest entry and needs"
            " norm=norms.inf_norm."
        )
    check.function(norm=plan.norm, response=plan.response, nonfinite=plan.nonfinite)
    if plan.norm not in _NORMS:
        raise ValueError(
            "norm must be `norms.global_norm`, `norms.rms`, `norms.inf_norm` or"
            f" `norms.spectral_norm`, but is {plan.norm!r}."
        )
    if plan.ceiling is not None:
        check.not_negative(ceiling=plan.ceiling)
        if plan.norm is not norms.global_norm:
            raise ValueError(
                "ceiling bounds the Euclidean norm and needs norm=norms.global_norm."
                " Put `clip_by_global_norm` before instead."
            )
