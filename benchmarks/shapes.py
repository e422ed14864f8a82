"""Trees of real networks by shape alone, named as Flax names them."""

import jax
import jax.numpy as jnp


def gpt2(layers=12, width=768, words=50_257, places=1024):
    """GPT-2: four matrices, and a bias for each, a block."""
    norm = {"scale": (width,), "bias": (width,)}

    def dense(inputs, outputs):
        return {"kernel": (inputs * width, outputs * width), "bias": (outputs * width,)}

    block = {"ln_1": norm, "attn_in": dense(1, 3), "attn_out": dense(1, 1)}
    block |= {"ln_2": norm, "mlp_in": dense(1, 4), "mlp_out": dense(4, 1)}
    ends = {"wte": {"embedding": (words, width)}, "wpe": {"embedding": (places, width)}}
    return ends | {f"h_{i}": block for i in range(layers)} | {"ln_f": norm}


def llama(layers=32, width=4096, hidden=11_008, words=32_000, *, scanned=False):
    """Llama: seven matrices a block; `nn.scan` stacks the blocks' leaves."""
    square, norm = {"kernel": (width, width)}, {"scale": (width,)}
    up, down = {"kernel": (width, hidden)}, {"kernel": (hidden, width)}
    attention = dict.fromkeys(("q", "k", "v", "o"), square)
    block = {"norm_1": norm, "attention": attention, "norm_2": norm}
    block |= {"mlp": {"gate": up, "up": up, "down": down}}
    ends = {"embed": {"embedding": (words, width)}, "norm": norm}
    ends |= {"head": {"kernel": (width, words)}}
    if scanned:
        stack = jax.tree.map(lambda s: (layers, *s), block, is_leaf=_is_shape)
        return ends | {"layers": stack}
    return ends | {f"layers_{i}": block for i in range(layers)}


def resnet50(stages=(3, 4, 6, 3), classes=1000):
    """ResNet-50: 53 convolutions, each with a batch norm, and a dense layer."""

    def conv(size, inputs, outputs):
        norm = {"scale": (outputs,), "bias": (outputs,)}
        return {"conv": {"kernel": (size, size, inputs, outputs)}, "norm": norm}

    tree, inputs = {"stem": conv(7, 3, 64)}, 64
    for stage, blocks in enumerate(stages):
        width = 64 * 2**stage
        for block in range(blocks):
            layers = {"1": conv(1, inputs, width), "2": conv(3, width, width)}
            layers |= {"3": conv(1, width, 4 * width)}
            if block == 0:
                layers |= {"skip": conv(1, inputs, 4 * width)}
            tree[f"stage_{stage}_{block}"] = layers
            inputs = 4 * width
    return tree | {"head": {"kernel": (inputs, classes), "bias": (classes,)}}


def vit(layers=12, width=768, heads=12, classes=1000):
    """ViT-B/16: kernels of attention have an axis of heads."""
    per_head = (heads, width // heads)
    norm = {"scale": (width,), "bias": (width,)}
    query = {"kernel": (width, *per_head), "bias": per_head}
    out = {"kernel": (*per_head, width), "bias": (width,)}
    attention = dict.fromkeys(("query", "key", "value"), query) | {"out": out}
    mlp_in = {"kernel": (width, 4 * width), "bias": (4 * width,)}
    mlp_out = {"kernel": (4 * width, width), "bias": (width,)}
    block = {"norm_1": norm, "attention": attention, "norm_2": norm}
    block |= {"mlp_in": mlp_in, "mlp_out": mlp_out}
    ends = {"cls": (1, 1, width), "position": {"embedding": (1, 197, width)}}
    ends |= {"patches": {"kernel": (16, 16, 3, width), "bias": (width,)}, "norm": norm}
    ends |= {"head": {"kernel": (width, classes), "bias": (classes,)}}
    return ends | {f"block_{i}": block for i in range(layers)}


TREES = {
    "gpt2_small": gpt2,
    "gpt2_medium": lambda: gpt2(24, 1024),
    "llama_7b": llama,
    "llama_7b_scanned": lambda: llama(scanned=True),
    "resnet50": resnet50,
    "vit_b16": vit,
}


def _is_shape(node):
    return isinstance(node, tuple)


def arrays(tree):
    """Returns a tree of float32 arrays that have a shape and no entries."""

    def array(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return jax.tree.map(array, tree, is_leaf=_is_shape)
