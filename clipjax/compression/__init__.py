"""Sparse gradients between devices: `error_feedback` around a compressor.

`error_feedback` sends what a compressor keeps, and adds the rest to the next gradient.
Use it where the connection between devices is slow.  A compressor is a function:
`sign`, what `top_k(0.99)` or `random_k(0.99, key)` return, or your own.
"""

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
