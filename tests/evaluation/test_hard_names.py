"""Classes and run folders of any name, from the run to what leaves the house: exports, cards, the comparison, predictions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pytest
from conftest import slow
from digit_files import digit_image, run_with_weights
from fake_run import fake_run
from hard_strings import HARD
from markdown_it import MarkdownIt

from tltrain.cli import main
from tltrain.core.output import escape
from tltrain.core.recipe import Recipe
from tltrain.evaluation.exporters import export
from tltrain.runs.record import prediction_rows

Made = Callable[..., Recipe]
CLASSES = tuple(name for name in HARD if name and "\udcff" not in name)  # the scan refuses what no file can hold
NETS: dict[str, dict[str, Any]] = {
    "hf": {"backbone": {"name": "vit-tiny"}, "data": {"size": 32, "resize": 32}},
    "timm": {"backbone": {"name": "timm:test_vit"}, "data": {"size": 32, "resize": 36}},
    "torchvision": {"backbone": {"name": "resnet18"}, "data": {"size": 32, "resize": 32}},
    "torch-export": {"data": {"size": 32, "resize": 32}},
    "onnx": {"data": {"size": 32, "resize": 32}},
}
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
FOLDERS = tuple(name for name in HARD if name.strip() and "/" not in name and "\0" not in name)


@pytest.mark.parametrize("to", ["hf", slow("timm"), slow("torchvision"), slow("torch-export"), "onnx"])
def test_an_export_holds_every_name_and_its_card_shows_them(to: str, made_recipe: Made, tmp_path: Path) -> None:
    for package in {"onnx": ("onnxruntime", "onnxscript"), "timm": ("timm",)}.get(to, ()):
        pytest.importorskip(package)
    run = run_with_weights(tmp_path / "run", made_recipe(**NETS[to], purpose="# <b>x</b>\n| a | [y](javascript:z)"), CLASSES)
    digit_image(0).save(tmp_path / "x.png")
    folder = export(run, to, images=[tmp_path / "x.png"]).folder
    assert _classes_of(to, folder) == list(CLASSES)
    card = (folder / "README.md").read_text(encoding="utf-8").partition("# ")[2]
    assert STEERING.search(card) is None
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse("# " + card)
    inside = [child for token in tokens for child in token.children or ()]
    assert not {"html_block", "html_inline", "link_open", "image"} & {token.type for token in (*tokens, *inside)}
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["How to use", "Data", "How good it is", "Limits", "Classes", "Recipe"], "no name begins a part of its own"
    named = next(tokens[i + 4] for i, token in enumerate(tokens) if token.type == "heading_open" and tokens[i + 1].content == "Classes")
    shown = "".join(child.content for child in named.children or ())
    assert all(escape.line(name).strip() in shown for name in CLASSES)


def _classes_of(to: str, folder: Path) -> list[str]:
    """The names as the other side's own tool reads them."""
    if to == "hf":
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        assert {name: i for i, name in config.id2label.items()} == config.label2id
        return [config.id2label[i] for i in range(len(config.id2label))]
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return list(json.loads(session.get_modelmeta().custom_metadata_map["classes"]))
    if to == "torch-export":
        import torch

        extra = {"classes.json": ""}
        torch.export.load(folder / "model.pt2", extra_files=extra)
        return list(json.loads(extra["classes.json"]))
    file, key = ("config.json", "label_names") if to == "timm" else ("model.json", "classes")
    return list(json.loads((folder / file).read_text(encoding="utf-8"))[key])


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_runs_in_folders_of_any_name_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [fake_run(tmp_path / name, ["cat", "dog"], n=20, seed=i) for i, name in enumerate(FOLDERS)]
    for run in runs:
        (run / "report.html").write_text(run.name, encoding="utf-8", errors="surrogateescape")
    assert main.main(["compare", *map(str, runs), "--out", str(tmp_path / "out\x1b[31m.html"), "--title", "<b>\u202e"]) == 0
    printed = capsys.readouterr().out
    assert STEERING.search(printed) is None
    assert "out\\x1b[31m.html" in printed
    text = (tmp_path / "out\x1b[31m.html").read_text(encoding="utf-8")
    assert STEERING.search(text) is None
    page = _Page(text)
    links = [link for link in page.links if "report.html" in link]
    reached = []
    for link in links:
        parts = urlsplit(link)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        target = tmp_path.joinpath(unquote_to_bytes(parts.path).decode("utf-8", "surrogateescape"))
        reached.append(target.read_bytes().decode("utf-8", "surrogateescape"))
    assert sorted(reached) == sorted(FOLDERS), "each link leads to the report of one run"
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    assert {escape.terminal(name) for name in FOLDERS} <= set(page.said)


def test_the_report_and_the_tables_of_a_run_hold_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "=cmd\u202e\x1b[31m", CLASSES, n=20 * len(CLASSES))
    with (run / "test_predictions.csv").open(newline="", encoding="utf-8") as file:
        plain = list(csv.reader(file))
    with (run / "test_predictions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[escape.csv_cell(cell) for cell in row] for row in plain])
    assert {row["label"] for row in prediction_rows(run)} == set(CLASSES)
    assert main.main(["report", str(run)]) == 0
    assert STEERING.search(capsys.readouterr().out) is None
    text = (run / "report.html").read_text(encoding="utf-8")
    assert STEERING.search(text) is None
    page = _Page(text)
    assert {escape.terminal(name) for name in CLASSES} <= set(page.said)
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}


def test_a_table_of_predictions_steers_no_terminal_and_loses_nothing_in_a_file() -> None:
    from tltrain.commands.predict import Columns, write_csv
    from tltrain.evaluation.predict import Prediction

    class OnTerminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    rows = [Prediction(name, ((name, 1.0),), None) for name in HARD]
    shown, kept = OnTerminal(), io.StringIO()
    write_csv(rows, shown, Columns(1))
    write_csv(rows, kept, Columns(1))
    assert STEERING.search(shown.getvalue()) is None
    read = csv.DictReader(io.StringIO(kept.getvalue(), newline=""))
    assert [escape.from_csv(row["label"]) for row in read] == list(HARD)
