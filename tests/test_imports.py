"""Imports run one way, search → supernet → space, and space is integers only; read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import poolshare.space

ROOT = Path(poolshare.space.__file__).parents[1]
ORDER = ("space", "supernet", "search")  # a folder may import itself and those before it
FORBIDDEN = {"space": {"torch", "optuna", "timm", "numpy"}, "supernet": {"optuna"}, "search": set()}
FILES = sorted(path for folder in ORDER for path in (ROOT / folder).glob("**/*.py"))


def imported(source: str, folder: str) -> set[str]:
    """Full names of all modules that a file of `folder` imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["poolshare", folder][: 3 - node.level] if node.level else []
            assert node.level <= 2, "imports stay inside poolshare"
            parts = [*package, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def violations(source: str, folder: str) -> set[str]:
    later = ORDER[ORDER.index(folder) + 1 :]
    return {
        name
        for name in imported(source, folder)
        if (name.startswith("poolshare.") and name.split(".")[1] in later)
        or name == "poolshare"
        or name.split(".")[0] in FORBIDDEN[folder] | set(ORDER)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_imports_backwards(path: Path):
    assert violations(path.read_text(encoding="utf-8"), path.parent.name) == set()


def test_the_files_of_all_three_folders_are_looked_at():
    assert {path.parent.name for path in FILES} == set(ORDER)
    assert {"search_space.py", "model.py", "cli.py"} <= {path.name for path in FILES}


def test_space_imports_the_standard_library_alone():
    for path in (ROOT / "space").glob("*.py"):
        for name in imported(path.read_text(encoding="utf-8"), "space"):
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
