"""Writes `benchmarks/README.md`, or only some of its sections: those that are named.

    python -m benchmarks                         # all but the trainings, half an hour
    python -m benchmarks selection sparse_steps  # these; the others stay as they are

The trainings take hours: `python -m benchmarks.training --data FOLDER --out
benchmarks/training.json` runs those of clips, `benchmarks.frontier` and
`benchmarks.methods` those of sparse networks, with the same arguments.  What these
files hold goes into the page, and `benchmarks.methods_report` draws the plot.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import optax

from . import (
    behavior,
    compile,
    frontier,
    methods_report,
    selection,
    sparse_steps,
    steps,
    training,
)

_HERE = pathlib.Path(__file__).parent
_HEAD = """# Benchmarks

Written by `python -m benchmarks` in an environment with clipjax and Optax, a section at
a time if wanted. The sides of a comparison take turns in one run, and a ratio is the
median of the ratios round by round, so that what else a shared machine does falls on
both. Milliseconds are medians. On a busy machine ratios have differed by up to 0.05
from run to run.

{machine}
"""
_SECTIONS = {
    "selection": """The k-th largest magnitude of n normal numbers, k = n/10

{selection}

`largest` is the exact mask, ties resolved. `numpy.partition` runs on the host, outside
of any compiled program, and does not shard; `top_k` needs a k that is not traced, and
it and `sort` gather a sharded array.
""",
    "steps": """An optimizer step

`chain(clipjax.X, optax.adam)` against `chain(optax.X, optax.adam)`; `adaptive_clip`
against `optax.clip_by_global_norm`; `chain(optax.adam, sparsify(0.9, every=100))`, over
100 steps with one search for a mask, against `optax.adam`. Below 1 is faster than the
peer; no ratio can be lower than that of Adam alone. Temporary memory and reads of the
gradients are those of the compiled transform without Adam; a branch that is only taken
where a square overflows is not counted.

On 12.6 million parameters:

{steps}

On 100.8 million, in eight blocks:

{large}
""",
    "compile": """The program that a transform adds

Of `update` alone, on trees of real networks, by shape: StableHLO operations, loops and
branches before optimization, CPU seconds to trace and to compile, and their ratios to
the peer's. `adaptive_grad_clip` and `adaptive_clip` stand against Optax's
`adaptive_grad_clip`, `sparsify(ramp, every=100)` and `rigl(adamw)` against AdamW, and
`chain`, which is that of the README, against Optax's clip by global norm and AdamW.

{programs}

Outside of `jax.jit`, on a small tree with GPT-2's 148 leaves:

{eager}

What a reader visits, from the factory to the traced update:

{walk}
""",
    "behavior": """What clips do to spikes, rises and falls

Simulated norms, lognormal with σ = 0.1 about 1, through each transform as it is, with
its defaults if not said otherwise (but no `max_norm`). Norms are the worst of five
runs, shares and times their mean. `adaptive_clip`, which alone reads the parameters,
has none, or some of norm 1, 100 and 10⁴, and its worst figures are shown. A level has
passed when 50 steps come out at nine tenths on average. A NaN passes through where the
policy is to propagate it, the default of all but `adaptive_clip`; the last column is
the largest change of the 100 norms after it.

{behavior}
""",
    "training": """Whole trainings

Final validation loss, mean of three seeds, against the grid of fixed thresholds of
`clip_by_global_norm`; all else by its defaults, AGC with 0.01, and `zclip` as it was,
with a ceiling of 1, which made it a clip at 1. A training that diverges counts as none
at all. `adaptive_clip(ratio=0.02)` adds a bound by the parameters and was chosen on
these workloads; its history was 1.05 of the 0.9-quantile of 64 norms. It is better than
`adaptive_clip()` on all eight, most of all where gradients are too large from the first
step on, for no fault of their own past: LeNet-5 at a rate of 0.4, the transformer with
SGD. There a threshold, or `adaptive_grad_clip`, is the right tool.

{losses}

As a ratio to the best threshold of the grid:

{ratios}

What was chosen here did not carry over. On 14 other small trainings, two seeds each,
with Adam, SGD, Lion and gradient accumulation, the final loss as a ratio to that of the
best of no clip and six thresholds, geometric means, ratios capped at 10. Healthy are
those on which no clip is within 2 % of the best; steps are those of them, at the
median. The last row was chosen on these trainings too, which flatters it:

| rule | eight healthy ones: mean, worst | steps touched | six that need a clip |
| ---- | ------------------------------: | ------------: | -------------------: |
| no clip | 1.00, 1.02 | 0 % | 3.42 |
| `clip_by_global_norm(1)` | 1.57, 15.8 | 96 % | 1.09 |
| `adaptive_clip(ratio=0.02)`, as it was | 2.59, 15.8 | 100 % | 1.97 |
| 1.05 · Q₀.₉ of 64 norms, the default before | 1.00, 1.05 | 8 % | 1.67 |
| max(2 · median, 1.05 · Q₀.₉) of 64 norms | 0.995, 1.01 | 2 % | 1.54 |
| 1.5 · median of 64 norms | 1.01, 1.03 | 10 % | 1.35 |
| 2 · median of 64 norms | 1.00, 1.01 | 3 % | 1.35 |
| max(min(1.05 · Q₀.₉₅, 2 · median), s) of 128 norms | 0.99, 1.02 | 8 % | 1.38 |
| **`adaptive_clip()`** | **0.99, 1.00** | **4 %** | **1.25** |

- A bound by the parameters is a bound on the gradient, whose scale is arbitrary: it
  strangles what starts at zero, has large targets or a small rate.
- A quantile near one follows the heavy tail of a noisy gradient; a multiple of the
  median does not, but lets a spike through at that multiple where norms scatter little.
  So the threshold goes by the spread, m·r^1.8 with r = Q₀.₉/m, and where r says that
  the tail is heavy, it falls to the median of the last 16 norms.
- Gradients that explode from the first step on (a recurrent net of rectifiers: 1.9
  times the best threshold, 32 without a clip) are held back by a first threshold of a
  hundredth of the parameters' norm, from which it has to grow. Scaling by the first
  norm instead, with no look at the parameters, helps such nets less: 3.0 to 12.8.
- Two seeds of a recurrent net or of reinforcement learning differ by a tenth in the
  last column; differences below that say nothing.
""",
    "precision": """The precision of a clip

{precision}
""",
    "sparse_steps": """A training step that is sparse

On 12.6 million parameters, over 100 steps with one search for a mask, against Adam
alone; bytes are those of the state beyond Adam's. `elementwise=True` says that each of
Adam's updates depends on its own entry alone. JaxPruner does not run on today's
JAX: its rules for the same methods are restated with `argsort`, uint8 masks and
products. Its straight-through method sorts in every step, and was not timed.

{sparse}
""",
    "frontier": """The frontier on MNIST

LeNet-300-100 and LeNet-5 in Caffe's sizes, `frontier.py`. Up to 108x networks are
pruned by magnitude along a cubic ramp; at 10x and 20x they train for half as many
epochs. LeNet-5 at 280x is pruned by Fisher information, θ²·F, at five times the
learning rate; its entries fall by the same factor in every step, to a sixtieth first,
then more slowly. Every entry that is not zero counts, biases too. What is judged is
read back from a file of so many bytes: for every such entry its value and its distance
to the last one, a byte each, deflated. Trainings shared their two cores with others,
and took up to three times as long as alone.

{table}
""",
    "methods": """Every method at four sparsities

All of the same optimizer, steps, batches and, where a method prunes gradually, cubic
ramp, `methods.py`. Errors are on 2,000 held-out images after 2,000 steps (MLP) or 1,000
(CNN) of 32 images, losses on held-out text after 600 steps: short trainings, to
compare, not records, and of one seed: small differences mean nothing. Times are of one
core while another training ran on the other, and vary by a tenth; one is missing where
something else ran on the same core.

From L1 on, methods take a strength and no target: each was trained with six to ten
strengths, and what stands here, with a tilde, is interpolated between the two nearest,
along the logarithm of the share that is left. So is N of M, with the nearest M that
divides the longest axis of a kernel. A cell is empty where no strength came near, or
where the network dies in between. Penalties on groups are not here: they leave whole
units out. Dual averaging is an optimizer by itself, of SGD's kind.

{tables}

![Scores against sparsity](methods.png)

How the layers share the sparsity matters more than most of these methods. A small
convolutional network with batch norm, images of 14×14, 95 % zeros by a cubic ramp, 600
steps of 128 images; test errors, mean of three seeds:

| allocation | MNIST | Fashion-MNIST |
| ---------- | ----: | ------------: |
| dense | 3.1 % | 13.6 % |
| `uniform` | 44.5 % | 39.9 % |
| `erdos_renyi_kernel` | 6.6 % | 17.5 % |
| **`square_root`**, the default | 5.0 % | 17.1 % |
| `global_` | 4.7 % | 16.3 % |
| `normalized(0.5)` | 4.7 % | 16.0 % |
| `lamp()` | 4.6 % | 16.2 % |

The last three compare all entries of all layers with each other: on GPT-2 small their
program is 1.9 to 3.2 times that of AdamW and takes six to seven times as long to
compile, that of the default 0.6 times and 1.4 times as long.
""",
}


def tables(name):
    """Measures what stands in a section, or reads what its trainings left."""
    match name:
        case "selection":
            return {"selection": selection.table()}
        case "steps":
            large = steps.table(blocks=8, rounds=7)
            return {"steps": steps.table(), "large": large}
        case "compile":
            walk, eager = compile.walk_table(), compile.eager_table()
            programs = compile.programs_table()
            return {"programs": programs, "eager": eager, "walk": walk}
        case "behavior":
            return {"behavior": behavior.table()}
        case "training":
            trained = _results("training.json")
            losses = training.losses_table(trained)
            return {"losses": losses, "ratios": training.ratios_table(trained)}
        case "precision":
            return {"precision": _apart("benchmarks.precision")}
        case "sparse_steps":
            return {"sparse": sparse_steps.table()}
        case "frontier":
            return {"table": frontier.table(_results("frontier.json"))}
        case "methods":
            return {"tables": methods_report.tables(_results("methods.json"))}


def main():
    """Writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*_SECTIONS, []])  # none
    wanted = parser.parse_args().sections or list(_SECTIONS)
    page = _HERE / "README.md"
    old = {part.partition("\n")[0]: part for part in page.read_text().split("\n## ")}
    machine = (
        f"Python {platform.python_version()}, JAX {jax.__version__}, Optax"
        f" {optax.__version__}, on a {jax.default_backend()} with {os.cpu_count()}"
        f" cores ({platform.machine()})."
    )
    parts = [_HEAD.format(machine=machine)]
    for name, text in _SECTIONS.items():
        part = old.get(text.partition("\n")[0])
        if name in wanted:
            part = text.format(**tables(name))
        if part is not None:
            parts.append(part.rstrip("\n") + "\n")
    page.write_text("\n## ".join(parts))
    print(page.read_text())


def _results(name):
    """Returns what the trainings left in a file, if they did."""
    path = _HERE / name
    return json.loads(path.read_text()) if path.exists() else {}


def _apart(module):
    """Runs a benchmark that needs eight devices in a process of its own."""
    command = [sys.executable, "-m", module]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
