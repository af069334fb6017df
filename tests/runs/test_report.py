"""The pages of tltrain.runs.pages.write: read as a browser would, from run folders as a run writes them, whole and broken."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fake_run import fake_run, write_rows
from page_reader import Page, assert_self_contained

from tltrain.core.errors import UserError
from tltrain.runs.pages.write import read_rows, write_comparison, write_report

DIGITS = [str(i) for i in range(10)]


@pytest.mark.parametrize(("num_classes", "n"), [(2, 40), (10, 360), (20, 400), (100, 2000)])
def test_a_report_holds_every_part_and_loads_nothing(tmp_path: Path, num_classes: int, n: int) -> None:
    classes = [f"class {i}" for i in range(num_classes)]
    run = fake_run(tmp_path / "run", classes, n=n)
    out = write_report(run)
    assert out == run / "report.html"
    page = Page(out)
    assert_self_contained(page)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", out.read_text()).lower()
    for words in ("Loss", "Val accuracy, %", "Learning rate", "Confusion", "By class", "confident mistakes", "ECE", "The plan", "2.14.1"):
        assert words in page.text
    assert (run / "plan.txt").read_text() in page.text
    assert (run / "recipe.yaml").read_text() in page.text
    assert len(page.all("img")) == 24
    assert "0.png" in page.text, "the file of a mistake stands under it"
    assert "photos/" not in page.text, "without its folders, which its tooltip has"
    assert any("photos/of class 0/0.png" in figure.get("title", "") for figure in page.all("figure"))
    assert len(page.all("img", class_="coarse")) == 24
    matrix = json.loads((run / "test_metrics.json").read_text())["confusion"]
    titles = [a["title"] for a in page.all("td") if " taken for " in a.get("title", "")]
    heat = page.all("svg", class_="heat")
    if num_classes <= 30:
        assert not heat
        assert len(titles) == sum(1 for row in matrix for cell in row if cell)
        assert f"class 0 taken for class 0: {matrix[0][0]} of {sum(matrix[0])}" in titles
    else:
        cells = sum(a["d"].count("M") for a in page.all("path") if a["class"].startswith(("right", "wrong")))
        assert len(heat) == 1
        assert cells == sum(1 for row in matrix for cell in row if cell)


def test_the_verdict_says_share_number_interval_and_the_usual_mistake(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", ["cat", "dog", "eel"])
    test = json.loads((run / "test_metrics.json").read_text())
    test |= {"n": 100, "top1": 0.9, "confusion": [[30, 6, 0], [2, 30, 0], [1, 1, 30]]}
    (run / "test_metrics.json").write_text(json.dumps(test))
    said = Page(write_report(run)).text
    assert "90.0 % of 100 test images are right (95 % interval 82.6 to 94.5 %); most mistakes take cat for dog (6 of 10)." in said
    test["confusion"] = [[30, 4, 1], [3, 30, 0], [1, 1, 30]]
    (run / "test_metrics.json").write_text(json.dumps(test))
    assert "the most frequent mistake takes cat for dog (4 of 10)." in Page(write_report(run)).text
    test["confusion"] = [[30, 3, 1], [3, 30, 1], [1, 1, 30]]
    (run / "test_metrics.json").write_text(json.dumps(test))
    assert "no mistake stands out" in Page(write_report(run)).text
    test |= {"top1": 1.0, "confusion": [[30, 0, 0], [0, 30, 0], [0, 0, 40]]}
    (run / "test_metrics.json").write_text(json.dumps(test))
    assert "All of 100 test images are right (95 % interval 96.3 to 100.0 %)." in Page(write_report(run)).text


def test_an_accuracy_that_always_saying_one_class_has_too_is_called_nothing_learned(tmp_path: Path) -> None:
    """The lower end of the interval of 50 of 100 is 40.4 %: it is compared with the share of the most frequent class."""
    run = fake_run(tmp_path / "run", ["cat", "dog", "eel"])
    test = json.loads((run / "test_metrics.json").read_text())
    for cats, nothing in ((40, False), (41, True)):
        rest = 100 - cats - 29
        test |= {"n": 100, "top1": 0.5, "confusion": [[21, cats - 21, 0], [0, 29, 0], [rest, 0, 0]]}
        (run / "test_metrics.json").write_text(json.dumps(test))
        text = Page(write_report(run)).text
        assert ("This cannot be told from always saying cat, which is right for 41.0 %" in text) == nothing


def test_names_with_a_stroke_stand_whole_where_there_is_no_tree(tmp_path: Path) -> None:
    """A table's classes N/A and km/h are no leaves of N and km."""
    page = write_report(fake_run(tmp_path / "run", ["N/A", "and/or", "km/h"])).read_text()
    for name in ("N/A", "and/or", "km/h"):
        assert page.count(f'title="{name}">{name}</') >= 2, "in the matrix and by class"


NASTY = "<script>alert('1')</script> & \"x\""


def test_every_name_is_text_and_never_markup(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", [NASTY, "d\udcffg"], n=60)
    (run / "outcome.json").write_text(json.dumps({"outcome": "failed", "error": NASTY}))
    (run / "env.json").write_text(json.dumps({NASTY: [NASTY]}))
    (run / "plan.txt").write_text(NASTY)
    page = Page(write_report(run))
    assert_self_contained(page)
    assert page.text.count(NASTY) > 5
    assert "d\\xffg" in page.text
    assert any(NASTY in a.get("title", "") for a in page.all("td"))
    other = Page(write_comparison([run, run], tmp_path / "compare.html", NASTY, NASTY, [NASTY, "b"]))
    assert_self_contained(other)
    assert other.text.count(NASTY) > 3


def cut(run: Path, num_rows: int) -> list[dict[str, Any]]:
    """Make of a run one that ended after so many rows, before its test."""
    for name in ("test_metrics.json", "test_predictions.csv", "mistakes.json", "outcome.json"):
        (run / name).unlink()
    rows = read_rows(run)[:num_rows]
    write_rows(run / "metrics-000001.jsonl", rows)
    return rows


def test_a_failed_run_shows_why_and_how_far_it_came(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    rows = cut(run, 100)
    rows[-1]["loss"] = math.nan
    write_rows(run / "metrics-000001.jsonl", rows)
    (run / "outcome.json").write_text(json.dumps({"outcome": "failed", "error": "the loss is nan; lower lr", "rank": 0}))
    page = Page(write_report(run))
    last, best = rows[-1], [row for row in rows if row.get("best")][-1]
    assert f"The run failed after step {last['step']} of stage all. With the best weights so far {100 * best['top1']:.1f} %" in page.text
    assert "the loss is nan; lower lr" in page.text
    assert f"not finite at step {60 + last['step']}" in page.text
    assert "not ended" in page.text
    assert "of the stages that ended" in page.text


@pytest.mark.parametrize(
    ("num_rows", "outcome", "verdict"),
    [
        (0, None, "The run has not finished; nothing has been evaluated yet."),
        (0, "failed", "The run failed; nothing has been evaluated yet."),
        (1, "stopped", "The run was stopped after step 0 of stage head. With the best weights so far"),
        (30, "preempted", "The run was preempted after step 28 of stage head. With the best weights so far"),
        (30, None, "The run has come to step 28 of stage head. With the best weights so far"),
        (None, "finished", "There is no test split, and the weights were chosen on these images: expect a little less."),
    ],
)
def test_a_run_that_ended_early_still_has_a_readable_page(tmp_path: Path, num_rows: int | None, outcome: str | None, verdict: str) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    cut(run, 10_000 if num_rows is None else num_rows)
    if outcome:
        (run / "outcome.json").write_text(json.dumps({"outcome": outcome}))
    page = Page(write_report(run))
    assert_self_contained(page)
    assert verdict in page.text


def test_the_recipe_alone_makes_a_page_and_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    for path in run.iterdir():
        if path.name != "recipe.yaml":
            path.unlink()
    assert "nothing has been evaluated yet" in Page(write_report(run)).text
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        write_report(run)


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_run_without_rows_of_one_kind_leaves_out_their_curves(tmp_path: Path, kind: str) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    rows = [row for row in read_rows(run) if row["kind"] != kind]
    write_rows(run / "metrics-000001.jsonl", rows)
    page = Page(write_report(run))
    assert "90" in page.text
    assert ("Learning rate" in page.text) == (kind == "val")
    assert ("Val accuracy" in page.text) == (kind == "train")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    (run / "test_metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"test_metrics\.json is damaged"):
        write_report(run)


def test_steps_that_an_early_end_skipped_are_not_counted(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", DIGITS)
    rows = [row for row in read_rows(run) if not (row["stage_index"] == 0 and row["step"] > 40)]
    end = {**rows[-1], "stage": "head", "stage_index": 0, "step": 40, "run_step": 40, "reason": "early", "seconds": 8.0}
    at = next(i for i, row in enumerate(rows) if row["stage_index"] == 1)
    write_rows(run / "metrics-000001.jsonl", [*rows[:at], end, *rows[at:]])
    text = Page(write_report(run)).text
    assert f"{180 * 64:,}" in text
    assert "180 steps of 64" in text
    assert "29 s" in text  # the second stage: 37 s of the run less the first's 8 s


def test_many_classes_are_listed_worst_first(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", [f"c{i:03}" for i in range(40)], n=2000)
    rows = json.loads((run / "test_metrics.json").read_text())["per_class"]
    lowest = min(rows, key=lambda r: r["f1"])["name"]
    by_class = Page(write_report(run)).text.split("By class")[1]
    assert re.findall(r"c\d{3}", by_class)[0] == lowest


def test_a_comparison_names_the_best_and_links_each_report(tmp_path: Path) -> None:
    arms = [("scratch", 0.5), ("stages", 0.9)]
    runs = [fake_run(tmp_path / name, DIGITS, skill=skill, lr=0.01 * skill, seed=i) for i, (name, skill) in enumerate(arms)]
    write_report(runs[1])
    page = Page(write_comparison(runs, tmp_path / "pages" / "compare.html", "Digits", "Few labels", names=["From scratch", "In stages"]))
    assert_self_contained(page)
    tops = [json.loads((run / "test_metrics.json").read_text())["top1"] for run in runs]
    said = f"In stages gets the most test images right: {100 * tops[1]:.1f} % of 360, against {100 * tops[0]:.1f} % for From scratch"
    assert said + "; more than luck explains." in page.text
    assert [a["href"] for a in page.all("a")] == ["../stages/report.html"]
    texts = [(run / "test_predictions.csv").read_text().splitlines() for run in runs]
    right = [[r["label"] == r["predicted"] for r in csv.DictReader(text)] for text in texts]
    only = sum(stages and not scratch for scratch, stages in zip(*right, strict=True))
    assert f"In stages alone is right on {only}," in page.text
    assert "12,800" in page.text


def test_a_comparison_says_when_a_difference_may_be_luck_or_there_is_none(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, DIGITS, seed=i, n=100, lr=0.01 + 0.01 * i) for i, name in enumerate("ab")]
    tests = [json.loads((run / "test_metrics.json").read_text()) for run in runs]
    assert tests[0]["top1"] != tests[1]["top1"]
    assert "the difference may be luck." in Page(write_comparison(runs, tmp_path / "c.html", "t")).text
    for run in runs:
        (run / "test_predictions.csv").unlink()
    assert "Their 95 % intervals overlap." in Page(write_comparison(runs, tmp_path / "c.html", "t")).text
    assert "get the same share" in Page(write_comparison([runs[0], runs[0]], tmp_path / "c.html", "t")).text
    cut_run = fake_run(tmp_path / "cut", DIGITS)
    (cut_run / "test_metrics.json").unlink()
    assert "a: " in Page(write_comparison([cut_run, runs[0]], tmp_path / "c.html", "t")).text
    assert "No run has been tested yet." in Page(write_comparison([cut_run], tmp_path / "c.html", "t")).text


def test_a_plans_table_keeps_its_columns_and_each_note_is_an_entry_of_its_own(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", ["a", "b"])
    table = (run / "plan.txt").read_text().strip()
    (run / "plan.txt").write_text(f"{table}\n\ndata    360 images <b>\ntime    about 9 s\n        on this machine\n")
    text = write_report(run).read_text(encoding="utf-8")
    assert f'<pre class="plan">{table}</pre>' in text
    assert "<span>data    360 images &lt;b&gt;</span><span>time    about 9 s on this machine</span></pre>" in text
