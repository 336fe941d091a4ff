"""Imports run one way, search → supernet → space, and space is integers only; read from the syntax trees."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import poolshare.space

ROOT = Path(poolshare.space.__file__).parents[1]
ORDER = ("space", "supernet", "search")  # a folder may import itself and those before it
FORBIDDEN = {"space": {"torch", "optuna", "timm", "numpy"}, "supernet": {"optuna"}, "search": set()}
FILES = sorted(path for folder in ORDER for path in (ROOT / folder).glob("**/*.py"))


def imported(source: str, package: str, types_too: bool = True) -> set[str]:
    """Full names of all that a module of `package` ("search.job") imports, anywhere in it.

    types_too: also what is imported for annotations alone.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    if not types_too:
        tree.body = [
            one for one in tree.body if not (isinstance(one, ast.If) and "TYPE_CHECKING" in ast.unparse(one.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = ["poolshare", *package.split(".")]
            assert node.level <= len(here), "imports stay inside poolshare"
            start = here[: len(here) + 1 - node.level] if node.level else []
            parts = [*start, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def package_of(path: Path) -> str:
    """ "search.job" for search/job/folder.py, and for search/job/__init__.py."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def violations(source: str, package: str) -> set[str]:
    folder = package.split(".")[0]
    later = ORDER[ORDER.index(folder) + 1 :]
    return {
        name
        for name in imported(source, package)
        if (name.startswith("poolshare.") and name.split(".")[1] in later)
        or name == "poolshare"
        or name.split(".")[0] in FORBIDDEN[folder] | set(ORDER)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_backwards(path: Path):
    assert violations(path.read_text(encoding="utf-8"), package_of(path)) == set()


def test_the_files_of_all_three_folders_are_looked_at():
    assert {package_of(path).split(".")[0] for path in FILES} == set(ORDER)
    assert {"search_space.py", "model.py", "folder.py"} <= {path.name for path in FILES}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    names = {path: ".".join(["poolshare", package_of(path), path.stem]).removesuffix(".__init__") for path in FILES}
    return {name: path for path, name in names.items()}


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {}
    for name, path in known.items():
        if path.name == "__init__.py":  # they hand on what their modules hold
            continue
        wanted = imported(path.read_text(encoding="utf-8"), package_of(path), types_too=False)
        found = {one if one in known else one.rpartition(".")[0] for one in wanted} & set(known)
        graph[name] = {one for one in found if known[one].name != "__init__.py"}
    for _ in known:  # what imports nothing that is left cannot be part of a cycle
        graph = {name: left for name, wanted in graph.items() if (left := wanted & set(graph))}
    assert graph == {}


def test_no_folder_holds_more_modules_than_one_keeps_in_mind():
    folders = {path.parent for path in FILES}
    sizes = {str(one.relative_to(ROOT)): len([*one.glob("*.py")]) for one in folders}
    assert {name: size for name, size in sizes.items() if size > 15} == {}  # 14 and __init__.py


def test_space_imports_the_standard_library_alone():
    for path in (ROOT / "space").glob("*.py"):
        for name in imported(path.read_text(encoding="utf-8"), package_of(path)):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or name.startswith("poolshare.space."), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("space", "import torch"),
        ("space", "def f():\n    from torch import nn"),
        ("space", "import os, optuna.samplers"),
        ("space", "from poolshare.supernet import SuperNet"),
        ("space", "from poolshare import supernet"),
        ("space", "from .. import search"),
        ("space", "from ..search import cli"),
        ("space", "if TYPE_CHECKING:\n    from poolshare.supernet.model import SuperNet"),
        ("space", "importlib.import_module('poolshare.search')"),
        ("supernet", "import poolshare.search.cli as cli"),
        ("supernet", "from ..search.study import run"),
        ("supernet", "import optuna"),
        ("supernet", "import poolshare"),
        ("supernet", "from search import cli"),
    ],
)
def test_an_import_backwards_would_be_seen(folder: str, source: str):
    assert violations(source, folder)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("space", "from .cost import CostTable\nimport random"),
        ("supernet", "import torch\nfrom poolshare.space import SearchSpace\nfrom .block import run_block"),
        ("search", "import optuna\nfrom poolshare.supernet import SuperNet\nfrom . import report"),
    ],
)
def test_an_import_forwards_is_free(folder: str, source: str):
    assert violations(source, folder) == set()


def test_importing_space_loads_neither_torch_nor_any_other_package():
    program = (
        "import sys; before = set(sys.modules); import poolshare.space, poolshare.space.presets;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "poolshare" in loaded
    assert loaded - {"poolshare"} <= set(sys.stdlib_module_names)
    assert done.stderr == ""


def test_scripts_of_results_import_what_there_is():
    missing = []
    for path in sorted((Path(__file__).parents[1] / "results").glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("poolshare"):
                module = importlib.import_module(str(node.module))
                inside = {one.name for one in pkgutil.iter_modules(getattr(module, "__path__", ()))}
                names = {alias.name for alias in node.names} - inside
                missing += [f"{path.name}: {node.module}.{name}" for name in names if not hasattr(module, name)]
    assert not missing
