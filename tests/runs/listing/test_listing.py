"""Run folders side by side: the one that --folder auto takes, and the table of `tltrain ls`, which no damaged folder breaks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cli_words import mistake
from fake_run import fake_run

from tltrain.cli.main import main
from tltrain.commands.ls import table
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import load
from tltrain.runs import manifest, run_dir
from tltrain.runs.listing.folders import AUTO, check_recipe, run_folder
from tltrain.runs.listing.lines import lines
from tltrain.runs.listing.page import listing
from tltrain.runs.report.stats import wilson

RECIPE = load("digits-resnet")
OTHER = RECIPE.override({"batch": 8})


def test_auto_takes_the_first_folder_that_is_free_or_holds_this_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = RunFlags(folder=AUTO)
    assert run_folder(RECIPE, start) == Path("runs/digits-resnet")
    run_dir.create(Path("runs/digits-resnet"), RECIPE)
    assert run_folder(RECIPE, start) == Path("runs/digits-resnet"), "the same command goes on with its own run"
    assert run_folder(OTHER, start) == Path("runs/digits-resnet-2")
    (tmp_path / "runs/digits-resnet-2").mkdir()
    (tmp_path / "runs/digits-resnet-2/notes.txt").write_text("mine")
    assert run_folder(OTHER, start) == Path("runs/digits-resnet-3")
    assert run_folder(OTHER, replace(start, folder=None)) == Path("runs/digits-resnet")


def test_the_refusal_of_a_changed_recipe_names_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir.create(Path("runs/digits-resnet"), RECIPE)
    with pytest.raises(
        UserError, match=r"batch: 64 -> 8\nchoose another folder with --folder, or delete it; --folder auto takes runs/digits-resnet-2$"
    ):
        check_recipe(Path("runs/digits-resnet"), OTHER, RunFlags())
    run_dir.create(Path("mine"), RECIPE)
    with pytest.raises(UserError, match=r"or delete it$"):
        check_recipe(Path("mine"), OTHER, RunFlags(folder=Path("mine")))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs, one that was never started, and four folders that are damaged in a way of their own."""
    root = tmp_path / "runs"
    fake_run(root / "good", ["a", "b", "c"], skill=0.95)
    fake_run(root / "deep/er/down/worse", ["a", "b", "c"], skill=0.6, seed=1)
    run_dir.create(root / "queued", RECIPE)
    fake_run(root / "no-recipe", ["a", "b"])
    (root / "no-recipe/recipe.yaml").unlink()
    fake_run(root / "bad-rows", ["a", "b"])
    (root / "bad-rows/metrics-000001.jsonl").write_text("{}\n{}\n")
    fake_run(root / "bad-outcome", ["a", "b"])
    (root / "bad-outcome/outcome.json").write_text('{"outcome')
    fake_run(root / "bad-recipe", ["a", "b"])
    (root / "bad-recipe/recipe.yaml").write_text("name: \x1b[31m\n")
    (root / "notes").mkdir()
    (root / "notes/read.me").write_text("no run")
    return root


def test_each_run_is_a_line_and_a_damaged_one_hides_no_other(runs: Path) -> None:
    found = {Path(line.run).relative_to(runs).as_posix(): line for line in lines(runs)}
    assert {name: line.state for name, line in found.items()} == {
        "good": "finished", "deep/er/down/worse": "finished", "queued": "new",
        "no-recipe": "damaged", "bad-rows": "damaged", "bad-outcome": "damaged", "bad-recipe": "damaged",
    }  # fmt: skip
    good, test = found["good"], json.loads((runs / "good/test_metrics.json").read_text())
    assert (good.recipe, good.data, good.test) == ("digits-resnet", "digits", test["top1"])
    best = [row for row in map(json.loads, (runs / "good/metrics-000001.jsonl").read_text().splitlines()) if row.get("best")][-1]
    assert good.val == best["top1"]
    assert all(line.problem for line in found.values() if line.state == "damaged")
    assert found["no-recipe"].problem == "it has no recipe.yaml"


def test_a_run_that_goes_on_is_running_and_one_without_an_owner_was_killed(runs: Path) -> None:
    run_dir.claim(runs / "queued")
    assert {line.state for line in lines(runs / "queued")} == {"running"}
    claim = runs / "queued/generations/000001"
    owner = json.loads(claim.read_text())
    claim.write_text(json.dumps({**owner, "host": "elsewhere", "time": time.time() - 3600}))
    assert {line.state for line in lines(runs / "queued")} == {"killed"}
    run_dir.write_outcome(runs / "queued", 1, {"outcome": "failed", "error": "no room"})
    assert [(line.state, line.problem) for line in lines(runs / "queued")] == [("failed", "no room")]


def test_how_far_a_stopped_run_came_is_said_in_steps(runs: Path) -> None:
    (runs / "good/outcome.json").write_text(json.dumps({"outcome": "stopped"}))
    rows = (runs / "good/metrics-000001.jsonl").read_text().splitlines()
    early = [row for row in rows if '"start"' in row or json.loads(row)["stage_index"] == 0]
    (runs / "good/metrics-000001.jsonl").write_text("\n".join(early) + "\n")
    env = json.loads((runs / "good/env.json").read_text())
    (runs / "good/env.json").write_text(json.dumps({**env, "data": {"train": 1000}}))
    [line] = lines(runs / "good")
    assert line.done == pytest.approx(60 / 200)
    assert any("stopped 30 %" in row for row in table([line], runs, time.time(), 80))


@pytest.mark.parametrize(("sort", "first"), [("test", "good"), ("run", "bad-outcome"), ("state", "damaged")])
def test_the_table_can_be_sorted(runs: Path, sort: str, first: str) -> None:
    line = lines(runs, sort)[0]
    assert first in (Path(line.run).name, line.state)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(runs: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run(runs / ("a-very-long-name-of-a-run-" * 4 + "seed-1"), ["a", "b"])
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["ls", str(runs)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b[31m" not in text
    assert "seed-1" in text, "the end of a name tells runs apart"
    head, *rows = text.split("\n\n")[0].splitlines()
    assert head.split() == ["run", "recipe", "data", "state", "val", "test", *(["95", "%"] if width == 120 else []), "time", "when"]
    assert len(rows) == 8
    assert "bad-rows: " in text.split("\n\n")[1]


@pytest.mark.parametrize(("name", "width", "there"), [("a", 80, True), ("r" * 30, 80, False), ("r" * 30, 95, True), ("r" * 90, 120, True)])
def test_the_interval_is_that_of_report_and_compare_where_it_fits(tmp_path: Path, name: str, width: int, there: bool) -> None:
    run = fake_run(tmp_path / name, ["a", "b"], n=200)
    [line] = found = lines(tmp_path)
    low, high = wilson(line.test, 200)
    assert line.test_interval == (low, high)
    assert line.plain()["test_interval"] == (low, high)
    text = table(found, tmp_path, time.time(), width)
    assert max(map(len, text)) <= width
    assert ("95 %" in text[0]) == there
    assert any(f"{100 * line.test:.1f}  {100 * low:.1f} to {100 * high:.1f} " in row for row in text) == there
    figures = json.loads((run / "test_metrics.json").read_text())
    manifest.uncover(run, [run / "test_metrics.json"])
    (run / "test_metrics.json").write_text(json.dumps(figures | {"ends": [0.25, 0.75]}))  # as of images in groups
    [line] = lines(tmp_path)
    assert line.test_interval == (0.25, 0.75)
    assert "25.0\u00a0to\u00a075.0\u202f%" in listing([line], tmp_path, tmp_path / "runs.html", time.time())


def test_seeds_of_a_sweep_are_told_apart_in_80_columns(tmp_path: Path) -> None:
    names = [f"sw/seed-{seed}_head.lr-{lr}_batch-32" for seed in range(2) for lr in ("1e-3", "3e-3")]
    for name in names:
        fake_run(tmp_path / name, ["a", "b"])
    other = tmp_path / "digits-resnet-lr" / "recipe.yaml"
    fake_run(other.parent, ["a", "b"])
    manifest.uncover(other.parent, [other])
    renamed = other.read_text().replace("name: digits-resnet", "name: digits-resnet-lr")
    other.write_text(renamed.replace("source: digits", "source: folder:photos"))
    text = table(lines(tmp_path), tmp_path, time.time(), 80)
    assert max(map(len, text)) <= 80
    assert len({row.split()[0] for row in text if "finished" in row}) == len(names) + 1
    assert any(" recipe " in row for row in table(lines(tmp_path), tmp_path, time.time(), 120))


def test_json_has_no_nan_and_a_folder_without_runs_is_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", str(runs), "--json"]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert len(json.loads(text)) == 7
    monkeypatch.chdir(runs / "notes")
    assert main(["ls"]) == 0
    assert "no runs yet" in capsys.readouterr().out
    assert "is no folder" in mistake(["ls", "/no/where"], capsys)


def test_the_page_filters_rows_without_a_script(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "runs.html"
    assert main(["ls", str(runs), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert "\x1b" not in text
    for name, num in (("recipe", 2), ("data", 2), ("state", 3)):
        for i in range(num):
            assert f'id="{name}-{i}"' in text
            assert f"body:has(#{name}-{i}:checked) tbody tr:not(.{name}-{i}) {{ display: none; }}" in text
    rows = text.partition("<tbody>")[2].split("<tr ")[1:]
    assert sum("state-1" in row.partition(">")[0] for row in rows) == 2 == sum("finished" in row for row in rows)


def test_the_run_of_a_fit_stands_for_its_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = runs / "pictures-fit"
    (fit / "run").mkdir(parents=True)
    done = next(path for path in sorted(runs.iterdir()) if (path / "outcome.json").is_file())
    for name in ("recipe.yaml", "outcome.json"):
        (fit / "run" / name).write_text((done / name).read_text())
    (fit / "recipe.yaml").write_text((done / "recipe.yaml").read_text())
    assert main(["ls", str(fit), "--json"]) == 0
    assert [Path(line["run"]).name for line in json.loads(capsys.readouterr().out)] == ["run"]
    assert f"is the folder of a fit, and its run is {fit / 'run'}" in mistake(["evaluate", str(fit)], capsys)
