"""Every command in the README, in docs/ and in the recipes' headers is one that the program takes; every link leads somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import tltrain
from launcher.command import parse, split
from tltrain.cli.main import VERBS, main
from tltrain.core.arguments import parsing
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe, load, shipped

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)]
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    files = [*shipped().values(), *(ROOT / "accelerate_configs").glob("*.yaml")]
    headers = [line[4:] for path in files for line in path.read_text().splitlines() if line.startswith("#   ")]
    parts = [part.strip() for line in lines + headers for part in line.split("&&")]
    found = [line for line in parts if re.match(r"(tltrain|accelerate launch|python -m benchmarks)\b", line)]
    return list(dict.fromkeys(found))


def test_the_readme_has_commands() -> None:
    assert len(commands()) > 10
    assert "pip install -e . && tltrain demo" in README
    assert "pip install -e '.[dev]' && pytest" in README


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        config = words[words.index("--config_file") + 1]
        assert (ROOT / config).is_file()
        assert words[words.index("-m") + 1] == "tltrain"
        words = words[words.index("-m") + 1 :]
    if words[0] == "python":
        module = words[2].split(".")
        assert (ROOT / Path(*module)).with_suffix(".py").is_file() or (ROOT / Path(*module) / "__main__.py").is_file()
        return
    verb, rest = words[1], words[2:]
    assert verb in VERBS
    if verb in ("train", "plan") and "--help" not in rest:
        recipe, _ = parsing.parse(verb, rest)
        assert recipe.stages
        usual = load(rest[0]).backbone.name if rest[0] in shipped() else None
        if recipe.backbone.name != usual and ":" in (recipe.backbone.name or ":"):  # another library's network has other blocks
            assert {stage.unfreeze for stage in recipe.stages} <= {"head", "all", "auto"}
        return
    if verb == "launch":
        own, trainings = split(rest) if "--" in rest else (rest, [])
        assert own[0] in ("local", "slurm", "status", "cancel")
        for training in trainings:
            assert parse(training).recipe.stages
        with pytest.raises(SystemExit):
            main(["launch", own[0], "--help"])
        text = capsys.readouterr().out
        assert all(word.split("=")[0] in text for word in own if word.startswith("--"))
        return
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    rest = rest[: rest.index("--slurm") if "--slurm" in rest else None]  # behind it stand options of launch slurm
    text = capsys.readouterr().out
    assert all(word.split("=")[0] in text for word in rest if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files, pictures, and headings within them."""
    text = page.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]:
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not heading or heading in _anchors(file), target


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_found() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, f"{page.name} is linked from nowhere a reader begins"


def test_commands_within_the_text_parse_too() -> None:
    """`python -m benchmarks.NAME` in a sentence or a table names a command that is there."""
    for page in PAGES:
        for name in re.findall(r"`python -m benchmarks\.(\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), f"{page.name}: {name}"


def test_the_readme_is_read_to_its_end() -> None:
    assert len(README.splitlines()) <= 150


def test_python_in_the_pages_calls_what_there_is() -> None:
    """Every `tltrain.NAME(...)` in docs/python.md and the README: the name is public, and takes these arguments."""
    blocks = [
        block
        for name in ("README.md", "docs/python.md")
        for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    ]
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    ours = [c for c in calls if isinstance(c.func, ast.Attribute) and isinstance(c.func.value, ast.Name) and c.func.value.id == "tltrain"]
    assert len(ours) >= 7
    more = {field.name for field in fields(RunFlags)} | set(Recipe.model_fields)
    for call in ours:
        function = getattr(tltrain, call.func.attr)  # type: ignore[attr-defined]
        taken = set(inspect.signature(function).parameters) | (more if function is tltrain.train else set())
        assert {keyword.arg for keyword in call.keywords if keyword.arg} <= taken, ast.unparse(call)
