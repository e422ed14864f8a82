"""What a user can reach: each name once, explained, and cheap to import."""

import collections
import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

import clipjax

ROOT = pathlib.Path(__file__).parents[1]
APPLICATIONS = ("clipjax.examples", "clipjax.cli")
FOLDERS = [".ci", ".github", "benchmarks", "clipjax", "notebooks", "tests"]


def every_module():
    found = pkgutil.walk_packages(clipjax.__path__, "clipjax.")
    names = ["clipjax", *(module.name for module in found)]
    return [importlib.import_module(name) for name in names if "__main__" not in name]


MODULES = [
    module
    for module in every_module()
    if "._" not in module.__name__ and not module.__name__.startswith(APPLICATIONS)
]
OBJECTS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
}
FUNCTIONS = {path: x for path, x in OBJECTS.items() if inspect.isfunction(x)}
KNOWN = {id(x) for x in OBJECTS.values()}


def test_help_and_dir_show_what_is_public_and_nothing_else():
    for module in MODULES:
        assert sorted(set(module.__all__)) == sorted(module.__all__), module.__name__
        shown = {name for name in dir(module) if not name.startswith("__")}
        assert shown <= set(module.__all__), module.__name__
        assert not any(name.startswith("_") for name in module.__all__)
    assert len(FUNCTIONS) > 100


def test_every_name_has_one_path():
    paths = collections.defaultdict(set)
    for path, value in OBJECTS.items():
        if callable(value) or inspect.ismodule(value):
            paths[id(value)].add(path)
    assert [sorted(same) for same in paths.values() if len(same) > 1] == []


def test_every_function_has_an_example():
    pattern = re.compile(r"^Examples?:\n.*>>> ", re.MULTILINE | re.DOTALL)
    without = [
        path
        for path, function in FUNCTIONS.items()
        if not pattern.search(inspect.getdoc(function) or "")
    ]
    assert without == []


def test_signatures_can_be_read():
    long = {
        path: len(signature)
        for path, function in FUNCTIONS.items()
        if len(signature := str(inspect.signature(function))) > 700
    }
    assert long == {}


def families():
    """The modules by the folder or file directly in the package."""
    result = collections.defaultdict(list)
    for module in every_module():
        result[".".join(module.__name__.split(".")[:2])].append(module)
    return result


@pytest.mark.parametrize("family", families())
def test_examples_run_as_pasted(family):
    """What is public needs nothing but what the example imports."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    report = io.StringIO()
    for module in families()[family]:
        public = {name for name, x in vars(module).items() if id(x) in KNOWN}
        for example in doctest.DocTestFinder(exclude_empty=True).find(module):
            name = example.name.removeprefix(f"{module.__name__}.").split(".")[0]
            own = vars(module) if name not in public else {}
            example.globs = {"__name__": "__main__", **own}
            runner.run(example, out=report.write)
    assert runner.failures == 0, report.getvalue()


def test_version_is_the_one_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert clipjax.__version__ == project["version"]


def test_import_is_quiet_and_needs_no_extra():
    code = "import sys, clipjax; print(*{m.split('.')[0] for m in sys.modules})"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"flax", "matplotlib", "safetensors", "sklearn", "tqdm"} & {
        *done.stdout.split()
    }
    assert done.stderr == ""


def test_files_hold_for_every_machine():
    files = [x for x in ROOT.iterdir() if x.is_file() and x.name != ".git"]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    local = re.compile(r"(?<![\w.~])/(home|mnt|root|tmp|work|Users)/|\b[Ii]ssue[ ]#\d")
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if "__pycache__" not in path.parts
        and (match := local.search(path.read_text(errors="ignore")))
    }
    assert found == {}
