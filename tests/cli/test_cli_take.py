"""The whole way through the command: look, train, compare, predict, export."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from cli_words import mistake
from digit_files import digit_folder

from tltrain.cli.main import main

SMALL = [
    "--backbone.name", "vit-tiny", "--backbone.weights", "None", "--data.size", "32", "--data.resize", "None", "--workers", "0",
    "--stages.0.epochs", "None", "--stages.0.steps", "3", "--stages.1.epochs", "None", "--stages.1.steps", "3",
]  # fmt: skip


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    digit_folder(Path("images"))
    Path("images/test/notes.txt").write_text("no image")
    recipe = ["folder-resnet50", "--data.source", "folder:images", *SMALL, "--stages.1.unfreeze", "block.2"]
    assert main(["preview", *recipe, "--out", "seen.png", "--rows", "4"]) == 0
    assert Path("seen.png").stat().st_size > 1000
    for seed in ("0", "1"):
        assert main(["train", *recipe, "--seed", seed, "--folder", f"runs/{seed}"]) == 0
    assert (Path("runs/0") / "preview.png").exists()
    assert main(["compare", "runs/0", "runs/1", "--out", "c.html"]) == 0
    said = capsys.readouterr().out
    assert "seeds" in said
    assert "page    c.html" in said
    assert main(["predict", "runs/0", "images/test", "--csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 17
    assert [row["path"] for row in rows if row["problem"]] == ["images/test/notes.txt"]
    monkeypatch.setattr("sys.stdin", io.StringIO(rows[-1]["path"] + "\n"))
    assert main(["predict", "runs/0", "-", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["label"] == rows[-1]["label"]
    assert main(["predict", "runs/0", "images/test/notes.txt"]) == 1
    capsys.readouterr()
    assert main(["export", "runs/0", "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "logits  differ by" in said
    assert "export  runs/0/export/hf" in said
    env = json.loads(Path("runs/0/env.json").read_text())
    assert env["data"]["fingerprint"] in Path("runs/0/export/hf/README.md").read_text()
    assert json.loads(Path("runs/0/outcome.json").read_text())["peak_bytes"] > 1e6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "/no/run", "x.png"], "/no/run"),
        (["predict", "/no/run"], "PATH"),
        (["export", "/no/run", "--to", "hf"], "/no/run"),
        (["export", "/no/run"], "--to"),
        (["export", "/no/run", "--to", "tflite"], "tflite"),
        (["compare", "/no/run"], "two run folders"),
        (["compare", "/no/run", "/no/other"], "/no/run"),
        (["preview"], "needs a recipe"),
        (["preview", "digits-resnet", "--rows", "0"], "--rows is 0"),
    ],
)
def test_a_mistake_in_the_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in mistake(words, capsys)
