"""Whole trainings: `adaptive_clip()` against tuned thresholds and published methods.

Nothing is tuned but the fixed threshold.  Seeds and thresholds are traced values, so a
workload is compiled once for the whole grid, and once for each other method.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import clipjax
from clipjax import contrib
from clipjax.examples import data, linen_nets

CONTEXT = 64  # characters
GRID = {f"{bound:g}": bound for bound in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}
GRID = {"none": 1e30} | GRID
OURS = {
    "adaptive_clip": clipjax.adaptive_clip,
    "adaptive_clip(ratio=0.02)": functools.partial(clipjax.adaptive_clip, ratio=0.02),
}
PUBLISHED = {
    name: getattr(contrib, name)
    for name in (
        "autoclip",
        "zclip",
        "adagc",
        "clip_by_percentile",
        "clip_by_moving_sigma",
        "gradient_stabilizer",
        "stable_spam_clip",
        "spam_clip",
        "quantile_clip",
    )
}
PUBLISHED["adaptive_grad_clip"] = functools.partial(clipjax.adaptive_grad_clip, 0.01)


class Workload(NamedTuple):
    """A network, its data and how it is trained.

    `batch(key, data)` draws a batch from the training data, `batch(None, data)` is the
    validation data; a batch is inputs and labels.
    """

    net: nn.Module
    batch: Callable[..., tuple[jax.Array, jax.Array]]
    data: Any
    optimizer: Callable[..., optax.GradientTransformation]
    rate: float
    steps: int = 250
    spikes: float = 0.0  # share of the steps with gradients 100 times too large
    outliers: float = 0.0  # share of the batches with inputs 10 times too large


class Characters(nn.Module):
    """Predicts the next character, by attention or by a gated recurrent unit."""

    recurrent: bool
    classes: int = 65

    @nn.compact
    def __call__(self, x):
        """Characters to logits."""
        if self.recurrent:
            x = nn.RNN(nn.GRUCell(96))(nn.Embed(self.classes, 96)(x))
            return nn.Dense(self.classes)(x)
        mask = nn.make_causal_mask(x)
        x = nn.Embed(self.classes, 64)(x) + nn.Embed(CONTEXT, 64)(jnp.arange(CONTEXT))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(self.classes)(nn.LayerNorm()(x))


def workloads(folder: pathlib.Path) -> dict[str, Workload]:
    """Returns the workloads by name."""
    text = functools.partial(text_workload, folder / "tinyshakespeare" / "input.txt")
    transformer, gru = text(Characters(False)), text(Characters(True))
    digits = functools.partial(digits_workload, data.idx_folder(folder / "mnist"))
    adam, sgd = optax.adam, functools.partial(optax.sgd, momentum=0.9)
    lenet = linen_nets.CNN((20, 50), 500, kernel=5, padding="VALID")
    return {
        "transformer, Adam 3e-3": transformer(adam, 3e-3),
        "transformer, Adam 1e-2": transformer(adam, 1e-2),
        "transformer, Adam 3e-3, spikes": transformer(adam, 3e-3, spikes=0.02),
        "transformer, SGD 0.5": transformer(sgd, 0.5),
        "GRU, Adam 1e-2": gru(adam, 1e-2),
        "GRU, SGD 1": gru(sgd, 1.0),
        "LeNet-5, SGD 0.4, outliers": digits(lenet)(sgd, 0.4, outliers=0.02),
        "MLP, Adam 3e-3, 20 % wrong labels": digits(linen_nets.MLP(), wrong=0.2)(
            adam, 3e-3, steps=1000
        ),
    }


def text_workload(path, net):
    """Returns a maker of workloads on windows of a text; its last tenth validates."""
    _, text = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    text, cut = jnp.asarray(text, jnp.uint8), len(text) * 9 // 10
    places = cut + (CONTEXT + 1) * np.arange(256)
    held_out = text[places[:, None] + np.arange(CONTEXT + 1)]

    def batch(key, data):
        window = data[1]
        if key is not None:
            starts = jax.random.randint(key, (16, 1), 0, len(data[0]) - CONTEXT)
            window = data[0][starts + jnp.arange(CONTEXT + 1)]
        window = window.astype(jnp.int32)
        return window[:, :-1], window[:, 1:]

    return functools.partial(Workload, net, batch, (text[:cut], held_out))


def digits_workload(dataset, net, wrong=0.0):
    """Returns a maker of workloads on images; some labels in training are wrong."""
    train = jax.tree.map(lambda x: jnp.asarray(x[:20_000]), dataset.train)
    held_out = jax.tree.map(lambda x: jnp.asarray(x[:2_000]), dataset.validation)
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, len(train.labels), np.int32)
    flip = random.random(len(labels)) < wrong / 0.9  # one in ten hits the right label
    train = train._replace(labels=jnp.where(flip, labels, train.labels))

    def batch(key, data):
        if key is None:
            return tuple(data[1])
        rows = jax.random.randint(key, (32,), 0, len(data[0].labels))
        return data[0].images[rows], data[0].labels[rows]

    return functools.partial(Workload, net, batch, (train, held_out))


def trainer(work: Workload, make: Callable[..., optax.GradientTransformation]):
    """Returns the compiled `(seed, knob) -> untrained loss, final loss`.

    Args:
        work: what to train.
        make: makes the transform from the knob, a traced value.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0, work.rate, work.steps // 50, work.steps
    )

    def loss(params, batch):
        logits = work.net.apply({"params": params}, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    @jax.jit
    def run(seed, knob, data):
        tx = optax.chain(make(knob), work.optimizer(rate))
        keys = jax.random.split(jax.random.key(seed), 1 + work.steps)
        held_out = work.batch(None, data)
        params = work.net.init(keys[0], held_out[0][:1])["params"]

        def step(carry, key):
            params, state = carry
            pick, bad = jax.random.split(key)
            inputs, labels = work.batch(pick, data)
            chance = jax.random.uniform(bad)
            if work.outliers:
                inputs = inputs * jnp.where(chance < work.outliers, 10.0, 1.0)
            grads = jax.grad(loss)(params, (inputs, labels))
            scale = jnp.where(chance < work.spikes, 100.0, 1.0)
            grads = jax.tree.map(lambda g: g * scale, grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        (trained, _), _ = jax.lax.scan(step, start, keys[1:])
        return loss(params, held_out), loss(trained, held_out)

    return lambda seed, knob: run(seed, knob, work.data)


def score(untrained: float, final: float) -> float:
    """Returns the final loss; a diverged training counts as none at all."""
    return min(untrained, final) if math.isfinite(final) else untrained


def measure(results, work, methods, *, seeds, save):
    """Fills in what `results`, scores by method and seed, does not hold yet."""
    fixed = trainer(work, clipjax.clip_by_global_norm)
    for name in methods:
        make = (OURS | PUBLISHED).get(name)
        run = fixed if name in GRID else trainer(work, lambda _, make=make: make())
        scores = results.setdefault(name, [])
        while len(scores) < seeds:
            untrained, final = run(len(scores), GRID.get(name, 0.0))
            scores.append(score(float(untrained), float(final)))
            save()


def losses_table(results) -> str:
    """Returns the mean final validation losses as Markdown, fewer seeds in brackets."""
    names = _names(results)
    lines = ["| workload | " + " | ".join(names) + " |"]
    lines.append("| - |" + " -: |" * len(names))
    for work, row in results.items():
        seeds = max(map(len, row.values()))
        cells = []
        for name in names:
            losses = row.get(name)
            few = f" ({len(losses)})" if losses and len(losses) < seeds else ""
            cells.append(f"{statistics.mean(losses):.3f}{few}" if losses else "")
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios_table(results) -> str:
    """Returns how each method compares with the best threshold of every workload.

    Over the seeds that a method was run with.
    """
    lines = [
        "| method | worst | geometric mean | worst on |",
        "| ------ | ----: | -------------: | -------- |",
    ]
    for name in _names(results):
        ratios = {}
        for work, row in results.items():
            if seeds := len(row.get(name, [])):
                grid = [row[bound][:seeds] for bound in GRID if bound in row]
                best = min(map(statistics.mean, grid))
                ratios[work] = statistics.mean(row[name]) / best
        worst = max(ratios, key=lambda work: ratios[work])
        mean = statistics.geometric_mean(ratios.values())
        some = "" if len(ratios) == len(results) else f" ({len(ratios)} workloads)"
        lines.append(f"| {name}{some} | {ratios[worst]:.3f} | {mean:.3f} | {worst} |")
    return "\n".join(lines)


def _names(results) -> list[str]:
    """Returns all methods, ours first."""
    names = dict.fromkeys(name for row in results.values() for name in row)
    return sorted(names, key=lambda name: name not in OURS)


def main():
    """Trains what was asked for and prints both tables."""
    methods = [*GRID, *OURS, *PUBLISHED]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", help="parts of their names")
    parser.add_argument("--methods", nargs="*", choices=methods, default=methods)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file, continued")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="a folder that holds mnist/ and tinyshakespeare/input.txt",
    )
    args = parser.parse_args()
    results = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())

    def save():
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))

    for name, work in workloads(args.data).items():
        if not args.workloads or any(part in name for part in args.workloads):
            row = results.setdefault(name, {})
            measure(row, work, args.methods, seeds=args.seeds, save=save)
    print(losses_table(results), ratios_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
