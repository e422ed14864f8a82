"""What a transform adds to a program, and how long that takes to trace and compile.

Trees of real networks, by shape alone: nothing is computed.  Every time is CPU time of
all threads, with JAX's caches cleared before; ours and the peer's take turns.  Two more
tables: calls outside of `jax.jit`, on a small tree of the same structure, and how many
functions a reader visits from the factory to the traced update.

    python -m benchmarks.compile                             # all, half an hour
    python -m benchmarks.compile --tree gpt2_small sparsify  # only these
"""

import argparse
import pathlib
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

import clipjax

from . import shapes

_OPERATION = re.compile(r" = \"?(stablehlo\.|chlo\.|func\.|call)")
_LOOP = re.compile(r"stablehlo\.while\b")
_BRANCH = re.compile(r"stablehlo\.(case|if)\b")
_COMPILED = "/jax/core/compile/backend_compile_duration"


def pairs():
    """Returns for each row our factory and the peer's."""
    ramp = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=8_000)
    key = jax.random.key(0)

    def adamw():
        return optax.adamw(3e-4)

    def agc():
        return optax.adaptive_grad_clip(0.01)

    def rigl():
        return clipjax.rigl(adamw(), 0.9, total_steps=10_000, key=key)

    def sparsify():
        return clipjax.sparsify(ramp, every=100)

    return {
        "clip_by_global_norm": (
            lambda: clipjax.clip_by_global_norm(1.0),
            lambda: optax.clip_by_global_norm(1.0),
        ),
        "clip_by_block_rms": (
            lambda: clipjax.clip_by_block_rms(1.0),
            lambda: optax.clip_by_block_rms(1.0),
        ),
        "adaptive_grad_clip": (lambda: clipjax.adaptive_grad_clip(0.01), agc),
        "adaptive_clip": (clipjax.adaptive_clip, agc),
        "sparsify": (sparsify, adamw),
        "rigl": (rigl, adamw),
        "chain": (
            lambda: optax.chain(clipjax.adaptive_clip(), adamw(), sparsify()),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), adamw()),
        ),
    }


def lowered(tx, params):
    """Returns the program of an update, before optimization."""
    state = jax.eval_shape(tx.init, params)
    return jax.jit(lambda *args: tx.update(*args)).lower(params, state, params)


def counted(program):
    """Returns how many operations, loops and branches a program has."""
    text = program.as_text()
    return tuple(len(each.findall(text)) for each in (_OPERATION, _LOOP, _BRANCH))


def program(tx, params):
    """Returns operations, loops, branches, and CPU seconds to trace and to compile."""
    jax.clear_caches()
    start = time.process_time()
    made = lowered(tx, params)
    traced = time.process_time() - start
    counts = counted(made)
    compiling = time.process_time()
    made.compile()
    return *counts, traced, time.process_time() - compiling


def programs_table(trees=(), names=(), *, rounds=3):
    """Returns the table of operations and CPU seconds as Markdown."""
    lines = [
        "| tree (leaves) | transform | operations, ratio | loops, branches |"
        " trace, CPU s, ratio | compile, CPU s, ratio |",
        "| ------------- | --------- | ----------------: | --------------: |"
        " ------------------: | --------------------: |",
    ]
    for tree in trees or shapes.TREES:
        params = shapes.arrays(shapes.TREES[tree]())
        head = f"`{tree}` ({len(jax.tree.leaves(params))})"
        for name, (ours, peer) in pairs().items():
            if not names or name in names:
                cells = _cells(ours(), peer(), params, rounds)
                lines.append(f"| {head} | `{name}` | {cells} |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


def _cells(ours, peer, params, rounds):
    runs = [(program(ours, params), program(peer, params)) for _ in range(rounds)]
    operations, loops, branches, _, _ = runs[0][0]
    cells = [f"{operations:,}, {operations / runs[0][1][0]:.2f}"]
    cells.append(f"{loops}, {branches}")
    for column in (3, 4):  # trace, compile
        seconds = statistics.median(mine[column] for mine, _ in runs)
        ratio = statistics.median(mine[column] / its[column] for mine, its in runs)
        cells.append(f"{seconds:.2f}, {ratio:.2f}")
    return " | ".join(cells)


# Outside of a trace

_compilations = []


def eager_table(names=(), *, calls=20):
    """Returns the table of calls outside of `jax.jit` as Markdown."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: event == _COMPILED and _compilations.append(event)
    )
    lines = [
        "| transform | ms a call | peer's ms | ratio | compiled by the second |",
        "| --------- | --------: | --------: | ----: | ---------------------: |",
    ]
    small = shapes.arrays(shapes.gpt2(width=32, words=64, places=32))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), small)
    for name, (ours, peer) in pairs().items():
        if not names or name in names:
            (mine, second), (its, _) = _eager(ours(), params), _eager(peer(), params)
            mine, its = mine(calls), its(calls)
            line = f"| `{name}` | {mine:.1f} | {its:.1f} | {mine / its:.2f} |"
            lines.append(f"{line} {second} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def _eager(tx, params):
    """Calls twice; returns what times more calls, and compilations of the second."""
    _, state = tx.update(params, tx.init(params), params)
    before = len(_compilations)
    jax.block_until_ready(tx.update(params, state, params))
    second = len(_compilations) - before

    def median(calls):
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            jax.block_until_ready(tx.update(params, state, params))
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    return median, second


# What a reader visits


def visited(make, params, package):
    """Returns the functions of a package that run until an update is traced."""
    root = str(pathlib.Path(package.__file__).parent)
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            found.add((code.co_filename, code.co_firstlineno, code.co_name))

    def noted(function, *arguments):
        sys.setprofile(note)
        try:
            return function(*arguments)
        finally:
            sys.setprofile(None)

    jax.clear_caches()
    tx = noted(make)
    state = jax.eval_shape(tx.init, params)
    noted(jax.eval_shape, lambda *args: tx.update(*args), params, state, params)
    return {each for each in found if not each[2].startswith("<")}  # no lambdas


def walk_table(names=()):
    """Returns the table of functions and files that a reader visits as Markdown."""
    lines = [
        "| transform | functions of clipjax | in files | of Optax | in files |",
        "| --------- | -------------------: | -------: | -------: | -------: |",
    ]
    params = shapes.arrays(shapes.gpt2(layers=2))
    for name, (ours, peer) in pairs().items():
        if not names or name in names:
            mine, its = visited(ours, params, clipjax), visited(peer, params, optax)
            files = [len({path for path, *_ in each}) for each in (mine, its)]
            counts = f"{len(mine)} | {files[0]} | {len(its)} | {files[1]}"
            lines.append(f"| `{name}` | {counts} |")
    return "\n".join(lines)


def main():
    """Prints all tables, or those rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="rows; all if none is given")
    parser.add_argument("--tree", action="append", choices=shapes.TREES, default=[])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(walk_table(args.names), flush=True)
    eager_table(args.names)
    programs_table(args.tree, args.names, rounds=args.rounds)


if __name__ == "__main__":
    main()
