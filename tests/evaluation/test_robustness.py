"""A run under corruptions: its answers are those of its network on the corrupted views, a stopped measurement goes on, pages and tables."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_reader import Page, assert_self_contained
from rich.console import Console as RichConsole

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.data.corruptions import OPERATIONS, SEVERITIES, corrupt
from tltrain.data.corruptions.views import CELLS, CLEAN, Cell
from tltrain.data.views import Views
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.evaluator import answers
from tltrain.evaluation.robustness import terminal
from tltrain.evaluation.robustness.asked import cells_of
from tltrain.evaluation.robustness.command import Ask, corruptions
from tltrain.evaluation.robustness.figures import differences, figures
from tltrain.evaluation.robustness.measured import Measured, answers_file, read
from tltrain.evaluation.trained import load_trained
from tltrain.runs import run_dir
from tltrain.runs.pages.comparison import compared_run
from tltrain.runs.record import read_run
from tltrain.runs.report.stats import wilson

NAMES = "impulse_noise,jpeg"
QUIET = Console(enabled=False)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def ask(run: Path, against: Path | None = None, names: str = NAMES, severities: str = "1,5") -> Ask:
    return Ask(run, names, severities, against, None, "test", 16)


def by_hand(run: Path, cell: Cell) -> list[int]:
    """The network's classes for the corrupted views, image by image."""
    recipe: Recipe = run_dir.read_recipe(run)
    trained, split = load_trained(run), open_images(recipe.data).test
    assert split is not None
    views = Views(split, trained.preprocess, "none", False, 0)
    limit = recipe.data.eval_limit or len(split)
    answers = []
    for i in [n * len(split) // limit for n in range(limit)]:
        clean = views.view(i, 0).permute(1, 2, 0).numpy()
        seen = clean if cell == CLEAN else corrupt(clean, *cell, recipe.data.seed, split.ids[i])
        with torch.no_grad():
            answers.append(int(trained.chain(torch.from_numpy(seen.copy()).permute(2, 0, 1)[None]).argmax()))
    return answers


def test_answers_are_those_of_the_network_on_the_corrupted_views(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert corruptions(ask(run), as_json=False) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(run.parent) not in line) <= 80
    measured = read(run / "corruptions")
    assert measured is not None
    assert list(measured.predicted) == [CLEAN, *(Cell(name, s) for name in NAMES.split(",") for s in (1, 5))]
    for cell in (CLEAN, Cell("impulse_noise", 5), Cell("jpeg", 1)):
        assert measured.predicted[cell].tolist() == by_hand(run, cell), cell
    test = run_dir.test_metrics(run)
    assert test is not None
    assert measured.right(CLEAN).mean() == test["top1"], "as in the run's own test"
    again = evaluate(run, None, "test", 16)
    shown = json.loads((run / "corruptions" / "figures.json").read_text())
    entry = compared_run("run", read_run(run)).accuracy
    assert entry is not None
    assert [again["top1"], again["top1_low"], again["top1_high"]] == pytest.approx(list(entry))
    assert shown["clean"] == pytest.approx(list(entry)), "one interval, wherever it stands"
    with (run / "corruptions" / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        right_N = measured.right(Cell(row["corruption"], int(row["severity"])))
        assert [float(row[key]) for key in ("accuracy", "low", "high")] == pytest.approx(
            [right_N.mean(), *wilson(right_N.mean(), len(right_N))], abs=1e-6
        )
    assert [row["kind"] for row in rows] == ["", "noise", "noise", "digital", "digital"]
    page = Page(run / "corruptions" / "corruptions.html")
    assert_self_contained(page)
    assert page.text.count("Impulse noise") >= 3
    assert len(page.all("img")) == 2 * 3, "each corruption clean and in both severities"


def test_what_is_there_is_not_measured_again_and_a_stop_loses_one_pass(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    corruptions(ask(whole), as_json=True)
    done: list[int] = []

    def stopped(*args: Any) -> Any:
        if len(args) > 3:  # not the batch that is timed
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(1)
        return answers(*args)

    monkeypatch.setattr("tltrain.evaluation.robustness.measure.answers", stopped)
    with pytest.raises(KeyboardInterrupt):
        corruptions(ask(run), as_json=True)
    path = answers_file(run / "corruptions")
    assert len(path.read_text().splitlines()) == 1 + 3
    with path.open("a") as file:
        file.write('{"corruption": "jpeg", "severity": 5, "predi')  # a write that the machine's end has torn
    done[:] = [1]
    corruptions(ask(run), as_json=True)
    assert len(done) == 1 + 2, "the clean pass and two others are kept"
    assert path.read_bytes() == answers_file(whole / "corruptions").read_bytes()
    done[:] = [1]
    corruptions(ask(run, severities="1"), as_json=True)
    assert done == [1]
    assert "jpeg,5" in (run / "corruptions" / "figures.csv").read_text(), "the page shows all that is known"


def test_other_weights_are_measured_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corruptions(ask(run, names="contrast", severities="5"), as_json=False)
    path = answers_file(run / "corruptions")
    head, clean, *lines = map(json.loads, path.read_text().splitlines())
    head["about"]["weights"] = "of another day"
    clean["predicted"] = [9] * len(clean["predicted"])
    (run / "manifest.json").unlink()
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (head, clean, *lines)))
    capsys.readouterr()
    corruptions(ask(run, names="contrast", severities="5"), as_json=False)
    assert "of other weights: it is measured anew" in " ".join(capsys.readouterr().out.split())
    again = read(run / "corruptions")
    assert again is not None
    assert again.predicted[CLEAN].tolist() == by_hand(run, CLEAN)


def test_files_are_covered_by_the_manifest(run: Path) -> None:
    corruptions(ask(run, names="contrast", severities="5"), as_json=True)
    covered = json.loads((run / "manifest.json").read_text())["files"]
    assert {f"corruptions/{name}" for name in ("answers.jsonl", "figures.csv", "figures.json", "corruptions.html")} <= set(covered)
    path = answers_file(run / "corruptions")
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(UserError, match="its checksum is not the one"):
        corruptions(ask(run, names="contrast", severities="5"), as_json=True)


def test_against_another_run_names_both(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert corruptions(ask(run, other, names="contrast"), as_json=False) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(run.parent) not in line) <= 80
    assert "+0.0 (+0.0 to +0.0)" in out, "the same network"
    assert read(other / "corruptions") is not None
    page = Page(run / "corruptions" / "against.html")
    assert_self_contained(page)
    assert "run and other under corruptions" in page.text


def test_runs_of_other_pixels_are_compared_with_a_note(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    recipe = run_dir.read_recipe(other)
    (other / "manifest.json").unlink()
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"size": 24, "resize": 24})})
    (other / "recipe.yaml").write_text(changed.to_yaml())
    assert corruptions(ask(run, other, names="contrast", severities="5"), as_json=False) == 0
    assert "are not the same: data.size 32 and 24" in " ".join(capsys.readouterr().out.split())
    assert "whose pixels are not the same (data.size 32 and 24" in Page(run / "corruptions" / "against.html").text


def test_a_device_without_room_for_the_first_batch_is_given_less(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def small(runtime: Any, chain: Any, batches: Any, *args: Any) -> Any:
        def checked() -> Iterator[Any]:
            for batch in batches:
                sizes.append(len(batch["label"]))
                if sizes[-1] > 8:
                    raise torch.OutOfMemoryError
                yield batch

        return answers(runtime, chain, checked(), *args)

    monkeypatch.setattr("tltrain.evaluation.robustness.measure.answers", small)
    corruptions(ask(run, names="contrast", severities="5"), as_json=True)
    assert sizes[0] > 8
    assert max(sizes[1:]) <= 8
    again = read(run / "corruptions")
    assert again is not None
    monkeypatch.undo()
    assert again.predicted[CLEAN].tolist() == by_hand(run, CLEAN)


def made(folder: Path, ids: str, **right: list[int]) -> Measured:
    """A measurement of images named by letters, of which those are right (1) that are listed."""
    cells = {Cell(name.rsplit("_", 1)[0], int(name[-1])): np.array(value) for name, value in right.items()}
    return Measured(folder, {}, tuple(ids), np.ones(len(ids), np.int64), cells)


def test_differences_are_paired_by_name() -> None:
    """Of 8 images the first run is right on a to f under fog, the second on a and b; the second lists them backwards."""
    first = made(Path("a/c"), "abcdefgh", clean_0=[1] * 8, fog_1=[1, 1, 1, 1, 1, 1, 0, 0])
    second = made(Path("b/c"), "hgfedcba", clean_0=[1] * 8, fog_1=[0, 0, 0, 0, 0, 0, 1, 1])
    clean, fog, overall = differences(first, second, [CLEAN, Cell("fog", 1)])
    assert (clean.gain, clean.p) == ((0.0, 0.0, 0.0), 1.0)
    assert (fog.first, fog.second, fog.gain.value) == (0.75, 0.25, 0.5)
    assert fog.p == pytest.approx(2 / 16, abs=0.02), "four images differ, all one way"
    assert fog.gain.low > 0, "had they been paired in the order of the files, six would differ, two of them the other way"
    assert overall.gain == fog.gain
    with pytest.raises(UserError, match="measured on other images"):
        differences(first, made(Path("b/c"), "abcdefgX", clean_0=[1] * 8, fog_1=[1] * 8), [CLEAN, Cell("fog", 1)])


def test_means_resample_images_with_all_of_their_answers() -> None:
    """One image of two is always right: its five answers are not five images."""
    same = {f"fog_{s}": [1, 0] for s in SEVERITIES}
    shown = figures(made(Path("a/c"), "ab", clean_0=[1, 1], **same), [CLEAN, *(Cell("fog", s) for s in SEVERITIES)])
    assert shown.rows[0].mean == (0.5, *wilson(0.5, 2))
    assert shown.overall.by_severity[3].value == 0.5


def test_the_whole_table_fits_80_columns() -> None:
    measured = Measured(Path("a/c"), {}, tuple("abc"), np.ones(3, np.int64), dict.fromkeys(CELLS, np.array([1, 0, 1])))
    shown = RichConsole(width=80, record=True)
    shown.print(terminal.table(figures(measured, CELLS)))
    lines = [line.rstrip() for line in shown.export_text().splitlines()]
    assert len(lines) == 1 + 1 + len(OPERATIONS) + 1 + lines.count("")
    assert "Gaussian noise  66.7  66.7  66.7  66.7  66.7  66.7" in "\n".join(lines)


def test_words_that_people_type() -> None:
    assert cells_of("all", "all") == list(CELLS)
    assert cells_of("noise, jpeg", "3") == [
        CLEAN, Cell("gaussian_noise", 3), Cell("shot_noise", 3), Cell("impulse_noise", 3), Cell("jpeg", 3),
    ]  # fmt: skip
    for names, severities, said in (("jpg", "1", "'jpg' is no corruption"), ("jpeg", "0", "'0' is none"), (",", "1", "names none")):
        with pytest.raises(UserError, match=said):
            cells_of(names, severities)


def test_words_that_do_not_go_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--severities", "1"], "--severities belongs to --corruptions"),
        (["--against", str(run)], "tltrain compare"),
        (["--corruptions", "--against", str(run)], "is the run itself"),
        (["--corruptions", "--against", "nowhere"], "nowhere has no"),
        (["--corruptions", str(run)], "the run folder stands before"),
    ):
        assert main(["evaluate", str(run), *words]) == 2, words
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (run / "corruptions").exists()
