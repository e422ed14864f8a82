"""A whole optimizer step on 12.6 and 100 million parameters: clipjax against optax.

Beside the time of a step with Adam stand, for the transform alone, the temporary
memory of the compiled program, and how often it reads the gradients: its instructions
that take one, weighed by size, without what only runs where a square overflowed.
"""

import functools
import re
import statistics

import jax
import optax

import clipjax

from . import timing

# One transformer block of width 1024: 12,596,224 parameters.
SHAPES = {
    "attention/qkv/kernel": (1024, 3072),
    "attention/qkv/bias": (3072,),
    "attention/out/kernel": (1024, 1024),
    "attention/out/bias": (1024,),
    "mlp/up/kernel": (1024, 4096),
    "mlp/up/bias": (4096,),
    "mlp/down/kernel": (4096, 1024),
    "mlp/down/bias": (1024,),
    "norm_1/scale": (1024,),
    "norm_1/bias": (1024,),
    "norm_2/scale": (1024,),
    "norm_2/bias": (1024,),
}
EVERY = 100  # steps between two masks


def tree(key, scale, blocks=1):
    """Returns a tree of normal entries."""
    keys = jax.random.split(key, blocks * len(SHAPES))
    shapes = {
        f"{i}/{name}" if blocks > 1 else name: shape
        for i in range(blocks)
        for name, shape in SHAPES.items()
    }
    return {
        name: scale * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


class Side:
    """An optimizer and its parameters, stepped in place."""

    def __init__(self, tx, steps=1, blocks=1):
        """Makes the state; `steps` are done in one call."""
        self.grads = tree(jax.random.key(1), 0.01, blocks)
        self.params = tree(jax.random.key(0), 0.02, blocks)
        self.state = tx.init(self.params)
        self.steps = steps

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = step

    def __call__(self):
        """Takes the steps."""
        for _ in range(self.steps):
            self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


def pairs():
    """Returns for each row of the table our transform, the peer's and the bound."""
    by_norm = optax.clip_by_global_norm(1.0)
    return {
        "clip": (clipjax.clip(0.01), optax.clip(0.01), 1.02),
        "clip_by_global_norm": (clipjax.clip_by_global_norm(1.0), by_norm, 1.02),
        "clip_by_block_rms": (
            clipjax.clip_by_block_rms(0.005),
            optax.clip_by_block_rms(0.005),
            1.02,
        ),
        "adaptive_grad_clip": (
            clipjax.adaptive_grad_clip(0.01),
            optax.adaptive_grad_clip(0.01),
            0.7,
        ),
        "adaptive_clip": (clipjax.adaptive_clip(), by_norm, 1.05),
    }


def sparse():
    """Returns the same for what stands behind Adam."""
    adam = optax.adam(1e-3)
    bits = clipjax.sparsify(0.9, every=EVERY)
    zeros = clipjax.sparsify(0.9, every=EVERY, storage=clipjax.masks.Zeros())
    return {
        "sparsify, bits": (optax.chain(adam, bits), adam, 1.05),
        "sparsify, nothing stored": (optax.chain(adam, zeros), adam, 1.05),
    }


def program(tx, blocks=1):
    """Returns the temporary memory in bytes and the reads of the gradients."""
    params = tree(jax.random.key(0), 0.02, blocks)
    grads = tree(jax.random.key(1), 0.01, blocks)
    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    entry = compiled.as_text().split("ENTRY", 1)[1].splitlines()
    read = 0
    for i, leaf in enumerate(jax.tree.leaves(grads)):
        (name,) = [
            line.split("=")[0].split()[-1]
            for line in entry
            if f"parameter({i})" in line
        ]
        used = re.compile(rf"{re.escape(name)}[,)]")
        uses = [line for line in entry if used.search(line)]
        passes = [
            line for line in uses if not re.search(r" (tuple|conditional)\(", line)
        ]
        read += len(passes) * leaf.size
    size = sum(leaf.size for leaf in jax.tree.leaves(grads))
    return compiled.memory_analysis().temp_size_in_bytes, read / size


def table(*, rounds=25, blocks=1):
    """Returns the table as Markdown."""
    lines = [
        "| transform | ms | peer, ms | ratio | asked | Adam alone / peer |"
        " temporary bytes, peer's | reads of the gradients, peer's |",
        "| --------- | -: | -------: | ----: | ----: | ----: | ----: | ----: |",
    ]
    adam = optax.adam(1e-3)
    for name, (ours, peer, bound) in pairs().items():
        sides = {"ours": optax.chain(ours, adam), "peer": optax.chain(peer, adam)}
        sides = {side: Side(tx, 4, blocks) for side, tx in sides.items()}
        times = timing.interleaved(
            sides | {"adam": Side(adam, 4, blocks)}, rounds=rounds
        )
        middle = {side: statistics.median(t) / 4 for side, t in times.items()}
        (memory, reads), (memory_2, reads_2) = (
            program(ours, blocks),
            program(peer, blocks),
        )
        lines.append(
            f"| `{name}` | {middle['ours']:.2f} | {middle['peer']:.2f} |"
            f" {timing.ratio(times, 'ours', 'peer'):.3f} | {bound} |"
            f" {timing.ratio(times, 'adam', 'peer'):.3f} |"
            f" {memory:,}, {memory_2:,} | {reads:.2f}, {reads_2:.2f} |"
        )
        print(lines[-1], flush=True)
    if blocks == 1:
        lines += _sparse_lines()
    return "\n".join(lines)


def _sparse_lines():
    for name, (ours, peer, bound) in sparse().items():
        times = timing.interleaved(
            {"ours": Side(ours, EVERY), "peer": Side(peer, EVERY)}, rounds=9
        )
        middle = {side: statistics.median(t) / EVERY for side, t in times.items()}
        ratio = timing.ratio(times, "ours", "peer")
        line = f"| `{name}` | {middle['ours']:.2f} | {middle['peer']:.2f} |"
        line += f" {ratio:.3f} | {bound} | 1 | | |"
        print(line, flush=True)
        yield line


if __name__ == "__main__":
    table()
    table(blocks=8, rounds=7)
