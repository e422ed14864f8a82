"""Images to train on: scikit-learn's digits, or any folder of idx files.

Pixels are float32 in [0, 1] and every image has a last axis of one channel.  The test
images are for the last line of a run only; tune on `validation`.
"""

import gzip
import math
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

_UNSIGNED_BYTE = 8  # the type code in the third byte of an idx file


class Split(NamedTuple):
    """Images and their labels, row by row."""

    images: Float[np.ndarray, "n height width 1"]
    labels: Int[np.ndarray, " n"]


class Dataset(NamedTuple):
    """Three splits that share no image."""

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.train.images.shape[1:]

    @property
    def classes(self) -> int:
        """How many labels there are: one more than the largest in `train`."""
        return int(self.train.labels.max()) + 1


def digits() -> Dataset:
    """The 1,797 digits of 8 by 8 pixels that come with scikit-learn.

    The splits are fixed and stratified: 1,200 to train, 150 to validate, 447 to test.

    Example:
        >>> from clipjax.examples import data
        >>> [len(split.labels) for split in data.digits()[1:]]
        [1200, 150, 447]
    """
    from sklearn import datasets, model_selection

    raw: Any = datasets.load_digits()
    images, labels = raw.images.astype(np.float32)[..., None] / 16, raw.target
    rows = np.arange(len(labels))

    def halve(rows, size):
        return model_selection.train_test_split(
            rows, test_size=size, random_state=0, stratify=labels[rows]
        )

    rest, test = halve(rows, 447)
    train, validation = halve(rest, 150)
    parts = (train, validation, test)
    splits = (Split(images[i], labels[i].astype(np.int32)) for i in parts)
    return Dataset("digits", *splits)


def idx_folder(folder: str | pathlib.Path) -> Dataset:
    """Reads the four idx files of MNIST, Fashion-MNIST and the like.

    They are called `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same
    with `t10k`; a dot may stand before `idx`, and `.gz` may follow.  The last twelfth
    of the training images (5,000 of 60,000) becomes the validation split.

    Args:
        folder: the folder that holds the files.

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names it.
        ValueError: a file is corrupt or the files do not fit; the message names it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}: give one with idx files."
        )
    train, test = _labelled(folder, "train"), _labelled(folder, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"The images in {folder} have shape {train.images.shape[1:3]} for training"
            f" but {test.images.shape[1:3]} for testing: take both from one data set."
        )
    kept = len(train.labels) - len(train.labels) // 12
    first, last = (Split(*(part[rows] for part in train)) for rows in _cut(kept))
    name = folder.resolve().name.encode(errors="replace").decode()  # not every name is
    return Dataset(name, first, last, test)


def read_idx(path: str | pathlib.Path) -> UInt8[np.ndarray, "..."]:
    """Reads one idx file of unsigned bytes, packed with gzip or not.

    Args:
        path: the file; it is unpacked when its name ends in `.gz`.

    Raises:
        ValueError: the file is not a whole idx file; the message names it.
    """
    raw = _content(pathlib.Path(path))
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise _corrupt(path, f"it starts with {raw[:4].hex(' ') or 'nothing'}")
    rank = raw[3]
    shape = np.frombuffer(raw[4 : 4 + 4 * (len(raw[4:]) // 4)], ">u4")[:rank].tolist()
    expected, found = 4 + 4 * rank + math.prod(shape), len(raw)
    if len(shape) < rank or expected != found:
        raise _corrupt(path, f"it has {found:,} bytes where {expected:,} are announced")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _cut(at: int) -> tuple[slice, slice]:
    return slice(at), slice(at, None)


def _labelled(folder: pathlib.Path, part: str) -> Split:
    """The images and labels of one part, checked against each other."""
    image_path = _find(folder, f"{part}-images", "idx3-ubyte")
    label_path = _find(folder, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{image_path} has shape {images.shape} and {label_path} has shape"
            f" {labels.shape}, but there must be one label for every image: take both"
            " from one data set."
        )
    if not images.size:
        raise ValueError(f"{image_path} holds no images: take another data set.")
    return Split(images[..., None] / np.float32(255), labels.astype(np.int32))


def _find(folder: pathlib.Path, stem: str, kind: str) -> pathlib.Path:
    names = [f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder / names[0]} is missing (with .gz or without): put it there, or leave"
        " the folder out to train on scikit-learn's digits."
    )


def _content(path: pathlib.Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, f"gzip says: {error}") from error


def _corrupt(path: str | pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a whole idx file ({why}): download it again.")
