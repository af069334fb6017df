"""The house rules that a program can read: rooms import only from rooms above them, none goes round in a circle, none is too large."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tltrain"

# From the ground up: a room imports only from rooms that stand before it here; files of one room import each other.
ROOMS = (
    "core/host", "core/output", "core/schema", "core", "core/arguments",
    "data/multilabel", "data/tables", "data/pictures", "data/augmentation", "data", "data/corruptions", "data/scans", "data/remote",
    "data/sources", "data/containers", "data/published", "data/unlabelled",
    "heads", "uncertainty",
    "runs", "runs/trackers", "runs/report", "runs/listing", "runs/pages",
    "models/weight_files", "models", "models/tracing", "models/timm", "models/transformers", "models/families",
    "distributed", "distributed/strategies",
    "cache",
    "planning",
    "evaluation/multilabel", "evaluation", "runs/folds", "evaluation/promises", "evaluation/robustness", "evaluation/exporters",
    "training/losses", "training/weights", "training/matching", "training/depths", "training", "many",
    "analysis", "analysis/probe", "analysis/doctor", "fitting", "distilling",
    "api", "commands", "cli", "__main__",
)  # fmt: skip
STRANGERS = {("data", "runs"), ("runs", "data")}
"""Rooms that do not know each other, wherever they stand."""
MOST_FILES = 9
FREE_OF_TORCH = ("core/host", "core/output", "core/schema", "core", "core/arguments")

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "launcher").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "sklearn", "wandb", "matplotlib"}


def test_rooms_import_only_from_rooms_above_them() -> None:
    wrong = []
    for path in MODULES:
        mine = _room(_name(path))
        if mine == "":
            continue  # the door of the package names what stands behind it, and imports it when it is asked for
        for line, module in _imports(path):
            theirs = _room(module)
            if theirs not in ("", mine) and (ROOMS.index(theirs) > ROOMS.index(mine) or (_floor(mine), _floor(theirs)) in STRANGERS):
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({mine}) imports {module} ({theirs})")
    assert not wrong, "\n".join(wrong)


def test_the_picture_of_the_rooms_shows_them_all() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.partition("## The rooms")[2].split("```")[1]
    assert tuple(line.split()[0] for line in picture.strip().splitlines()) == tuple(room for room in ROOMS if room != "__main__")
    run = text.partition("## One run")[2].split("```")[1]
    assert all((PACKAGE / f"{line.split()[0]}.py").is_file() for line in run.strip().splitlines())


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {_name(path) for path in MODULES} - {"tltrain"}  # the package's own door imports what is asked for
    arrows = {_name(path): {module for _, module in _imports(path) if module in names} - {_name(path)} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "a circle: " + " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


@pytest.mark.parametrize("module", FREE_OF_TORCH)
def test_the_ground_floor_needs_no_torch(module: str) -> None:
    heavy = {
        (path.name, name)
        for path in (PACKAGE / module).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] in HEAVY
    }
    assert heavy == set()


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES if path.parts[-2] != "benchmarks"}), ids=lambda p: p.name)
def test_a_room_is_seen_at_a_glance(folder: Path) -> None:
    doors = ("batch.py", "node.py") if folder == ROOT / "launcher" else ()  # old names, which job scripts in old run folders call
    files = [path.name for path in folder.glob("*.py") if not path.name.startswith("__") and path.name not in doors]
    assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files; make two rooms of it: {sorted(files)}"
    if folder == PACKAGE:
        assert not files, "every module stands in a room"


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    source = """
import tltrain.training.loop as e
from tltrain.core import recipe as recipes
from tltrain import __version__
from tltrain.data.views import Views
import torch
def verb():
    from tltrain.training.run import run
"""
    (tmp_path / "x.py").write_text(source, encoding="utf-8")
    found = [module for _, module in _imports(tmp_path / "x.py")]
    assert found == ["tltrain.training.loop", "tltrain.core.recipe", "tltrain", "tltrain.data.views", "tltrain.training.run"]
    assert [_room(module) for module in found] == ["training", "core", "", "data", "training"]


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


def _name(path: Path) -> str:
    """tltrain.data.views of a file; of a folder's __init__ the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The room that a module stands in; "" for the package's own door."""
    parts = module.split(".")[1:]
    for n in range(len(parts), 0, -1):
        if (room := "/".join(parts[:n])) in ROOMS:
            return room
    assert not parts, f"{module} stands in no room; give its folder a place in ROOMS"
    return ""


def _floor(room: str) -> str:
    return room.split("/")[0]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ours, those inside functions included. Ours are absolute: a relative one fails."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "tltrain")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            for alias in node.names if (node.module or "").split(".")[0] == "tltrain" else ():
                yield node.lineno, f"{node.module}.{alias.name}" if _is_module(f"{node.module}.{alias.name}") else str(node.module)


def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()
