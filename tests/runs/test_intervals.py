"""One figure has one interval, wherever it stands."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fake_run import fake_run
from rich.console import Console

from tltrain.commands.compare import rendered
from tltrain.runs.pages.compare_page import comparison
from tltrain.runs.pages.comparison import compared_run
from tltrain.runs.pages.methods import paragraph
from tltrain.runs.pages.run_page import report
from tltrain.runs.record import read_run
from tltrain.runs.report.stats import accuracy_interval, f1_interval, gain_interval

CLASSES = ["ant", "bee", "cat"]


def run_with(folder: Path, right_N: list[bool]) -> Path:
    run = fake_run(folder, CLASSES)
    labels = [CLASSES[i % 3] for i in range(len(right_N))]
    said = [label if right else CLASSES[(CLASSES.index(label) + 1) % 3] for label, right in zip(labels, right_N, strict=True)]
    with (run / "test_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", "confidence"])
        writer.writerows([f"{i}.png", a, b, 0.9] for i, (a, b) in enumerate(zip(labels, said, strict=True)))
    test = json.loads((run / "test_metrics.json").read_text())
    test |= {"n": len(right_N), "top1": float(np.mean(right_N))}
    (run / "test_metrics.json").write_text(json.dumps(test))
    return run


def test_report_comparison_terminal_and_methods_give_one_interval(tmp_path: Path) -> None:
    """40 of 50: Wilson's interval is 67.0 to 88.8 %; the bootstrap's would be another."""
    run = run_with(tmp_path / "run", [i % 5 > 0 for i in range(50)])
    record = read_run(run)
    entry = compared_run("run", record)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(rendered([entry, compared_run("again", record)]))
    texts = {
        "report": report(record),
        "comparison": comparison([entry], tmp_path / "x.html", "x", ""),
        "terminal": console.export_text(),
        "methods": paragraph(record),
    }
    for name, text in texts.items():
        assert "67.0 to 88.8" in text.replace("\xa0", " "), name
    f1 = f"{100 * entry.f1.low:.1f} to {100 * entry.f1.high:.1f}" if entry.f1 else ""
    for name in ("report", "comparison"):
        assert re.search(f1, texts[name].replace("\xa0", " ")), (name, f1)


def test_shares_of_images_that_stand_alone_have_wilsons_interval() -> None:
    assert accuracy_interval(np.arange(10) < 8) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert accuracy_interval(np.ones(10, bool))[1:] == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert f1_interval(np.arange(10) % 2, np.arange(10) % 2)[1:] == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_images_of_a_group_are_drawn_together() -> None:
    """Two groups, one right and one wrong: of two drawn again, both are the wrong one in a quarter of the cases."""
    group_N = np.repeat([7, 3], 20)
    assert accuracy_interval(group_N == 7, group_N) == (0.5, 0.0, 1.0)
    assert accuracy_interval(group_N == 7)[1] > 0.3, "as if the 40 stood alone"
    assert gain_interval(group_N == 3, group_N == 7, group_N) == (0.0, -1.0, 1.0)
    assert gain_interval(group_N == 3, group_N == 3, group_N) == (0.0, 0.0, 0.0)


def test_several_answers_of_an_image_are_drawn_together() -> None:
    """Of 4 images drawn again, the mean is below 0.25 in 5 of 256 cases (2.0 %) and 0.25 or below in 19 (7.4 %); it is 1 in 16 (6.3 %)."""
    assert accuracy_interval(np.array([1.0, 1.0, 0.5, 0.0]))[1:] == (0.25, 1.0)
