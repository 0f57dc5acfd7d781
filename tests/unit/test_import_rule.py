"""Who may import whom inside src/gossamer, and what a start of the command line must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "gossamer"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"errors"},
    "kernels": set(),
    "formats": {"kernels"},
    "model": {"kernels"},
    "checkpoint": {"model", "formats"},
    "compress": {"model", "formats", "checkpoint"},
    "parallel": {"formats", "model"},
    "engine": {"checkpoint", "model", "parallel", "formats", "kernels"},
    "cluster": set(),
    "serve": {"engine", "checkpoint", "cluster"},
    "export": {"formats", "checkpoint", "model"},
    "measure": {"engine", "checkpoint", "model"},
    "search": {"compress", "measure", "cluster"},
    "simulate": {"engine", "measure"},
    "report": set(),
    "__init__": {"checkpoint", "engine"},
    "__main__": {"cli"},
}
"""Folder or top-level module -> what it may import besides itself, errors and settings. `cli` may import anything."""

EVERYWHERE = {"errors", "settings"}
HEAVY = {"torch", "transformers", "plotly", "jinja2", "gguf", "rich", "numpy", "compressed_tensors", "ray"}


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every gossamer module that a source imports, anywhere in it.

    `package` is the dotted package that relative imports start from. Imports in functions and under TYPE_CHECKING
    count, and so do import_module and __import__ with a constant name.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                stem = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{stem}.{base}" if base else stem
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [dynamic] if (dynamic := dynamic_import(node)) else []
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "gossamer")


def dynamic_import(call: ast.Call) -> str | None:
    """The constant name that an import_module or __import__ call asks for."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if name in {"import_module", "__import__"} and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What this module (dotted name) imports against the rule, one line each."""
    parts = module.split(".")
    folder = parts[1] if len(parts) > 1 else "__init__"
    if folder == "cli":
        return []
    found = []
    for line, name in imported(source, module if is_package else ".".join(parts[:-1])):
        target = f"{name}.".split(".")[1]
        if target in ALLOWED or target == "cli":
            if target not in ALLOWED[folder] | EVERYWHERE | {folder}:
                found.append(f"{module}:{line} imports {name}: {folder} may not import {target}")
        elif target != "__version__":
            found.append(f"{module}:{line} imports {name}: gossamer.{target} is not in the table")
    return found


def modules() -> list[tuple[str, Path]]:
    """Dotted name and path of every module in the package."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        dotted = ".".join(("gossamer", *path.relative_to(SOURCE).with_suffix("").parts))
        found.append((dotted, path))
    return found


def test_every_module_imports_only_what_the_table_allows() -> None:
    found = []
    for dotted, path in modules():
        package = path.name == "__init__.py"
        name = dotted.removesuffix(".__init__") if package else dotted
        found += violations(path.read_text(), name, package)
    assert not found, "\n".join(found)


def test_every_folder_of_the_package_is_in_the_table() -> None:
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders - {"cli"} <= set(ALLOWED)
    assert {"kernels", "formats", "model"} <= folders


def test_nothing_but_cli_may_import_serve_report_or_cli() -> None:
    for folder, targets in ALLOWED.items():
        if folder != "__main__":
            assert not targets & {"serve", "report", "cli"}


@pytest.mark.parametrize(
    "source",
    [
        "from ..compress import pipeline",
        "from .. import compress",
        "import gossamer.compress.recipe",
        "from gossamer import compress",
        "def f():\n    from ..compress.recipe import Recipe",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..compress import Recipe",
        "import importlib\nimportlib.import_module('gossamer.compress')",
        "from ..cli import main",
        "from ..unheard_of import thing",
    ],
)
def test_checker_catches_a_forbidden_import(source: str) -> None:
    assert len(violations(source, "gossamer.engine.runner")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from ..errors import EngineError",
        "from .. import __version__, settings",
        "from .sequence import Sequence",
        "from ..checkpoint import Checkpoint",
        "import torch\nfrom collections import abc",
    ],
)
def test_checker_lets_an_allowed_import_pass(source: str) -> None:
    assert violations(source, "gossamer.engine.runner") == []


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert violations("from ..compress import x", "gossamer.engine", is_package=True) != []
    assert violations("from .sequence import x", "gossamer.engine", is_package=True) == []
    assert violations("from ...compress import x", "gossamer.engine.speculative", is_package=True) != []


@pytest.mark.parametrize("statement", ["import gossamer", "import gossamer.cli", "import gossamer.kernels"])
def test_import_loads_no_heavy_library(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_help_loads_no_heavy_library() -> None:
    assert loaded_by("import gossamer.cli\nassert gossamer.cli.main(['--help']) == 0") == set()


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after running this."""
    report = f"\nimport sys\nprint('\\nLOADED', *sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])
