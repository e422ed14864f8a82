"""A whole optimizer step on 12.6 million parameters: clipjax against optax."""

import functools
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


def tree(key, scale):
    """Returns a tree of normal entries."""
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: scale * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


class Side:
    """An optimizer and its parameters, stepped in place."""

    def __init__(self, tx, steps=1):
        """Makes the state; `steps` are done in one call."""
        self.grads = tree(jax.random.key(1), 0.01)
        self.params = tree(jax.random.key(0), 0.02)
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
    """Returns for each row of the table our transforms, the peer's and the bound."""
    adam = optax.adam(1e-3)
    before = lambda tx: optax.chain(tx, adam)  # noqa: E731 -- a table of chains
    after = lambda **options: optax.chain(  # noqa: E731
        adam, clipjax.sparsify(0.9, every=EVERY, **options)
    )
    by_norm = optax.clip_by_global_norm(1.0)
    return {
        "clip": (before(clipjax.clip(0.01)), before(optax.clip(0.01)), 1.02),
        "clip_by_global_norm": (
            before(clipjax.clip_by_global_norm(1.0)),
            before(by_norm),
            1.02,
        ),
        "clip_by_block_rms": (
            before(clipjax.clip_by_block_rms(0.005)),
            before(optax.clip_by_block_rms(0.005)),
            1.02,
        ),
        "adaptive_grad_clip": (
            before(clipjax.adaptive_grad_clip(0.01)),
            before(optax.adaptive_grad_clip(0.01)),
            0.7,
        ),
        "adaptive_clip": (before(clipjax.adaptive_clip()), before(by_norm), 1.05),
        "sparsify, bits": (after(), adam, 1.05),
        "sparsify, nothing stored": (after(storage=clipjax.masks.Zeros()), adam, 1.05),
    }


def table(*, rounds=25):
    """Returns the table as Markdown."""
    lines = [
        "| transform | ms | peer, ms | ratio | asked |",
        "| --------- | -: | -------: | ----: | ----: |",
    ]
    for name, (ours, peer, bound) in pairs().items():
        steps = EVERY if name.startswith("sparsify") else 4
        times = timing.interleaved(
            {"ours": Side(ours, steps), "peer": Side(peer, steps)},
            rounds=rounds if steps < EVERY else 7,
        )
        middle = {side: statistics.median(t) / steps for side, t in times.items()}
        lines.append(
            f"| `{name}` | {middle['ours']:.2f} | {middle['peer']:.2f} |"
            f" {timing.ratio(times, 'ours', 'peer'):.3f} | {bound} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    table()
