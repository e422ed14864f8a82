"""The files that a run writes: the model, the history and a picture of it.

Every file is written under another name first and then moved into place, so that no
file in the output folder is ever half written, and none of an earlier run lies beside a
new one.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from .._core import trees
from . import plots
from .train import Trained

_MODEL, _LINES, _PICTURE = "model.safetensors", "metrics.jsonl", "training.png"
_FILES = (_MODEL, _LINES, _PICTURE)

Missing = dict[str, str]  # from the name of a file to why it could not be written


def next_free(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the first of `folder-2`, `folder-3` and so on that is not there.

    Args:
        folder: the name to begin with.
    """
    others = (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2))
    names = itertools.chain([folder], others)
    return next(path for path in names if not os.path.lexists(path))


@contextlib.contextmanager
def claimed(folder: pathlib.Path, *, overwrite: bool, room: int) -> Iterator[None]:
    """Makes the folder, or refuses it before any time is spent on a training.

    In the end it removes a folder that it made and that nothing was written to.

    Args:
        folder: the output folder, which need not exist yet.
        overwrite: whether files of an earlier run may be replaced.
        room: how many bytes must fit.

    Raises:
        ValueError: nothing can be written there, or an earlier run would be replaced.
    """
    _refuse_files(folder, overwrite=overwrite)
    made = not folder.exists()

    def begin():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(room))

    try:
        if why := _tried(begin):
            why = f"{folder} cannot be written to ({why})"
            raise ValueError(f"{why}: choose another --output.")
        yield
    finally:
        if made:
            _tried(folder.rmdir)  # unless there is something in it


def save(
    trained: Trained, *, folder: pathlib.Path, about: Mapping[str, str]
) -> Missing:
    """Writes the model, the history and the picture, or what of them can be written.

    Args:
        trained: what to write.
        folder: the output folder, made if it is missing; old files are replaced.
        about: what to write into the header of the model.
    """
    contents = {_MODEL: model(trained.params, about=about), _LINES: lines(trained)}
    missing = write(folder, contents, without=[_LINES, _PICTURE])
    return missing | draw(trained, folder=folder, about=about)


def draw(
    trained: Trained,
    *,
    folder: pathlib.Path,
    about: Mapping[str, str],
    dense: Trained | None = None,
) -> Missing:
    """Writes the picture alone.

    Args:
        trained: what to draw.
        folder: the output folder.
        about: the title names the model and the data.
        dense: the result without pruning, whose loss is drawn too.
    """
    title = " · ".join(about[name] for name in ("model", "data") if about.get(name))
    loss = None if dense is None else dense.history["loss"]
    picture = plots.training(trained.history, title=title, dense_loss=loss)
    return write(folder, {_PICTURE: plots.png(picture)})


def listing(folder: pathlib.Path) -> str:
    """One line that names the files and their sizes.

    Args:
        folder: the folder that `save` wrote to.
    """
    there = [name for name in _FILES if (folder / name).exists()]
    sizes = {name: (folder / name).stat().st_size for name in there}
    told = (f"{name} ({size / 1000:,.0f} kB)" for name, size in sizes.items())
    return f"Written to {folder}: {', '.join(told) or 'nothing'}"


def complaint(missing: Missing, *, folder: pathlib.Path) -> str:
    """One line about the files that could not be written; nothing if all could.

    Args:
        missing: what `save` and `draw` returned.
        folder: the folder that they wrote to.
    """
    if not missing:
        return ""
    why, names = ", ".join(dict.fromkeys(missing.values())), ", ".join(missing)
    return f"could not write {names} to {folder} ({why})"


def write(
    folder: pathlib.Path, contents: Mapping[str, bytes], *, without: Sequence[str] = ()
) -> Missing:
    """Writes files, each whole or not at all, and returns which are missing and why.

    The first replaces an old one at once, after all of them are ready and what would be
    out of date is removed.

    Args:
        folder: where to write, made if it is missing.
        contents: the bytes of every file, by its name.
        without: the names of old files that must not lie beside the new ones.
    """
    parts = {name: folder / f".{name}.part" for name in contents}
    missing: Missing = {}
    try:
        _tried(lambda: folder.mkdir(parents=True, exist_ok=True))
        tight = [name for name in parts if _put(parts[name], contents[name])]
        for name in {*without, *tight}:  # which also makes room
            _tried((folder / name).unlink)
        for name, part in parts.items():
            why = _put(part, contents[name]) if name in tight else ""
            move = functools.partial(os.replace, part, folder / name)
            if why := why or _tried(move):
                missing[name] = why
    finally:
        for part in parts.values():
            _tried(part.unlink)
    return missing


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


def _refuse_files(folder: pathlib.Path, *, overwrite: bool) -> None:
    """Refuses a folder by what is there already."""
    paths = (folder, *folder.absolute().parents)
    there = next(path for path in paths if os.path.lexists(path))
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nowhere"
        raise ValueError(f"{there} is {kind}: choose a folder for --output.")
    old = [folder / name for name in _FILES if os.path.lexists(folder / name)]
    for path in old:
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"{path} is a folder: choose another --output.")
    if old and not overwrite:
        raise ValueError(
            f"{folder} holds an earlier run: choose another --output, or replace it"
            " with --overwrite."
        )


def _put(path: pathlib.Path, content: bytes) -> str:
    """Writes a file and returns nothing, or why it could not."""
    why = _tried(lambda: path.write_bytes(content))
    if why:
        _tried(path.unlink)  # another file may fit
    return why


def _tried(action: Callable[[], object]) -> str:
    """Acts and returns nothing, or why it could not."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return ""
