"""The command line: `python -m clipjax train`.

The words of the command line become functions here and nowhere else.  The packages of
the extra `train` are imported where they are used, so that `--help` works without them.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .examples import options

if TYPE_CHECKING:
    import pathlib

    from .examples import job

_EXTRA = {"flax", "matplotlib", "safetensors", "sklearn", "tqdm"}
_FAILED, _WRONG, _INTERRUPTED = 1, 2, 130  # as argparse and shells have it
_ASCII = {"─": "-", "×": "x", "·": "-"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 is success, 1 a training that failed or could not be saved, 2 a wrong option or
    data file, 130 Ctrl-C and 143 SIGTERM; what is not success is told in one line.

    Args:
        argv: the words after `python -m clipjax`; None takes them from the system.
    """
    out: Any = _Patient(sys.stdout)
    err: Any = _Patient(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return _run(options.parser().parse_args(argv))


def _run(words: argparse.Namespace) -> int:
    """Trains, and answers in one line what goes wrong."""
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
    """From the words to a folder that can be written to, and to what is done there."""
    from .examples import job, outputs

    with contextlib.ExitStack() as stack:
        try:
            plan = _plan(words)
            inner = job.selected_sparsity(plan, words.sparsity)
            folder = words.output or options.FOLDER
            if not words.output and not words.overwrite:
                folder = outputs.next_free(folder)
            claim = outputs.claimed(
                folder, overwrite=words.overwrite, room=job.room(plan)
            )
            stack.enter_context(claim)
        except (ValueError, OSError) as error:
            return _complain(str(error))
        print(job.headline(plan))
        if not words.output and folder != options.FOLDER:
            print(f"{options.FOLDER} is there already: writing to {folder}")
        return _follow(words, plan, inner, folder)


def _follow(
    words: argparse.Namespace, plan: job.Plan, inner: float, folder: pathlib.Path
) -> int:
    """From the plan to the files and the last line."""
    from .examples import job, outputs

    about = _about(words) | {"data": plan.dataset.name}
    begin = time.perf_counter()
    with _interruptible() as signals:
        asked = functools.partial(bool, signals)
        sparse = job.follow(plan, sparsity=inner, stop=asked)
        missing = outputs.save(sparse, folder=folder, about=about)
        why = job.failure(sparse, label="the" if inner else "the dense")
        dense = None
        if words.sparsity and words.compare and not asked() and not why:
            dense = job.follow(plan, sparsity=0.0, stop=asked)
            why = job.failure(dense, label="the dense")
        dense = None if asked() else dense
        if dense:
            missing |= outputs.draw(sparse, folder=folder, about=about, dense=dense)
        seconds = time.perf_counter() - begin
        print(job.summary(plan, sparse, dense=dense))
        print(f"{outputs.listing(folder)}; training took {seconds:.0f} s")
        return _verdict(signals, [why, outputs.complaint(missing, folder=folder)])


def _verdict(signals: list[int], troubles: list[str]) -> int:
    """Says what went wrong, and returns the exit status."""
    for trouble in filter(None, troubles):
        _complain(trouble)
    if signals:
        name = "Ctrl-C" if signals[0] == signal.SIGINT else "SIGTERM"
        print(f"Ended early by {name}.", file=sys.stderr)
    if any(troubles):
        return _FAILED
    return 128 + signals[0] if signals else 0


def _plan(words: argparse.Namespace) -> "job.Plan":
    """The words as functions and numbers."""
    from .examples import data, job, train

    dataset = data.idx_folder(words.data) if words.data else data.digits()
    count = len(dataset.train.labels)
    if words.batch_size > count:
        raise ValueError(f"--batch-size must be at most {count}, the training images.")
    epochs = words.epochs or (10 if count > 10_000 else 60)
    most = (2**31 - 1) // train.steps_per_epoch(count, batch_size=words.batch_size)
    if epochs > most:
        raise ValueError(
            f"--epochs must be at most {most}: steps are counted in 32 bits."
        )
    if words.shift > max(dataset.shape):
        raise ValueError(
            f"--shift must be at most {max(dataset.shape)}, an image's side."
        )
    return job.Plan(
        net=_networks(words.framework)[words.model](dataset.classes),
        dataset=dataset,
        clip=_clips(words.clip),
        optimizer=_optimizers()[words.optimizer],
        learning_rate=words.learning_rate or options.RATES[words.optimizer],
        epochs=epochs,
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
def _interruptible() -> Iterator[list[int]]:
    """Yields the signals that came, Ctrl-C or SIGTERM; the second one raises.

    An exception raised by the first could be swallowed by a callback of jax, or come
    between a step and the note of it.
    """
    came: list[int] = []

    def note(signum, frame):
        del frame
        if came:
            raise KeyboardInterrupt
        came.append(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Patient:
    """A stream for people that stops no work: not unread, and not in ASCII."""

    def __init__(self, stream: Any):
        self._stream = io.StringIO() if stream is None else stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="clipjax.ascii", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._read_or_not():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._read_or_not():
            self._stream.flush()

    @contextlib.contextmanager
    def _read_or_not(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # such as a pipe into `head`; Python will flush it once more
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for letters that a terminal does not have."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_ASCII.get(letter, "?") for letter in letters), error.end


codecs.register_error("clipjax.ascii", _in_ascii)


def _complain(message: str) -> int:
    print(f"clipjax: {' '.join(message.split())}", file=sys.stderr)
    return _WRONG
