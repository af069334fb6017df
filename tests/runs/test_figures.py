"""Figures and tables of a run as files."""

from __future__ import annotations

import csv
import html
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import fake_run

from tltrain.cli.main import main
from tltrain.runs.pages.figures import drawn, saved, tables, write_figures
from tltrain.runs.record import read_run


def test_every_figure_is_there_twice_and_every_table_has_the_runs_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run", ["=cat", "do$g$", "eel"])
    assert main(["report", str(run), "--figures", str(tmp_path / "figures")]) == 0
    assert str(tmp_path / "figures") in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    figures = {f"{name}.{form}" for name in ("loss", "accuracy", "confusion", "calibration") for form in ("svg", "pdf")}
    assert names == figures | {f"{name}.csv" for name in ("curves", "by_class", "confusion", "test")}
    drawn = (tmp_path / "figures" / "confusion.svg").read_text()
    assert "do$g$" in drawn, "a name is no formula"
    test = json.loads((run / "test_metrics.json").read_text())
    with (tmp_path / "figures" / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == test["confusion"]
    assert rows[1][0] == "'=cat", "a name is no formula of a spreadsheet either"
    curves = next(rows for name, rows in tables(read_run(run)) if name == "curves")
    losses = [row["loss"] for row in read_run(run).rows if row["kind"] in ("train", "val")]
    assert [row[curves[0].index("loss")] for row in curves[1:]] == losses


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", ["a", "b"]))
    first, again = (write_figures(run, tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def drawn_loss(run: Path, folder: Path) -> str:
    write_figures(read_run(run), folder)
    return (folder / "loss.svg").read_text()


def test_the_loss_says_as_the_page_does_what_a_stage_learned(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", ["a", "b"])
    told = "stage $head$: cosine loss of the teacher's features"
    assert "of the teacher" not in drawn_loss(run, tmp_path / "plain")
    recipe = read_run(run).recipe
    first = recipe.stages[0].model_copy(update={"name": "$head$", "carry": "last"})
    taught = recipe.override({"distill": {"teacher": {"weights": "shipped:resnet-tiny"}, "target": "features"}, "stages.0.carry": "last"})
    taught = taught.model_copy(update={"stages": (first, *taught.stages[1:])})
    [(_, figure)] = [found for found in drawn(replace(read_run(run), recipe=taught)) if found[0] == "loss"]
    assert figure.axes[0].get_title() == told
    assert told in html.unescape(saved(figure, "svg").decode()), "a name is no formula"


@pytest.mark.parametrize(("highest", "scale"), [(1.0, "linear"), (100.0, "log")])
def test_losses_far_apart_are_on_a_logarithmic_axis_as_on_the_page(tmp_path: Path, highest: float, scale: str) -> None:
    run = read_run(fake_run(tmp_path / "run", ["a", "b"]))
    rows = [{**row, **({"loss": highest if row["step"] < 20 else 0.5} if "loss" in row else {})} for row in run.rows]
    [loss] = [figure for name, figure in drawn(replace(run, rows=rows)) if name == "loss"]
    assert loss.axes[0].get_yscale() == scale


def test_a_run_without_a_test_has_its_curves_and_many_classes_have_no_names(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", [f"class {i}" for i in range(40)])
    write_figures(read_run(run), tmp_path / "figures")
    assert "class 7" not in (tmp_path / "figures" / "confusion.svg").read_text()
    (run / "test_metrics.json").unlink()
    names = {path.stem for path in write_figures(read_run(run), tmp_path / "curves")}
    assert names == {"loss", "accuracy", "curves"}


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run", ["a", "b"])
    (tmp_path / "file").touch()
    assert main(["report", str(run), "--figures", str(tmp_path / "file")]) == 2
    assert "--figures" in capsys.readouterr().err
