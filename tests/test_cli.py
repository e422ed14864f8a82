"""The command line: from words to files, and plain answers to what goes wrong."""

import contextlib
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import clipjax
from clipjax import cli
from clipjax.examples import data, job, nets, outputs, plots

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
    lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
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
    for word in ("sparse:", "dense:", "compiling", "loss", "accuracy", "clipped"):
        assert word in err
    assert max(map(len, re.split("[\r\n]", err))) < 80


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
    "--shift 9": "--shift must be at most 8",
    "--seed x": "--seed: must be a whole number from 0",
    f"--seed {10**30}": "--seed: must be a whole number from 0 to 4294967295",
    f"--seed {10**400}": "--seed: must be a whole number from 0 to 4294967295",
    f"--epochs {10**30}": "--epochs must be at most 89478485",
    "--model resnet": "choose from",
    "--framework torch": "choose from",
    "--optimizer magic": "choose from",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--model lenet-5": "at least 16 by 16",
    "--data nowhere": "no folder nowhere",
    "--output README.md": "README.md is a file",
    f"--output {'x' * 300}": "File name too long",
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


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"clipjax {clipjax.__version__}\n"


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


TINY = nets.Net(
    lambda key, shape: {"kernel": jax.random.normal(key, (4, 2), jnp.float32)},
    lambda params, images: images.reshape(len(images), 4) @ params["kernel"],
)
FILES = ["metrics.jsonl", "model.safetensors", "training.png"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Four epochs of two steps, which compile at once; returns `train` with options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "png", lambda figure: bytes(10_000))  # to draw is slow
    images = np.random.default_rng(0).random((20, 2, 2, 1), np.float32)
    split = data.Split(images, np.arange(20, dtype=np.int32) % 2)
    plan = job.Plan(
        net=TINY,
        dataset=data.Dataset("dots", split, split, split),
        clip=optax.identity(),
        optimizer=optax.sgd,
        learning_rate=0.1,
        epochs=4,
        batch_size=10,
        shift=0,
        seed=0,
    )
    quick = ["train", "--sparsity", "0"]

    def run(*words, **changes):
        monkeypatch.setattr(cli, "_plan", lambda _: plan._replace(**changes))
        return cli.main([*quick, *words])

    return run


def before_it_trains(monkeypatch, act):
    """Lets something happen between the checks and the training."""
    follow = job.follow

    def acting(*args, **options):
        act()
        return follow(*args, **options)

    monkeypatch.setattr(job, "follow", acting)


def names(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


def test_a_second_run_goes_beside_the_first(tiny, capsys):
    pathlib.Path("clipjax-run").symlink_to("nowhere")
    pathlib.Path("clipjax-run-2").mkdir()
    assert tiny() == 0
    said = capsys.readouterr().out
    assert "clipjax-run is there already: writing to clipjax-run-3" in said
    assert names("clipjax-run-3") == FILES


def test_a_named_run_is_replaced_only_where_that_is_asked_for(tiny, capsys):
    folder = pathlib.Path("mine")
    folder.mkdir()
    for name in [*FILES, ".model.safetensors.part", "notes"]:
        (folder / name).write_text("old")  # one is what a killed save left
    assert tiny("--output", "mine") == 2
    assert "mine holds an earlier run" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_text() == "old"
    assert tiny("--output", "mine", "--overwrite") == 0
    assert names(folder) == sorted([*FILES, "notes"])
    assert len(rows_in(folder)) == 8


@pytest.mark.parametrize("way", ["link", "folder", "full"])
def test_what_cannot_be_written_is_found_before_the_training(
    tiny, capsys, monkeypatch, way
):
    if way == "link":
        pathlib.Path("there").symlink_to("nowhere")
    if way == "folder":
        pathlib.Path("there/model.safetensors").mkdir(parents=True)
    if way == "full":
        monkeypatch.setattr(job, "room", lambda plan: 2**20)
    before_it_trains(monkeypatch, lambda: pytest.fail("trains"))
    with limited_files(2**19):
        assert tiny("--output", "there") == 2
    said = capsys.readouterr().err
    assert said.startswith("clipjax: ")
    assert "choose" in said
    assert said.count("\n") == 1
    assert way == "full" or os.path.lexists("there")
    assert way != "full" or not os.path.lexists("there")


@contextlib.contextmanager
def limited_files(size):
    """Makes longer files fail to be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_fits_on_a_full_disk_is_saved(tiny, capsys, monkeypatch):
    with contextlib.ExitStack() as stack:
        limit = limited_files(8_000)
        before_it_trains(monkeypatch, lambda: stack.enter_context(limit))
        assert tiny("--output", "there") == 1
    assert names("there") == FILES[:2]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "clipjax: could not write training.png to there (File too large)"


def test_sigterm_saves_what_was_trained(tiny, capsys, monkeypatch):
    before_it_trains(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    handler = signal.getsignal(signal.SIGTERM)
    assert tiny("--output", "there") == 143
    assert "Ended early by SIGTERM." in capsys.readouterr().err
    assert names("there") == FILES
    assert len(rows_in("there")) == 2
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_terminal_without_unicode_gets_what_it_has(tiny, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert tiny() == 0
    said = terminal.buffer.getvalue().decode("ascii")
    assert "4x2" in said
    assert "-----" in said


def test_what_nobody_reads_stops_no_training(tiny, monkeypatch):
    """As in `python -m clipjax train 2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        assert tiny() == 0
    assert names("clipjax-run") == FILES


def test_a_training_that_fails_says_so_and_keeps_finite_parameters(tiny, capsys):
    """The fourth update, in the second part of two, is NaN."""

    def breaking(rate):
        del rate
        return optax.scale_by_schedule(lambda step: jnp.where(step < 3, -0.1, jnp.nan))

    assert tiny(optimizer=breaking) == 1
    said = capsys.readouterr().err
    assert "the dense training failed: its last parameters" in said
    assert "parameters after step 2" in said
    params = safetensors.numpy.load_file("clipjax-run/model.safetensors")
    assert np.isfinite(params["kernel"]).all()
    assert len(rows_in("clipjax-run")) == 4


def test_a_loss_that_is_nan_at_once_keeps_the_first_parameters(tiny, capsys):
    assert tiny(optimizer=lambda rate: optax.scale(jnp.nan), epochs=1) == 1
    said = capsys.readouterr().err
    assert "its loss at step 2 is no finite number" in said
    assert "parameters after step 0" in said


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_shortest_trainings_end_at_their_sparsity(epochs):
    split = data.Split(np.zeros((1, 2, 2, 1), np.float32), np.zeros(1, np.int32))
    plan = job.Plan(
        net=TINY,
        dataset=data.Dataset("dot", split, split, split),
        clip=optax.identity(),
        optimizer=optax.sgd,
        learning_rate=0.1,
        epochs=epochs,
        batch_size=1,
        shift=0,
        seed=0,
    )
    tx = job.chain(plan, sparsity=0.75)
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
    state = tx.init(params)
    for _ in range(epochs):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert np.count_nonzero(params["kernel"]) == 2


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        outputs.write(tmp_path, {path.name: b"new"})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("done", [0, 1])
def test_a_save_that_is_stopped_mixes_no_runs(tmp_path, monkeypatch, done):
    """Whether it is stopped before its first file has its name, or after."""
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"old")
    moved, replace = [], os.replace

    def stop(source, target):
        if len(moved) == done:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    contents = {"first": b"new", "second": b"new"}
    with pytest.raises(KeyboardInterrupt):
        outputs.write(tmp_path, contents, without=["second"])
    assert first.read_bytes() == [b"old", b"new"][done]
    assert list(tmp_path.iterdir()) == [first]


def test_the_picture_has_the_threshold_beside_the_norm_and_a_dense_curve():
    norm = np.array([1.0, 3.0, 2.0], np.float32)
    history = {
        "loss": norm,
        "norm": norm,
        "clipped_norm": np.minimum(norm, 2),
        "threshold": np.full(3, 2.0, np.float32),
        "sparsity": np.zeros(3, np.float32),
    }
    figure = plots.training(history, title="a $ in a name", dense_loss=norm / 2)
    loss, norms, _ = (
        {line.get_label(): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        for axes in figure.axes
    )
    np.testing.assert_array_equal(loss["dense"], norm / 2)
    np.testing.assert_array_equal(loss["sparse"], norm)
    np.testing.assert_array_equal(norms["before the clip"], norm)
    np.testing.assert_array_equal(norms["threshold"], 2)
    assert not figure.axes[0].title.get_parse_math()  # or this $ would be an error


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
