"""Every way to train a sparse network, at four sparsities, beside the dense training.

Three networks of a size that a laptop trains: an MLP and a CNN on MNIST, a character
transformer on tiny-shakespeare.  Optimizer, steps, batches and, where a method prunes
gradually, the cubic ramp are the same for all; what is left of a method's settings is
as published, and kernels alone are made sparse.  Sparsity is a traced value, so a
method is compiled once for a network.  Layers share the zeros by magnitudes over the
root of their norm, but for methods that are published with a way of their own: global,
or, from the start, Erdős–Rényi.  Rewinding shares the same steps among four
rounds, each with a whole schedule of the rate, and so trains each for a quarter.  SNIP
and GraSP look at four batches.  Methods that take no target (penalties, gates,
soft thresholds) are not compared, nor N of M, which no choice takes to all four.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import clipjax
from clipjax import allocations, reparametrizations as forms, scores
from clipjax.examples import data, linen_nets

from . import training

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
EVERY = 50  # steps between two masks
SHARED = allocations.normalized(0.5)  # how layers share the zeros, if nothing is said

Method = Callable[[optax.GradientTransformation, jax.Array, int], object]


def methods() -> dict[str, Method]:
    """Returns what makes an optimizer sparse: `(optimizer, sparsity, steps) -> tx`."""
    return {
        "gradual magnitude": _gradual(SHARED),
        "gradual magnitude, uniform": _gradual(allocations.uniform),
        "gradual magnitude, global": _gradual(allocations.global_),
        "gradual magnitude, LAMP": _gradual(allocations.lamp()),
        "gradual saliency": _around(clipjax.sparse, score=scores.saliency),
        "gradual Fisher": _around(clipjax.sparse, score=scores.Fisher()),
        "AC/DC": lambda inner, sparsity, steps: optax.chain(
            inner,
            clipjax.sparsify(
                clipjax.cyclic_schedule(sparsity, steps),
                allocation=allocations.global_,
                every=5,
            ),
        ),
        "static random": lambda inner, sparsity, steps: clipjax.static_sparse(
            inner, sparsity, key=_key()
        ),
        "SET": lambda inner, sparsity, steps: clipjax.sparse_evolutionary(
            inner, sparsity, key=_key(), every=EVERY
        ),
        "RigL": lambda inner, sparsity, steps: clipjax.rigl(
            inner, sparsity, key=_key(), total_steps=steps, every=EVERY
        ),
        "SNFS": lambda inner, sparsity, steps: clipjax.sparse_momentum(
            inner, sparsity, key=_key(), total_steps=steps, every=EVERY
        ),
        "straight-through": _latent(forms.straight_through()),
        "SR-STE": _latent(forms.sr_ste()),
        "Top-KAST": lambda inner, sparsity, steps: clipjax.latent(
            inner,
            sparsity,
            reparametrization=forms.top_kast(jnp.maximum(2 * sparsity - 1, 0)),
            allocation=SHARED,
            every=EVERY,
        ),
        "network surgery": _latent(forms.surgery()),
        "power propagation": _latent(forms.power_propagation()),
        "rewinding": _rewinding,
        "SNIP": _kept,
        "GraSP": _kept,
    }


STARTS = {"SNIP": scores.snip, "GraSP": scores.grasp}  # prune before the training
ROUNDS = {"rewinding": 4}  # of training, where there is more than one


def _kept(inner, sparsity, steps):
    del sparsity, steps  # it is pruned when the training starts
    return optax.chain(inner, clipjax.keep_zeros())


def _rewinding(inner, sparsity, steps):
    rounds = ROUNDS["rewinding"] - 1
    return clipjax.rewinding(
        inner,
        every=steps // (rounds + 1),
        rounds=rounds,
        rate=1 - (1 - sparsity) ** (1 / rounds),
        rewind_step=steps // 50,
    )


def _key():
    return jax.random.key(0)


def ramp(sparsity, steps):
    """Returns the cubic rise of the sparsity from a tenth to 65 % of the training."""
    first, last = steps // 10, steps * 65 // 100
    return optax.polynomial_schedule(
        0.0, sparsity, power=3, transition_steps=last - first, transition_begin=first
    )


def _gradual(allocation):
    return lambda inner, sparsity, steps: optax.chain(
        inner,
        clipjax.sparsify(ramp(sparsity, steps), allocation=allocation, every=EVERY),
    )


def _around(wrap, **options):
    return lambda inner, sparsity, steps: wrap(
        inner, ramp(sparsity, steps), allocation=SHARED, every=EVERY, **options
    )


def _latent(form):
    return _around(clipjax.latent, reparametrization=form)


def workloads(folder):
    """Returns the networks, their data and optimizers by name."""
    digits = functools.partial(
        training.digits_workload, data.idx_folder(folder / "mnist")
    )
    text = training.text_workload(
        folder / "tinyshakespeare" / "input.txt", training.Characters(False)
    )
    cnn = linen_nets.CNN((16, 32), 64, kernel=3, padding="SAME")
    return {
        "MLP": digits(linen_nets.MLP())(optax.adamw, 2e-3, steps=2000),
        "CNN": digits(cnn)(optax.adamw, 2e-3, steps=1000),
        "transformer": text(optax.adamw, 3e-3, steps=600),
    }


def trainer(work, method, *, start=None, rounds=1):
    """Compiles `(seed, sparsity) -> error or loss, sparsity of kernels`.

    The error on held-out images in per cent, or the loss on held-out text.
    """
    span = work.steps // rounds
    rate = optax.warmup_cosine_decay_schedule(0, work.rate, span // 50, span)

    def loss(params, batch, temperature=1.0):
        logits = work.net.apply({"params": params}, batch[0]) / temperature
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), 100 * (logits.argmax(-1) != batch[1]).mean()

    @jax.jit
    def run(seed, sparsity, data):
        tx = work.optimizer(rate)
        if method is not None:
            tx = method(tx, sparsity, work.steps)
        keys = jax.random.split(jax.random.key(seed), 1 + work.steps)
        held_out = work.batch(None, data)
        params = work.net.init(keys[0], held_out[0][:1])["params"]
        if start is not None:
            batches = jax.vmap(work.batch, (0, None))(
                jax.random.split(keys[0], 4), data
            )
            batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
            scored = start(lambda *args: loss(*args)[0], params, batch)
            params = clipjax.prune(
                params, sparsity, score=scored, allocation=allocations.global_
            )

        def step(carry, key):
            params, state = carry
            grads, _ = jax.grad(loss, has_aux=True)(params, work.batch(key, data))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys[1:])
        final, wrong = loss(trained, held_out)
        is_text = isinstance(work.net, training.Characters)
        return final if is_text else wrong, _zeros(trained)

    run = run.lower(0, jnp.float32(0), work.data).compile()
    return lambda seed, sparsity: run(seed, jnp.float32(sparsity), work.data)


def _zeros(params):
    kernels = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if clipjax.masks.weights(jax.tree_util.keystr(path, simple=True), x)
    ]
    size = sum(x.size for x in kernels)
    return sum(jnp.sum(x == 0) for x in kernels) / size


def measure(results, work, *, seeds, save):
    """Fills in what `results`, runs by method and sparsity, does not hold yet."""
    for name, method in {"dense": None, **methods()}.items():
        row = results.setdefault(name, {})
        shares = SPARSITIES if method else (0.0,)
        if all(len(row.get(str(share), [])) >= seeds for share in shares):
            continue
        run = trainer(work, method, start=STARTS.get(name), rounds=ROUNDS.get(name, 1))
        for sparsity in shares:
            runs = row.setdefault(str(sparsity), [])
            while len(runs) < seeds:
                start = time.perf_counter()
                score, zeros = map(float, run(len(runs), sparsity))
                seconds = time.perf_counter() - start
                runs.append({"score": score, "zeros": zeros, "seconds": seconds})
                save()
        print(name, row, flush=True)


def tables(results):
    """Returns a table for each network as Markdown."""
    parts = []
    for work, row in results.items():
        what = "loss" if work == "transformer" else "error, %"
        dense = _mean(row["dense"]["0.0"], "seconds")
        heads = " | ".join(f"{100 * s:g} %" for s in SPARSITIES)
        base = _mean(row["dense"]["0.0"])
        lines = [
            f"### {work}: held-out {what} (dense: {base:.2f})\n",
            f"| method | {heads} | time, of dense |",
            "| ------ |" + " ---: |" * (len(SPARSITIES) + 1),
        ]
        lines += [_line(name, row[name], dense) for name in methods() if name in row]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(name, cells, dense):
    means = [f"{_mean(cells[str(s)]):.2f}" for s in SPARSITIES if cells.get(str(s))]
    seconds = _mean([run for runs in cells.values() for run in runs], "seconds")
    return f"| {name} | {' | '.join(means)} | {seconds / dense:.2f} |"


def _mean(runs, what="score"):
    return statistics.mean(run[what] for run in runs)


def plot(results, path):
    """Draws score against sparsity, one line a method, for each network."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 8))
    looks = zip(
        plt.get_cmap("tab20").colors, 4 * ["o", "s", "^", "v", "D"], strict=True
    )
    looks = dict(zip(methods(), looks, strict=False))
    for ax, (work, row) in zip(_flat(axes), results.items(), strict=True):
        ax.axhline(
            _mean(row["dense"]["0.0"]), color="black", linewidth=1, label="dense"
        )
        for name, (color, marker) in looks.items():
            cells = row.get(name, {})
            shares = [f"{100 * float(share):g}" for share in cells]
            ax.plot(
                shares,
                list(map(_mean, cells.values())),
                color=color,
                marker=marker,
                label=name,
            )
        ax.set_title(work)
        ax.set_xlabel("zeros in the kernels, %")
        ax.set_yscale("log")
        ax.set_ylabel("held-out loss" if work == "transformer" else "held-out error, %")
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(ticker.StrMethodFormatter("{x:g}"))
    _flat(axes)[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _flat(axes):
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def main():
    """Trains what is not in the file yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    parser.add_argument("--plot", type=pathlib.Path, help="a PNG file")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="networks whose names hold this")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}

    def save():
        options.out.write_text(json.dumps(results, indent=1) + "\n")

    for name, work in workloads(options.data).items():
        if options.only in name:
            measure(results.setdefault(name, {}), work, seeds=options.seeds, save=save)
    print(tables(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
