"""Small image classifiers in Flax NNX; `linen_nets` has the same in Linen.

Layers are set as attributes one by one: `nnx.List` is missing from flax before 0.12.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from . import nets


def lenet_300_100(classes: int = 10) -> nets.Net:
    """LeNet-300-100: 266,610 parameters on images of 28 by 28."""
    return from_module(lambda shape, rngs: MLP(shape, classes=classes, rngs=rngs))


def lenet_5(classes: int = 10) -> nets.Net:
    """LeNet-5 in Caffe's sizes: 431,080 parameters on images of 28 by 28."""
    make = functools.partial(CNN, channels=(20, 50), hidden=500, kernel=5)
    return from_module(
        lambda shape, rngs: make(shape, classes=classes, padding="VALID", rngs=rngs)
    )


def cnn(classes: int = 10) -> nets.Net:
    """Two convolutions and a hidden layer, for images of any size from 4 by 4."""
    return from_module(lambda shape, rngs: CNN(shape, classes=classes, rngs=rngs))


def transformer(classes: int = 10) -> nets.Net:
    """Two blocks of attention over the image cut in 4 by 4 patches."""
    return from_module(
        lambda shape, rngs: Transformer(shape, classes=classes, rngs=rngs)
    )


def from_module(make: Callable[..., nnx.Module]) -> nets.Net:
    """Turns `make(shape, rngs)`, a module that only has parameters, into a `Net`."""

    def init(key, shape):
        return nnx.to_pure_dict(nnx.state(make(shape, nnx.Rngs(key)), nnx.Param))

    def apply(params, images):
        empty = nnx.eval_shape(lambda: make(images.shape[1:], nnx.Rngs(0)))
        graph, state, rest = nnx.split(empty, nnx.Param, ...)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, rest)(images)

    return nets.Net(init, apply)


class MLP(nnx.Module):
    """Dense layers with ReLU between them."""

    def __init__(self, shape, *, hidden: Sequence[int] = (300, 100), classes=10, rngs):
        """For images of `shape`."""
        widths = (math.prod(shape), *hidden)
        self.depth = len(hidden)
        for i in range(self.depth):
            layer = nnx.Linear(widths[i], widths[i + 1], rngs=rngs)
            setattr(self, f"hidden_{i}", layer)
        self.output = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x):
        """Images to logits."""
        x = x.reshape(x.shape[0], -1)
        for i in range(self.depth):
            x = nnx.relu(getattr(self, f"hidden_{i}")(x))
        return self.output(x)


class CNN(nnx.Module):
    """Convolutions, each halved by max pooling, then one hidden layer."""

    def __init__(
        self,
        shape,
        *,
        channels: Sequence[int] = (32, 64),
        hidden=128,
        classes=10,
        kernel=3,
        padding="SAME",
        rngs,
    ):
        """For images of `shape`."""
        widths, size = (shape[-1], *channels), (kernel, kernel)
        self.depth = len(channels)
        conv = functools.partial(nnx.Conv, conv_general_dilated=nets.convolve)
        for i in range(self.depth):
            layer = conv(widths[i], widths[i + 1], size, padding=padding, rngs=rngs)
            setattr(self, f"conv_{i}", layer)
        sides = nets.pooled(
            shape[:2], layers=self.depth, kernel=kernel, padding=padding
        )
        self.hidden = nnx.Linear(math.prod(sides) * widths[-1], hidden, rngs=rngs)
        self.output = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        """Images to logits."""
        for i in range(self.depth):
            x = nnx.relu(nets.halve(getattr(self, f"conv_{i}")(x)))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.output(x)


class Block(nnx.Module):
    """Attention and a hidden layer, each behind a norm and beside a shortcut."""

    def __init__(self, width, heads, *, rngs):
        """For tokens of `width` numbers."""
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm_0 = nnx.LayerNorm(width, rngs=rngs)
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 2 * width, rngs=rngs)
        self.output = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        """Tokens to tokens."""
        x = x + self.attention(self.norm_0(x))
        return x + self.output(nnx.gelu(self.hidden(self.norm_1(x))))


class Transformer(nnx.Module):
    """A small vision transformer: 16 patches are the tokens, their mean the answer."""

    def __init__(self, shape, *, width=64, depth=2, heads=4, classes=10, rngs):
        """For images of `shape`."""
        self.depth = depth
        self.patches = nnx.Linear(nets.patch_size(shape), width, rngs=rngs)
        self.position = nnx.Embed(16, width, rngs=rngs)
        for i in range(depth):
            setattr(self, f"block_{i}", Block(width, heads, rngs=rngs))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        """Images to logits."""
        x = self.patches(nets.patches(x))
        x = x + self.position(jnp.arange(16))[None]
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.output(self.norm(x).mean(axis=1))
