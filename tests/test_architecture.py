"""The house rules that a program can read: imports go only downwards, files and functions stay small, words are read without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tltrain"

# Rows from the bottom up: a module imports only from lower rows, files of one folder import each other freely.
ROWS = {
    "__init__": -3, "errors": -3, "files": -3, "escape": -3, "streams": -2, "registry": -2, "named": -1,
    "recipe": 0, "shards": 0,
    "blocks": 1, "data": 1, "losses": 1, "runtime": 1, "tracking": 1, "options": 1, "console": 1, "batchnorm": 1, "watch": 1,
    "calibration": 1, "metrics": 1, "out_of_memory": 1,
    "backbones": 2, "stages": 2, "folder": 2, "pages": 2, "spread": 2, "trackers": 2,
    "store": 3, "checkpoint": 3, "plan": 3, "report": 3, "inference": 3, "guard": 3, "trained": 3,
    "engine": 4, "outputs": 4, "thrift": 4, "predict": 4, "preview": 4, "compare": 4,
    "survey": 5, "predicted": 5,
    "view_device": 6, "compiling": 6,
    "setup": 7,
    "storing": 8, "smaller": 8,
    "staging": 9,
    "run": 10, "evaluate": 10, "export": 10, "doctor": 10,
    "demo": 11, "api": 11, "stored": 11,
    "cli": 12,
    "__main__": 13,
}  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "launcher").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "sklearn", "wandb", "matplotlib"}


def test_imports_go_only_downwards() -> None:
    wrong = []
    for path in MODULES:
        mine = _part(path)
        if mine == "__init__":
            continue  # the door of the package names what stands behind it, and imports it when it is asked for
        for line, theirs in _imports(path):
            if theirs != mine and _row(theirs) >= _row(mine):
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({mine}, row {_row(mine)}) imports {theirs} (row {_row(theirs)})")
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    source = """
import tltrain.training.loop as e
from tltrain.core import recipe as recipes, __version__
from tltrain.data.views import Views
from . import blocks
from .losses import kd
import torch
def verb():
    from tltrain.training.run import run
"""
    (tmp_path / "x.py").write_text(source, encoding="utf-8")
    found = [part for _, part in _imports(tmp_path / "x.py", package=())]
    assert found == ["engine", "recipe", "__init__", "data", "blocks", "losses", "run"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300, "a file holds one idea, in fewer than 300 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines < 50, f"{node.name} has {num_lines} lines; a function has fewer than 50"


@pytest.mark.parametrize("module", ["tltrain", "tltrain.core.errors", "tltrain.core.recipe", "tltrain.core.flags", "tltrain.cli.main"])
def test_the_words_of_a_command_are_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def _row(part: str) -> int:
    assert part in ROWS, f"tltrain/{part} stands in no row; give it one here and in the table of the design"
    return ROWS[part]


def _part(path: Path) -> str:
    """The module or folder right under tltrain/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path: Path, package: tuple[str, ...] | None = None) -> Iterator[tuple[int, str]]:
    """(line, module or folder under tltrain/) of every import of ours, those inside functions included."""
    if package is None:
        package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["tltrain", *package[: len(package) + 1 - node.level], *base]
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for module in modules:
            if module[0] == "tltrain":
                part = module[1] if len(module) > 1 else "__init__"
                known = part in ROWS or (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
                yield node.lineno, part if known else "__init__"
