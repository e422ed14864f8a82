"""Sparse gradients between devices: compressors, with error feedback."""

from ._compressors import Compressor, random_k, sign, top_k
from ._feedback import error_feedback

__all__ = [
    "Compressor",
    "error_feedback",
    "random_k",
    "sign",
    "top_k",
]


def __dir__() -> list[str]:
    return __all__
