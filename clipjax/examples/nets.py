"""What a network is to the training loop: two functions, whatever it was written in.

`linen_nets` and `nnx_nets` hold the same networks, under the same names and with the
same parameter paths, so that parameters of the one work in the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Net(NamedTuple):
    """A network as two pure functions over a nested dict of parameters.

    Args:
        init: `init(key, shape)` makes the parameters for images of `shape`.
        apply: `apply(params, images)` gives the logits, a row for each image.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def patches(images: Float[Array, "n height width c"]) -> Float[Array, "n 16 size"]:
    """Cuts each image into 4 by 4 patches, from left to right and down.

    Args:
        images: both sides a multiple of 4 pixels long.
    """
    n, height, width, channels = images.shape
    if height % 4 or width % 4:
        raise ValueError(
            f"The images have {height} by {width} pixels, but the transformer cuts them"
            " into 4 by 4 patches: choose images whose sides are multiples of 4."
        )
    grid = images.reshape(n, 4, height // 4, 4, width // 4, channels)
    return grid.swapaxes(2, 3).reshape(n, 16, -1)


def pooled(
    sides: tuple[int, int], *, layers: int, kernel: int, padding: str
) -> tuple[int, int]:
    """How many pixels are left by convolutions that are each halved by pooling.

    Args:
        sides: height and width of the images.
        layers: how many convolutions there are.
        kernel: the side of their kernels.
        padding: "SAME" or "VALID", as in flax.
    """
    lost = kernel - 1 if padding == "VALID" else 0
    height, width = sides
    for _ in range(layers):
        height, width = (height - lost) // 2, (width - lost) // 2
    if min(height, width) < 1:
        least = 1
        for _ in range(layers):
            least = 2 * least + lost
        raise ValueError(
            f"The images have {sides[0]} by {sides[1]} pixels, but this network needs"
            f" at least {least} by {least}: choose another one, or larger images."
        )
    return height, width
