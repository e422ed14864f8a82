"""Penalties that make parameters exactly zero, each with its proximal operator.

prox(x) = argmin_z ½·‖z - x‖² + η·penalty(z) for a step size η.  Gradient descent on a
penalty only comes near zero; its proximal operator gets there.  `clipjax.proximal`
applies one at the end of a chain.

| you want ...                                     | use                           |
| ------------------------------------------------ | ----------------------------- |
| zeros, and large entries shrunk a little         | `L1`                          |
| the same, where entries are correlated           | `ElasticNet`                  |
| zeros, and large entries left as they are        | `MCP`, `SCAD`, `L0`           |
| whole neurons, filters or input features at zero | `GroupLasso`                  |
| the same, and zeros inside the groups that stay  | `SparseGroupLasso`            |
| a penalty of your own                            | the methods of `Penalty`      |

Operators compute in float32 or wider and return the dtype of their input.  They treat a
complex entry by its magnitude, and give 0.0, never -0.0.  NaN stays NaN.
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
