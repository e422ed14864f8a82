"""Norms, in float32 or wider whatever the dtype of the leaves.

| the norm of ...          | use                                                       |
| ------------------------ | --------------------------------------------------------- |
| a whole tree             | `global_norm`, `rms`, `inf_norm`                          |
| each leaf                | `leaf_norms`                                              |
| each unit of each leaf   | `unit_norms`                                              |
| each unit of one leaf    | `unit_norm`, `unit_rms`, `unit_inf_norm`                  |
| a matrix, as an operator | `spectral_norm`                                           |

Use them in place of `optax.tree.norm` where leaves are narrow: summed in bfloat16, the
norm of many leaves stands still at about 22 times that of one; in float16 it overflows
at 256.  Leaves that hold no floating-point numbers do not count.
"""

from ._norms import (
    Norm,
    global_norm,
    inf_norm,
    leaf_norms,
    rms,
    spectral_norm,
    unit_inf_norm,
    unit_norm,
    unit_norms,
    unit_rms,
)

__all__ = [
    "Norm",
    "global_norm",
    "inf_norm",
    "leaf_norms",
    "rms",
    "spectral_norm",
    "unit_inf_norm",
    "unit_norm",
    "unit_norms",
    "unit_rms",
]


def __dir__() -> list[str]:
    return __all__
