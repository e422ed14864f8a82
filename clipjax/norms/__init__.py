"""How large a tree is, in float32 or wider whatever the dtype of its leaves.

A sum of squares is kept in float32 across all leaves: in bfloat16 it stands still at
about 22 times one leaf's norm, and in float16 it overflows at 256.  Leaves that hold no
floating-point numbers do not count.
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
