"""What a user can reach: each name once, explained, and cheap to import."""

import ast
import collections
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types

import pytest

import clipjax

ROOT = pathlib.Path(__file__).parents[1]
APPLICATIONS = ("clipjax.examples", "clipjax.cli")
FOLDERS = [".ci", ".github", "benchmarks", "clipjax", "notebooks", "tests"]


def public_modules():
    """The package and every module in it that is reached without an underscore."""
    found = pkgutil.walk_packages(clipjax.__path__, "clipjax.")
    names = [module.name for module in found if "._" not in module.name]
    return [importlib.import_module(name) for name in ["clipjax", *names]]


def own_names(module):
    """Public names a module defines, or passes on as `import name as name`."""
    for node in ast.parse(pathlib.Path(module.__file__).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.name for alias in names if alias.name == alias.asname)


def public_objects():
    """Path and object for every public function, class and module."""
    for module in public_modules():
        yield module.__name__, module
        for name in own_names(module):
            value = getattr(module, name)
            known = callable(value) or isinstance(value, types.ModuleType)
            if known and not name.startswith("_"):
                yield f"{module.__name__}.{name}", value


OBJECTS = sorted(set(public_objects()), key=lambda pair: pair[0])
FUNCTIONS = [
    pytest.param(value, id=path)
    for path, value in OBJECTS
    if inspect.isfunction(value) and not path.startswith(APPLICATIONS)
]


def test_every_name_has_one_path():
    paths = collections.defaultdict(set)
    for path, value in OBJECTS:
        paths[id(value)].add(path)
    assert [sorted(same) for same in paths.values() if len(same) > 1] == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_has_an_example(function):
    doc = inspect.getdoc(function) or ""
    assert re.search(r"^Examples?:\n.*>>> ", doc, re.MULTILINE | re.DOTALL)


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
    files = [path for path in ROOT.iterdir() if path.is_file()]
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
