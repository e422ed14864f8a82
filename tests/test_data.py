"""Reading images: whole files come out as they are, others are named."""

import gzip
import pathlib

import numpy as np
import pytest

from clipjax.examples import data

MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"
NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(array):
    """The bytes of an idx file."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A data set of 24 + 6 images of 5 by 4."""
    for name, size in zip(NAMES, (24, 24, 6, 6), strict=True):
        shape = (size, 5, 4) if "images" in name else (size,)
        top = 256 if "images" in name else 3
        values = np.arange(np.prod(shape)).reshape(shape) % top
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def test_digits_are_split_once_and_for_all():
    dataset = data.digits()
    again = data.digits()
    rows = [image.tobytes() for split in dataset[1:] for image in split.images]
    assert len(rows) == len(set(rows)) == 1797
    assert dataset.shape == (8, 8, 1)
    assert dataset.classes == 10
    for split, same in zip(dataset[1:], again[1:], strict=True):
        np.testing.assert_array_equal(split.images, same.images)
        assert split.images.dtype == np.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        shares = np.bincount(split.labels) / len(split.labels)
        assert abs(shares - 0.1).max() < 0.01  # every label has its part


def test_idx_folder_scales_the_pixels_and_holds_out_the_last_twelfth(folder):
    dataset = data.idx_folder(folder)
    assert [len(split.labels) for split in dataset[1:]] == [22, 2, 6]
    assert dataset.shape == (5, 4, 1)
    assert dataset.classes == 3
    pixels = np.arange(24 * 20).reshape(24, 5, 4, 1) % 256
    both = np.concatenate([dataset.train.images, dataset.validation.images])
    np.testing.assert_allclose(both * 255, pixels, rtol=1e-6)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(22) % 3)


@pytest.mark.parametrize("change", ["gz", "dot", "dot and gz"])
def test_idx_folder_takes_every_usual_name(folder, change):
    expected = data.idx_folder(folder)
    for path in [folder / name for name in NAMES]:
        name = path.name.replace("-idx", ".idx") if "dot" in change else path.name
        raw = path.read_bytes()
        path.unlink()
        if "gz" in change:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    for split, same in zip(data.idx_folder(folder)[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(split.images, same.images)
        np.testing.assert_array_equal(split.labels, same.labels)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        data.idx_folder(folder)


def test_a_missing_folder_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        data.idx_folder(folder / "nowhere")


DAMAGES = {
    "empty": lambda raw: b"",
    "cut in the header": lambda raw: raw[:9],
    "cut in the data": lambda raw: raw[:-1],
    "too long": lambda raw: raw + b"\0",
    "another format": lambda raw: b"\x89PNG" + raw,
    "another type of number": lambda raw: raw[:2] + b"\x0d" + raw[3:],
    "absurd shape": lambda raw: raw[:4] + b"\xff" * 12 + raw[16:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_corrupt_file_is_named(folder, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is not a whole idx file .*again\."):
        data.idx_folder(folder)


GZIP_DAMAGES = {
    "not packed": lambda raw: raw,
    "cut": lambda raw: gzip.compress(raw)[:-12],
    "flipped": lambda raw: gzip.compress(raw)[:-6] + b"\1\2\3\4\5\6",
    "spoilt inside": lambda raw: gzip.compress(raw)[:12] + bytes(40),
}


@pytest.mark.parametrize("damage", GZIP_DAMAGES.values(), ids=GZIP_DAMAGES.keys())
def test_a_corrupt_archive_is_named(folder, damage):
    path = folder / NAMES[0]
    packed = folder / f"{NAMES[0]}.gz"
    packed.write_bytes(damage(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match=rf"{packed.name} is not a whole .*again\."):
        data.idx_folder(folder)


def test_labels_that_do_not_belong_to_the_images_are_refused(folder):
    (folder / NAMES[1]).write_bytes(idx(np.zeros(23)))
    with pytest.raises(ValueError, match=f"{NAMES[1]} has shape .*one label for every"):
        data.idx_folder(folder)


def test_test_images_of_another_size_are_refused(folder):
    (folder / NAMES[2]).write_bytes(idx(np.zeros((6, 4, 4))))
    with pytest.raises(ValueError, match=r"shape \(5, 4\) .* but \(4, 4\)"):
        data.idx_folder(folder)


def test_a_data_set_without_images_is_refused(folder):
    (folder / NAMES[0]).write_bytes(idx(np.zeros((0, 5, 4))))
    (folder / NAMES[1]).write_bytes(idx(np.zeros(0)))
    with pytest.raises(ValueError, match=f"{NAMES[0]} holds no images"):
        data.idx_folder(folder)


@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST in ../shared/data/mnist")
def test_mnist_is_read():
    dataset = data.idx_folder(MNIST)
    assert [len(split.labels) for split in dataset[1:]] == [55_000, 5_000, 10_000]
    assert dataset.shape == (28, 28, 1)
    assert np.bincount(dataset.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    assert dataset.train.images.mean() == pytest.approx(0.1307, abs=3e-4)
