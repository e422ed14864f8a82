"""The options of `python -m clipjax train`, and the values that they may have.

`clipjax.cli` says what they mean.  This file needs nothing but Python, so that `--help`
works without the extra `train`.
"""

import argparse
import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import NoReturn, TypeVar

from .. import __version__

FOLDER = pathlib.Path("clipjax-run")
MODELS = ["cnn", "lenet-300-100", "lenet-5", "transformer"]
RATES = {"adam": 2e-3, "adamw": 2e-3, "lion": 3e-4, "sgd": 0.1}

_N = TypeVar("_N", int, float)
_ABOUT_TRAIN = """\
Trains a small network on images so that most of its weights are exactly zero, and
compares it with the same network trained dense. Without options it takes the digits
that come with scikit-learn and a minute."""

_FILES = """\
The output folder gets model.safetensors (the parameters), metrics.jsonl (a line for
each step) and training.png (loss, gradient norm, sparsity). Ctrl-C or SIGTERM ends
the training early and saves what was trained so far; a second one ends at once.

examples:
  python -m clipjax train
  python -m clipjax train --data mnist --model lenet-300-100 --sparsity 0.9 --epochs 10
  python -m clipjax train --framework nnx --clip 1.0 --optimizer sgd"""


class _Parser(argparse.ArgumentParser):
    """A parser that answers a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clipjax: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Makes the parser of `python -m clipjax`."""
    main = _Parser(
        prog="python -m clipjax", description="Keep training stable, models sparse."
    )
    main.add_argument("--version", action="version", version=f"clipjax {__version__}")
    commands = main.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train a small network sparse, on digits or on your idx files",
        description=_ABOUT_TRAIN,
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(train.add_argument_group("what to train"))
    _add_how(train.add_argument_group("how"))
    _add_output(train.add_argument_group("what comes out"))
    return main


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        metavar="FOLDER",
        type=pathlib.Path,
        help="a folder with the four idx or idx.gz files of MNIST, Fashion-MNIST or"
        " their kin (default: the 1,797 digits of scikit-learn)",
    )
    group.add_argument("--model", choices=MODELS, default="cnn", help="default: cnn")
    group.add_argument(
        "--framework",
        choices=["linen", "nnx"],
        default="linen",
        help="which part of flax the network is written in (default: linen)",
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sparsity",
        metavar="SHARE",
        type=_share,
        default=0.9,
        help="share of all parameters that is exactly zero in the end, from 0 to below"
        " 1; biases are not pruned, but they are counted (default: 0.9)",
    )
    group.add_argument(
        "--clip",
        metavar="CLIP",
        type=_clip,
        default="adaptive",
        help="bound on the gradient norm: adaptive (from its own history), none, or a"
        " number (default: adaptive)",
    )
    group.add_argument(
        "--optimizer", choices=list(RATES), default="adam", help="default: adam"
    )
    rates = ", ".join(f"{rate} for {name}" for name, rate in RATES.items())
    group.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=_positive,
        help=f"highest learning rate, before it decays to 0 (default: {rates})",
    )
    group.add_argument(
        "--epochs",
        metavar="N",
        type=_count,
        help="how often to go through the training images (default: 60 for up to"
        " 10,000 of them, 10 for more)",
    )
    group.add_argument(
        "--batch-size", metavar="N", type=_count, default=50, help="default: 50"
    )
    group.add_argument(
        "--shift",
        metavar="PIXELS",
        type=_whole,
        default=1,
        help="augment: move each training image at random by up to this many pixels,"
        " down and across; 0 leaves the images alone (default: 1)",
    )
    group.add_argument("--seed", metavar="N", type=_seed, default=0, help="default: 0")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        metavar="FOLDER",
        type=pathlib.Path,
        help=f"where to write (default: {FOLDER}, or {FOLDER}-2 and so on if that is"
        " there already)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the files of an earlier run in the output folder",
    )
    group.add_argument(
        "--no-dense",
        dest="compare",
        action="store_false",
        help="do not train the dense network for comparison: half the time",
    )


def _share(text: str) -> float:
    return _number(text, float, lambda x: 0 <= x < 1, wanted="from 0 to below 1")


def _positive(text: str) -> float:
    return _number(text, float, lambda x: x > 0, wanted="above 0")


def _count(text: str) -> int:
    return _number(text, int, lambda x: x >= 1, wanted="a whole number from 1")


def _whole(text: str) -> int:
    return _number(text, int, lambda x: x >= 0, wanted="a whole number from 0")


def _seed(text: str) -> int:
    wanted = "a whole number from 0 to 4294967295"
    return _number(text, int, lambda x: 0 <= x < 2**32, wanted=wanted)


def _clip(text: str) -> str | float:
    if text in ("adaptive", "none"):
        return text
    wanted = "adaptive, none, or a number above 0"
    return _number(text, float, lambda x: x > 0, wanted=wanted)


def _number(
    text: str, kind: Callable[[str], _N], fits: Callable[[_N], bool], *, wanted: str
) -> _N:
    with contextlib.suppress(ValueError, OverflowError):  # more than a float holds
        value = kind(text)
        if math.isfinite(value) and fits(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {wanted}, but is {text!r}")
