"""Small image classifiers in Flax Linen; `nnx_nets` has the same in NNX."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from . import nets


def lenet_300_100(classes: int = 10) -> nets.Net:
    """LeNet-300-100: 266,610 parameters on images of 28 by 28."""
    return from_module(MLP((300, 100), classes))


def lenet_5(classes: int = 10) -> nets.Net:
    """LeNet-5 in Caffe's sizes: 431,080 parameters on images of 28 by 28."""
    return from_module(CNN((20, 50), 500, classes, kernel=5, padding="VALID"))


def cnn(classes: int = 10) -> nets.Net:
    """Two convolutions and a hidden layer, for images of any size from 4 by 4."""
    return from_module(CNN((32, 64), 128, classes, kernel=3, padding="SAME"))


def transformer(classes: int = 10) -> nets.Net:
    """Two blocks of attention over the image cut in 4 by 4 patches."""
    return from_module(Transformer(classes=classes))


def from_module(module: nn.Module) -> nets.Net:
    """Turns a Linen module that only has parameters into a `Net`."""

    def init(key, shape):
        return module.init(key, jnp.zeros((1, *shape), jnp.float32))["params"]

    def apply(params, images):
        return module.apply({"params": params}, images)

    return nets.Net(init, apply)


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    hidden: Sequence[int] = (300, 100)
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        """Images to logits."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, name="output")(x)


class CNN(nn.Module):
    """Convolutions, each halved by max pooling, then one hidden layer."""

    channels: Sequence[int] = (32, 64)
    hidden: int = 128
    classes: int = 10
    kernel: int = 3
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        """Images to logits."""
        kernel, padding, layers = self.kernel, self.padding, len(self.channels)
        nets.pooled(x.shape[1:3], layers=layers, kernel=kernel, padding=padding)
        conv = functools.partial(nn.Conv, conv_general_dilated=nets.convolve)
        for i, width in enumerate(self.channels):
            layer = conv(width, (kernel, kernel), padding=padding, name=f"conv_{i}")
            x = nn.relu(nets.halve(layer(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.classes, name="output")(x)


class Block(nn.Module):
    """Attention and a hidden layer, each behind a norm and beside a shortcut."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        """Tokens to tokens."""
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_0")(x))
        y = nn.Dense(2 * self.width, name="hidden")(nn.LayerNorm(name="norm_1")(x))
        return x + nn.Dense(self.width, name="output")(nn.gelu(y))


class Transformer(nn.Module):
    """A small vision transformer: 16 patches are the tokens, their mean the answer."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        """Images to logits."""
        x = nn.Dense(self.width, name="patches")(nets.patches(x))
        position = nn.Embed(x.shape[1], self.width, name="position")
        x = x + position(jnp.arange(x.shape[1]))[None]
        for i in range(self.depth):
            x = Block(self.width, self.heads, name=f"block_{i}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="output")(x)
