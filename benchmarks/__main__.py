"""Runs every benchmark and writes its table to `benchmarks/README.md`."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import optax

from . import selection, steps

_TEXT = """# Benchmarks

Written by `python -m benchmarks` in an environment with clipjax and Optax. The sides of
a comparison take turns in one run, and a ratio is the median of the ratios round by
round, so that what else a shared machine does falls on both. Milliseconds are medians.

{machine}

## The k-th largest magnitude of n normal numbers, k = n/10

{selection}

`largest` is the exact mask, ties resolved. `numpy.partition` runs on the host, outside
of any compiled program, and does not shard; `top_k` needs a k that is not traced, and
it and `sort` gather a sharded array.

## An optimizer step on 12.6 million parameters

`chain(clipjax.X, optax.adam)` against `chain(optax.X, optax.adam)`; `adaptive_clip`
against `optax.clip_by_global_norm`; `chain(optax.adam, sparsify(0.9, every=100))`, over
100 steps with one search for a mask, against `optax.adam`. Below 1 is faster than the
peer.

{steps}

## The precision of a clip

{precision}
"""


def main():
    """Writes the page."""
    machine = (
        f"Python {platform.python_version()}, JAX {jax.__version__}, Optax"
        f" {optax.__version__}, on a {jax.default_backend()} with {os.cpu_count()}"
        f" cores ({platform.machine()})."
    )
    text = _TEXT.format(
        machine=machine,
        selection=selection.table(),
        steps=steps.table(),
        precision=_apart("benchmarks.precision"),
    )
    pathlib.Path(__file__).with_name("README.md").write_text(text)
    print(text)


def _apart(module):
    """Runs a benchmark that needs eight devices in a process of its own."""
    command = [sys.executable, "-m", module]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
