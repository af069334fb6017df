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
from tltrain.runs.report.stats import accuracy_interval, f1_interval, gain_interval, sign_flips

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


def test_images_of_a_group_are_worth_less_than_as_many_that_stand_alone() -> None:
    """Two groups, one right and one wrong, are worth one image: nothing is known."""
    group_N = np.repeat([7, 3], 20)
    assert accuracy_interval(group_N == 7, group_N) == pytest.approx((0.5, 0.0, 1.0), abs=2e-3)
    assert accuracy_interval(group_N == 7)[1] > 0.3, "as if the 40 stood alone"
    assert accuracy_interval(np.ones(40, bool), group_N)[1:] == pytest.approx((0.3424, 1.0), abs=1e-4), "Wilson's of two"
    assert accuracy_interval(np.ones(40, bool), np.zeros(40))[1] < 0.01, "one group"
    assert gain_interval(group_N == 3, group_N == 7, group_N) == (0.0, -1.0, 1.0)
    assert gain_interval(group_N == 3, group_N == 3, group_N) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_the_interval_of_groups_holds_the_truth_as_often_as_it_says(alike: float) -> None:
    """Groups whose images are all right or all wrong, and groups whose images know nothing of each other."""
    rng, held, widths = np.random.default_rng(0), {"groups": 0, "images": 0}, []
    for _ in range(300):
        group_N = np.repeat(np.arange(20), rng.integers(2, 12, 20))
        by_group_N, alone_N = (rng.random(20) < 0.9)[group_N], rng.random(len(group_N)) < 0.9
        right_N = by_group_N if alike else alone_N
        for name, groups in (("groups", group_N), ("images", None)):
            _, low, high = accuracy_interval(right_N, groups)
            held[name] += low <= 0.9 <= high
            widths.append((name, high - low))
    assert held["groups"] >= 0.93 * 300
    assert (held["images"] < 0.6 * 300) == bool(alike), "Wilson's is right only for images that stand alone"
    if not alike:  # and little is lost where groups mean nothing
        mean = {name: np.mean([width for n, width in widths if n == name]) for name in held}
        assert mean["groups"] < 1.35 * mean["images"]


def test_f1_of_groups_draws_whole_groups_and_of_single_images_as_ever() -> None:
    rng = np.random.default_rng(1)
    label_N = rng.integers(0, 3, 90)
    predicted_N = np.where(rng.random(90) < 0.8, label_N, (label_N + 1) % 3)
    alone, single = f1_interval(label_N, predicted_N), f1_interval(label_N, predicted_N, group_N=np.arange(90))
    assert single.value == alone.value
    assert single[1:] == pytest.approx(alone[1:], abs=0.02)
    order = np.argsort(predicted_N == label_N, kind="stable")  # groups that are right or wrong together
    grouped = f1_interval(label_N[order], predicted_N[order], group_N=np.arange(90) // 9)
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)


def test_a_group_has_one_sign_in_the_test_of_a_difference() -> None:
    """Ten images of one group differ: by chance that comes as often as heads. Ten that stand alone: once in 512."""
    a_N, b_N = np.ones(12, bool), np.repeat([False, True], [10, 2])
    assert sign_flips(a_N, b_N)[:2] == (10, 0)
    assert sign_flips(a_N, b_N)[2] == pytest.approx(2 / 1024, abs=2e-3)
    assert sign_flips(a_N, b_N, group_N=np.repeat([0, 1, 2], [10, 1, 1])) == (10, 0, 1.0)


def test_groups_of_the_test_images_stand_on_every_page(tmp_path: Path) -> None:
    """36 of 40 images are right; the wrong ones are all of one patient of ten."""
    group_N, right_N = np.arange(40) // 4, np.arange(40) >= 4
    run = run_with(tmp_path / "run", right_N.tolist())
    with (run / "test_predictions.csv").open(newline="") as file:
        head, *rows = list(csv.reader(file))
    with (run / "test_predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*head, "group"], *([*row, g] for row, g in zip(rows, group_N.tolist(), strict=True))])
    _, low, high = accuracy_interval(right_N, group_N)
    test = json.loads((run / "test_metrics.json").read_text()) | {"groups": 10, "ends": [low, high]}
    (run / "test_metrics.json").write_text(json.dumps(test))
    record, text = read_run(run), f"{100 * low:.1f} to {100 * high:.1f}"
    assert low < 0.6 < accuracy_interval(right_N).low
    entries = [compared_run("run", record), compared_run("again", record)]
    pages = {"report": report(record), "comparison": comparison(entries, tmp_path / "x.html", "x", ""), "methods": paragraph(record)}
    for name, page in pages.items():
        assert text in page.replace("\xa0", " "), name
    assert "40 test images in 10 groups are right" in pages["report"]
    assert "worth" in pages["report"]
    assert "sign-flip test over groups of images" in pages["comparison"]
    assert "40 test images in 10 groups accuracy was" in pages["methods"]


def test_several_answers_of_an_image_are_drawn_together() -> None:
    """Of 4 images drawn again, the mean is below 0.25 in 5 of 256 cases (2.0 %) and 0.25 or below in 19 (7.4 %); it is 1 in 16 (6.3 %)."""
    assert accuracy_interval(np.array([1.0, 1.0, 0.5, 0.0]))[1:] == (0.25, 1.0)
