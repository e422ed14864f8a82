"""The notebooks: they run, they are short, and they are kept as they ran."""

import ast
import importlib.util
import os
import pathlib
import subprocess

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


SMOKE = {  # words in the code, and what is run in their place
    "01_quickstart": {"epochs=60": "epochs=2"},
    "02_precision": {
        "leaves = [1, 10, 100, 1000, 10_000]": "leaves = [1, 1000]",
        "steps, seeds = 200, 3": "steps, seeds = 20, 1",
        "thresholds = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]": "thresholds = [0.1, 1]",
        '{"float32": 1.0, "bfloat16": 1.0, "float16": 4096.0}': '{"float16": 4096.0}',
    },
    "03_sparse_training": {
        "epochs, sparsities = 40": "epochs, sparsities = 1",
        "[0.8, 0.9, 0.95, 0.98]": "[0.95]",
        'networks["gradual"][1]': 'networks["gradual"][0]',
    },
}


def cells(path, kind="code"):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def source(cell):
    """The Python of a cell, without the lines that belong to IPython."""
    lines = cell.source.splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def test_there_are_notebooks():
    assert NOTEBOOKS


def make_small(notebook, words):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for word, instead in words.items():
        (cell,) = (cell for cell in code if word in cell.source)
        cell.source = cell.source.replace(word, instead)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One for all of them: to import what they need takes as long as to run them."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    folder = str(tmp_path_factory.mktemp("notebooks"))
    env = {"PYTHONPATH": os.pathsep.join(paths), "IPYTHONDIR": folder}
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | env, cwd=folder)
    yield manager
    manager.shutdown_kernel(now=True)


@each_notebook
def test_it_runs(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    make_small(notebook, SMOKE.get(path.stem, {}))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, timeout=300, km=kernel)
    client.execute()  # raises what a cell raises
    client.kc.stop_channels()


@each_notebook
def test_its_functions_are_short(path):
    for cell in cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name


@each_notebook
def test_outputs_are_kept_and_metadata_is_not(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert any(cell.outputs for cell in cells(path))
    kinds = {output.output_type for cell in cells(path) for output in cell.outputs}
    assert "error" not in kinds
    ran = [cell.execution_count for cell in cells(path)]
    assert ran == list(range(1, len(ran) + 1)), "run it again from the top"


@each_notebook
def test_it_opens_on_colab(path):
    assert f"blob/main/notebooks/{path.name}" in cells(path, "markdown")[0].source


@each_notebook
def test_it_installs_the_checkout_that_it_lies_in(path, monkeypatch, tmp_path):
    """Or says which line to set, where there is none."""
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    first = cells(path)[0].source
    monkeypatch.chdir(path.parent)
    exec(first, {})
    assert ran[0][-1] == f"{ROOT}[train]"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="set `source` to a checkout"):
        exec(first, {})
    assert len(ran) == 1
