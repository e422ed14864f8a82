"""The architecture: imports point down this list. A new file is placed here first."""

import ast
import graphlib
import pathlib
import sys

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


def test_every_file_has_a_layer():
    assert {family(path) for path in FILES} == set(LEVEL), "place it in LAYERS here"


def test_imports_point_down():
    reaching = []
    for path in FILES:
        here = family(path)
        for there in set(inside(path)) - {here}:
            beside = any({here, there} <= layer for layer in SOCIABLE)
            if not (beside or LEVEL[there] < LEVEL[here]):
                reaching.append(f"{path.relative_to(PACKAGE)} reaches up to {there}")
    assert reaching == []


def test_other_packages_are_those_of_the_layer():
    foreign = {}
    for path in FILES:
        names = set(outside(path)) - sys.stdlib_module_names
        if beyond := names - THIRD_PARTY[LEVEL[family(path)]]:
            foreign[str(path.relative_to(PACKAGE))] = beyond
    assert foreign == {}  # `clipjax` itself: imports inside the package are relative


def test_no_circles():
    graph = {name: set() for name in LEVEL}
    for path in FILES:
        graph[family(path)] |= set(inside(path)) - {family(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_ladder_sees_what_reaches_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "norms.py").write_text("import flax\nfrom . import contrib, masks\n")
    assert set(inside(tmp_path / "norms.py")) == {"contrib", "masks"}
    assert set(outside(tmp_path / "norms.py")) == {"flax"}
