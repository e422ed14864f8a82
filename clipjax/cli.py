"""The command line: `python -m clipjax train`.

The words of the command line become functions here and nowhere else.  The packages of
the extra `train` are imported where they are used, so that `--help` works without them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .examples import options

if TYPE_CHECKING:
    from .examples import job

_EXTRA = {"flax", "matplotlib", "safetensors", "sklearn", "tqdm"}
_WRONG, _INTERRUPTED = 2, 130  # as argparse and shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 is success, 2 a wrong option or data file (told in one line), 130 Ctrl-C.

    Args:
        argv: the words after `python -m clipjax`; None takes them from the system.
    """
    words = options.parser().parse_args(argv)
    try:
        return _train(words)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        why = f"training needs {error.name}, which is not installed"
        return _complain(f'{why}: pip install "clipjax[train]"')
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return _INTERRUPTED


def _train(words: argparse.Namespace) -> int:
    """From the words to the files and the last line."""
    from .examples import job, outputs

    try:
        outputs.check(words.output)
        plan = _plan(words)
        inner = job.selected_sparsity(plan, words.sparsity)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    print(job.headline(plan))
    begin = time.perf_counter()
    with _interruptible() as asked:
        sparse = job.follow(plan, sparsity=inner, stop=asked)
        about = _about(words) | {"data": plan.dataset.name}
        outputs.save(sparse, folder=words.output, about=about)
        dense = None
        if words.sparsity and words.compare and not asked():
            dense = job.follow(plan, sparsity=0.0, stop=asked)
        seconds = time.perf_counter() - begin
        print(job.summary(plan, sparse, dense=None if asked() else dense))
        print(f"{outputs.listing(words.output)}; training took {seconds:.0f} s")
        if asked():
            print("Ended early by Ctrl-C.", file=sys.stderr)
        return _INTERRUPTED if asked() else 0


def _plan(words: argparse.Namespace) -> "job.Plan":
    """The words as functions and numbers."""
    from .examples import data, job

    dataset = data.idx_folder(words.data) if words.data else data.digits()
    count = len(dataset.train.labels)
    if words.batch_size > count:
        raise ValueError(f"--batch-size must be at most {count}, the training images.")
    return job.Plan(
        net=_networks(words.framework)[words.model](dataset.classes),
        dataset=dataset,
        clip=_clips(words.clip),
        optimizer=_optimizers()[words.optimizer],
        learning_rate=words.learning_rate or options.RATES[words.optimizer],
        epochs=words.epochs or (10 if count > 10_000 else 60),
        batch_size=words.batch_size,
        shift=words.shift,
        seed=words.seed,
    )


def _networks(framework: str) -> dict[str, Callable]:
    from .examples import linen_nets, nnx_nets

    kit = linen_nets if framework == "linen" else nnx_nets
    functions = [kit.cnn, kit.lenet_300_100, kit.lenet_5, kit.transformer]
    return dict(zip(options.MODELS, functions, strict=True))


def _optimizers() -> dict[str, Callable]:
    import optax

    sgd = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
    return {"adam": optax.adam, "adamw": optax.adamw, "lion": optax.lion, "sgd": sgd}


def _clips(clip: str | float):
    import optax

    from . import adaptive_clip, clip_by_global_norm

    if clip == "adaptive":
        return adaptive_clip()
    return optax.identity() if clip == "none" else clip_by_global_norm(float(clip))


def _about(words: argparse.Namespace) -> dict[str, str]:
    """What the header of the model file says."""
    names = ["model", "framework", "sparsity", "clip", "optimizer", "epochs", "seed"]
    return {name: str(getattr(words, name)) for name in names}


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; the second one raises.

    An exception raised by the first could be swallowed by a callback of jax, or come
    between a step and the note of it.
    """
    pressed = threading.Event()

    def press(signum, frame):
        del signum, frame
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _complain(message: str) -> int:
    print(f"clipjax: {' '.join(message.split())}", file=sys.stderr)
    return _WRONG
