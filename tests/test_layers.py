"""The architecture: imports point down this list. A new file is placed here first."""

import ast
import graphlib
import pathlib
import sys

import pytest

LAYERS = [
    {"_core"},  # 0 ground
    {"norms", "selection"},  # 1 mathematics
    {  # 2 ingredients: pure functions and frozen values
        "allocations",
        "masks",
        "patterns",
        "prox",
        "responses",
        "scopes",
        "scores",
        "thresholds",
    },
    {  # 3 transforms: what goes into `optax.chain`
        "_clipping",
        "_proximal",
        "_sparsity",
        "compression",
        "constraints",
        "contrib",
        "latents",
        "per_example",
    },
    {"_networks"},  # 4 whole networks
    {"__init__"},  # what users import, and so without layer 5
    {"examples", "cli", "__main__"},  # 5 applications
]
SOCIABLE = [*LAYERS[1:4], LAYERS[-1]]  # their members may use each other
CORE = {"jax", "numpy", "jaxtyping"}
TRAIN = {"flax", "matplotlib", "safetensors", "sklearn", "tqdm"}
THIRD_PARTY = [*[CORE | {"optax"}] * 6, CORE | {"optax"} | TRAIN]

PACKAGE = pathlib.Path(__file__).parents[1] / "clipjax"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
each_file = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES]
)


def family(path):
    """The file or folder directly in the package to which a file belongs."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def inside(path):
    """Families a file imports from, always relatively; "__init__" for flat names."""
    folders = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = folders[: len(folders) - node.level + 1]
            module = node.module.split(".") if node.module else []
            for alias in node.names:
                first = [*start, *module, alias.name][0]
                yield first if first in LEVEL else "__init__"


def outside(path):
    """Top-level names of the other packages a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@each_file
def test_every_file_has_a_layer(path):
    assert family(path) in LEVEL, f"place {path.name} in LAYERS of this test"


@each_file
def test_imports_point_down(path):
    here = family(path)
    for there in set(inside(path)) - {here}:
        beside = any({here, there} <= layer for layer in SOCIABLE)
        assert beside or LEVEL[there] < LEVEL[here], f"{here} reaches up to {there}"


@each_file
def test_other_packages_are_those_of_the_layer(path):
    names = set(outside(path)) - sys.stdlib_module_names
    assert "clipjax" not in names, "imports inside the package are relative"
    assert names <= THIRD_PARTY[LEVEL[family(path)]]


def test_no_circles():
    graph = {name: set() for name in LEVEL}
    for path in FILES:
        graph[family(path)] |= set(inside(path)) - {family(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
