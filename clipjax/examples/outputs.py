"""The files that a run writes: the model, the history and a picture of it.

Every file is written under another name first and then moved into place, so that no
file in the output folder is ever half written.
"""

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from .._core import trees
from . import plots
from .train import Trained

_MODEL, _LINES, _PICTURE = "model.safetensors", "metrics.jsonl", "training.png"


def check(folder: pathlib.Path) -> None:
    """Refuses a folder that cannot be written to, before any time is spent.

    Args:
        folder: the output folder, which need not exist yet.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file: choose a folder for --output.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written to: choose another --output.")


def save(trained: Trained, *, folder: pathlib.Path, about: Mapping[str, str]) -> None:
    """Writes the model, the history and the picture.

    Args:
        trained: what to write.
        folder: the output folder, made if it is missing; old files are replaced.
        about: what to write into the header of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = " · ".join(about[name] for name in ("model", "data") if about.get(name))
    write(folder / _MODEL, model(trained.params, about=about))
    write(folder / _LINES, lines(trained))
    write(folder / _PICTURE, plots.png(plots.training(trained.history, title=title)))


def listing(folder: pathlib.Path) -> str:
    """One line that names the files and their sizes.

    Args:
        folder: the folder that `save` wrote to.
    """
    sizes = {
        name: (folder / name).stat().st_size for name in (_MODEL, _LINES, _PICTURE)
    }
    told = (f"{name} ({size / 1000:,.0f} kB)" for name, size in sizes.items())
    return f"Written to {folder}: {', '.join(told)}"


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes the whole file or nothing.

    Args:
        path: the file; an old one is replaced.
        content: the bytes of the file.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp lets nobody else read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def model(params: PyTree, *, about: Mapping[str, str]) -> bytes:
    """The parameters as a safetensors file, under their paths.

    Arrays are stored dense: a zero takes as many bytes as any other entry.

    Args:
        params: nested dicts of arrays.
        about: what to write into the header.
    """
    named = trees.by_path(params)
    arrays = {path: np.ascontiguousarray(leaf) for path, leaf in named.items()}
    return safetensors.numpy.save(arrays, metadata=dict(about))


def lines(trained: Trained) -> bytes:
    """The history as JSON lines, one for each step, counted from 1.

    A number that is not finite, such as the first threshold of a rule without a past,
    becomes null.

    Args:
        trained: the result, with its history and its validation accuracies.
    """
    rows = []
    for i in range(len(trained.history["loss"])):
        row = {name: values[i].item() for name, values in trained.history.items()}
        finite = {k: _short(v) if math.isfinite(v) else None for k, v in row.items()}
        if i + 1 in trained.validation:
            finite["validation_accuracy"] = trained.validation[i + 1]
        rows.append(json.dumps({"step": i + 1, **finite}) + "\n")
    return "".join(rows).encode()


def _short(value: int | float) -> int | float:
    """All the digits that a float32 has, and no more."""
    return float(f"{value:.8g}") if isinstance(value, float) else value
