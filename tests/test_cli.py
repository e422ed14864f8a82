"""The command line: from words to files, and plain answers to what goes wrong."""

import contextlib
import io
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import clipjax
from clipjax import cli
from clipjax.examples import outputs

ROOT = pathlib.Path(__file__).parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist"
EPOCHS = 16  # enough without shifted images, which other runs have
QUICK = ["train", "--model", "lenet-300-100"]


@pytest.fixture(autouse=True, scope="module")
def relaxed():
    """Flax and optax promote dtypes and ranks in their own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", params=["linen", "nnx"])
def finished(request, tmp_path_factory, relaxed):
    """A run of the main job: its status, what it said, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    words = [*QUICK, "--epochs", str(EPOCHS), "--framework", request.param]
    words += ["--shift", "0"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*words, "--output", str(folder)])
    return status, out.getvalue(), err.getvalue(), folder


def rows_in(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def nonzero_share(path):
    params = safetensors.numpy.load_file(path)
    kept = sum(np.count_nonzero(leaf) for leaf in params.values())
    return kept / sum(leaf.size for leaf in params.values())


def test_the_main_job_leaves_an_accurate_sparse_model(finished):
    status, out, err, folder = finished
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "metrics.jsonl", "training.png")
    }
    assert 0.095 < nonzero_share(folder / "model.safetensors") <= 0.1
    dense, sparse = (
        float(line.split()[1].rstrip("%"))
        for line in out.splitlines()
        if line.startswith(("  dense ", "  sparse ")) and "%" in line
    )
    assert dense > 95
    assert sparse > 90
    assert "hidden_0/kernel" in out  # the table
    for word in ("sparse:", "dense:", "loss", "accuracy", "norm", "clipped"):
        assert word in err


def test_every_step_has_a_line(finished):
    *_, folder = finished
    rows = rows_in(folder)
    assert [row["step"] for row in rows] == list(range(1, EPOCHS * 24 + 1))
    for row in rows:
        assert {"loss", "accuracy", "norm", "threshold", "sparsity"} <= set(row)
        assert all(value is None or math.isfinite(value) for value in row.values())
    judged = [row["step"] for row in rows if "validation_accuracy" in row]
    assert judged == list(range(24, EPOCHS * 24 + 1, 24))


def test_the_model_file_says_what_it_is(finished):
    *_, folder = finished
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata()["model"] == "lenet-300-100"
        assert file.metadata()["data"] == "digits"
        assert file.metadata()["sparsity"] == "0.9"
        assert "hidden_0/kernel" in file.keys()  # noqa: SIM118  no mapping


@pytest.mark.parametrize(
    "words",
    [
        ["--clip", "none", "--optimizer", "sgd"],
        ["--sparsity", "0", "--optimizer", "adamw", "--clip", "0.5", "--shift", "0"],
        ["--sparsity", "0", "--optimizer", "lion", "--learning-rate", "1e-4"],
    ],
)
def test_other_choices_run(tmp_path, capsys, words):
    quick = [*QUICK, "--epochs", "1", "--no-dense", "--output", str(tmp_path)]
    assert cli.main([*quick, *words]) == 0
    share = nonzero_share(tmp_path / "model.safetensors")
    assert share > 0.99 if "--sparsity" in words else share <= 0.1
    assert "test accuracy" in capsys.readouterr().out


WRONG = {
    "--sparsity 1": "--sparsity: must be from 0 to below 1, but is '1'",
    "--sparsity nan": "--sparsity: must be from 0 to below 1, but is 'nan'",
    "--sparsity lots": "--sparsity: must be from 0 to below 1, but is 'lots'",
    "--sparsity 0.9999": "choose a lower sparsity",
    "--clip fast": "--clip: must be adaptive, none, or a number above 0",
    "--clip -1": "--clip: must be adaptive, none, or a number above 0",
    "--learning-rate 0": "--learning-rate: must be above 0",
    "--epochs 0": "--epochs: must be a whole number from 1",
    "--epochs 1.5": "--epochs: must be a whole number from 1",
    "--batch-size 1201": "--batch-size must be at most 1200",
    "--shift -1": "--shift: must be a whole number from 0",
    "--seed x": "--seed: must be a whole number from 0",
    "--model resnet": "choose from",
    "--framework torch": "choose from",
    "--optimizer magic": "choose from",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--model lenet-5": "at least 16 by 16",
    "--data nowhere": "no folder nowhere",
    "--output README.md": "README.md is a file",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_value_is_answered_in_one_line(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("README.md").touch()
    try:
        status = cli.main(["train", *words.split()])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status == 2
    assert WRONG[words] in said.err
    assert said.err.startswith("clipjax: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_corrupt_data_file_is_named_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    output = tmp_path / "output"
    words = ["train", "--data", str(tmp_path), "--output", str(output)]
    assert cli.main(words) == 2
    assert "train-images-idx3-ubyte.gz is not a whole idx" in capsys.readouterr().err
    assert not output.exists()


def hide(monkeypatch, package):
    """Undoes the import of a package for the rest of the test."""
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    if package == "clipjax.examples":
        monkeypatch.delattr(clipjax, "examples")


@pytest.mark.parametrize("missing", ["flax", "sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path, capsys, monkeypatch, missing
):
    hide(monkeypatch, "clipjax.examples")
    hide(monkeypatch, missing)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main([*QUICK, "--output", str(tmp_path / "output")]) == 2
    said = capsys.readouterr().err
    assert missing in said
    assert 'pip install "clipjax[train]"' in said
    assert said.count("\n") == 1


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for option in (
        "--data",
        "--model",
        "--framework",
        "--sparsity",
        "--clip",
        "--seed",
    ):
        assert option in said
    assert said.count("default:") >= 11


def start_in_the_background(folder, *words):
    """The command in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "clipjax", *words, "--output", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(stream, word):
    seen = ""
    while word not in seen:
        letter = stream.read(1)
        assert letter, f"the command ended after {seen!r}"
        seen += letter


def test_ctrl_c_saves_what_was_trained(tmp_path):
    words = [*QUICK, "--epochs", "1000000"]
    with start_in_the_background(tmp_path, *words) as process:
        wait_for(process.stderr, "sparse:")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Ended early" in err
    assert "test accuracy" in out
    rows = rows_in(tmp_path)
    assert 1 <= len(rows) <= 100 * 24
    assert safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        outputs.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST in ../shared/data/mnist")
def test_mnist_reaches_the_accuracy_of_the_literature(tmp_path, capsys):
    words = [*QUICK, "--data", str(MNIST), "--epochs", "10", "--no-dense"]
    assert cli.main([*words, "--output", str(tmp_path)]) == 0
    assert nonzero_share(tmp_path / "model.safetensors") <= 0.1
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith("  sparse ") and "%" in x)
    assert float(line.split()[1].rstrip("%")) >= 98.5
    shutil.rmtree(tmp_path)
