"""Penalties that make parameters exactly zero, each with its proximal operator.

prox(x) = argmin_z ½·‖z - x‖² + η·penalty(z), for a step size η: what is left of `x`
after a step down the penalty that is taken exactly, not along a subgradient.  Every
penalty is a frozen value with the methods `prox` and `penalty`; `clipjax.proximal` puts
one at the end of a chain.

Operators compute in float32 or wider, keep the dtype, treat a complex entry by its
magnitude, and give 0.0, never -0.0.  NaN stays NaN.
"""

from ._concave import MCP, SCAD
from ._convex import L1, ElasticNet
from ._entries import Penalty
from ._groups import GroupLasso, SparseGroupLasso
from ._hard import L0

__all__ = [
    "L0",
    "L1",
    "MCP",
    "SCAD",
    "ElasticNet",
    "GroupLasso",
    "Penalty",
    "SparseGroupLasso",
]


def __dir__() -> list[str]:
    return __all__
