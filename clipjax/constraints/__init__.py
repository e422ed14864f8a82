"""Constraints that parameters keep while they train on."""

from ._keep_zeros import keep_zeros

__all__ = [
    "keep_zeros",
]


def __dir__() -> list[str]:
    return __all__
