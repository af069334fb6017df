"""Every command in the README, and in the recipes' headers, is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.words import parse, split
from tltrain import options
from tltrain.cli import VERBS, main
from tltrain.recipe import shipped

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
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
def test_a_command_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    if verb in ("train", "plan"):
        recipe, _ = options.parse(verb, rest)
        assert recipe.stages
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
    text = capsys.readouterr().out
    assert all(word.split("=")[0] in text for word in rest if word.startswith("--"))


def test_every_file_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
