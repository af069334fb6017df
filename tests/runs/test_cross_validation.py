"""What the runs of a folder of folds say together: figures, intervals, the table, the page, the comparison."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from folds_files import CLASSES, folds_folder, predicted
from page_reader import Page, assert_self_contained

from tltrain.commands.compare import compare
from tltrain.core.errors import UserError
from tltrain.evaluation import metrics
from tltrain.runs.folds.compared import compared_folds
from tltrain.runs.folds.folder import read
from tltrain.runs.folds.page import write
from tltrain.runs.folds.pooled import Pooled, pool
from tltrain.runs.pages.comparison import paired
from tltrain.runs.report.stats import mcnemar, sign_flips, wilson


def _pooled(path: Path) -> Pooled:
    pooled = pool(path)
    assert pooled is not None
    return pooled


def test_the_figures_of_the_folds_together_are_those_of_all_predictions(tmp_path: Path) -> None:
    pooled = _pooled(folds_folder(tmp_path / "folds"))
    whole = predicted(120, 0, 0.8)
    expected = {**metrics.summary(whole, len(CLASSES)), **metrics.details(whole, CLASSES)}
    test = pooled.record.test
    assert test is not None
    assert test["n"] == 120
    for name in ("top1", "top5", "loss", "f1_macro", "ece"):
        assert test[name] == pytest.approx(expected[name], abs=1e-12), name
    assert test["confusion"] == expected["confusion"]
    for mine, theirs in zip(test["per_class"], expected["per_class"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-12)
    for mine, theirs in ((test, expected), (test["calibration"], expected["calibration"])):
        assert [b["n"] for b in mine["reliability"]] == [b["n"] for b in theirs["reliability"]]
        for a, b in zip(mine["reliability"], theirs["reliability"], strict=True):
            assert a == pytest.approx(b, abs=1e-12)
    assert test["calibration"]["ece"] == pytest.approx(expected["calibration"]["ece"], abs=1e-12)
    assert pooled.accuracy[1:] == wilson(expected["top1"], 120)
    assert pooled.accuracies.tolist() == [run.test["top1"] for _, run in pooled.runs if run.test is not None]


def test_a_fold_that_writes_no_groups_leaves_those_of_the_others(tmp_path: Path) -> None:
    """One in which nearly every image is a group of its own writes none."""
    folder = folds_folder(tmp_path / "folds")
    plain = _pooled(folder).accuracy
    first, second, *_ = sorted(folder.glob("*/test_predictions.csv"))
    assert first != second
    rows = first.read_text(encoding="utf-8").splitlines()
    first.write_text("\n".join([f"{rows[0]},group", *(f"{row},{i // 8}" for i, row in enumerate(rows[1:]))]) + "\n", encoding="utf-8")
    grouped = _pooled(folder).accuracy
    assert grouped[0] == plain[0]
    assert grouped[2] - grouped[1] > plain[2] - plain[1]


def test_repeats_of_an_image_are_not_independent(tmp_path: Path) -> None:
    once, often = (_pooled(folds_folder(tmp_path / str(r), repeats=r)) for r in (1, 8))
    parts = [predicted(120, r, 0.8) for r in range(8)]
    right_RN = np.stack([p.predicted == p.label for p in parts])
    assert often.accuracy.value == pytest.approx(right_RN.mean())
    rng = np.random.default_rng(3)
    drawn = [right_RN[:, rng.integers(0, 120, 120)].mean() for _ in range(4000)]
    assert often.accuracy[1:] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.012)
    width = [p.accuracy.high - p.accuracy.low for p in (once, often)]
    as_independent = wilson(often.accuracy.value, 8 * 120)
    assert width[1] > 1.25 * (as_independent[1] - as_independent[0])
    assert often.record.test is not None
    assert [row["support"] for row in often.record.test["per_class"]] == [20] * 6, "images, not their predictions"
    assert np.sum(often.record.test["confusion"]) == 8 * 120
    assert often.f1.low < often.f1.value < often.f1.high
    assert list(often.by_repeat.values()) == pytest.approx(right_RN.mean(1))


def test_the_table_holds_each_image_once_a_repeat(tmp_path: Path) -> None:
    folder = folds_folder(tmp_path / "folds", repeats=2)
    write(_pooled(folder))
    with (folder / "out_of_fold.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "predicted", "confidence", "fold", "repeat"]
    assert len({(row["path"], row["repeat"]) for row in rows}) == len(rows) == 240
    assert {row["label"] for row in rows} == {*CLASSES, "'=owl"} - {"=owl"}, "no spreadsheet runs a class name"
    for repeat in range(2):
        whole = predicted(120, repeat, 0.8)
        for row in (row for row in rows if row["repeat"] == str(repeat)):
            i = int(row["path"][-8:-4])
            assert CLASSES[whole.predicted[i]] == row["predicted"].lstrip("'")
            assert float(row["confidence"]) == pytest.approx(whole.calibrated[i], abs=1e-6)
    figures = json.loads((folder / "pooled_metrics.json").read_text())
    assert figures["accuracy"]["value"] == pytest.approx(figures["top1"])
    assert figures["runs"] == ["r0-f0", "r0-f1", "r0-f2", "r1-f0", "r1-f1", "r1-f2"]


def test_the_page(tmp_path: Path) -> None:
    folder = folds_folder(tmp_path / "folds", repeats=2)
    (folder / "r0-f1" / "report.html").write_text("x")
    page = Page(write(_pooled(folder)))
    assert_self_contained(page)
    assert "of 120 images are right" in page.text
    assert "each judged by 2 networks that never saw it" in page.text
    assert [a["href"] for a in page.all("a")] == ["r0-f1/report.html"]
    for word in ("Each fold", "Where it errs", "Its most confident mistakes", "How far to trust its confidence", "From repeat to repeat"):
        assert word in page.text
    assert "1.40 to 1.40" in page.text
    assert len(page.all("img")) == 24
    assert not page.all("span", class_="badge")


def test_what_is_not_finished_is_said_and_not_pooled(tmp_path: Path) -> None:
    folder = folds_folder(tmp_path / "folds")
    shutil.rmtree(folder / "r0-f2")
    (folder / "r0-f1" / "test_metrics.json").unlink()
    pooled = _pooled(folder)
    page = Page(write(pooled))
    assert len(pooled.predictions.ids) == 40
    assert "each judged by a network that never saw it. So far: 1 of 3 runs is finished." in page.text
    assert "Not finished: r0-f1, r0-f2." in page.text
    shutil.rmtree(folder / "r0-f0")
    assert pool(folder) is None
    with pytest.raises(UserError, match=r"no fold is finished, so that images are missing"):
        compared_folds("folds", folder)


def test_a_network_that_learned_nothing_is_told_so(tmp_path: Path) -> None:
    assert "cannot be told from always saying" in Page(write(_pooled(folds_folder(tmp_path / "folds", skill=0.2)))).text


def test_folds_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = folds_folder(tmp_path / "folds")
    predictions = folder / "r0-f0" / "test_predictions.csv"
    text, other = predictions.read_text(), (folder / "r0-f1" / "test_predictions.csv").read_text()
    predictions.write_text(text + other.splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"is tested by fold 0 and by fold 1 of repeat 0, so that one of them has learned from it"):
        pool(folder)
    name = text.splitlines()[1].split(",")[0]
    predictions.write_text(text)
    repeat = folds_folder(tmp_path / "repeats", repeats=2)
    file = next(path for path in sorted(repeat.glob("r1-*/test_predictions.csv")) if name in path.read_text())
    lines = file.read_text().splitlines()
    file.write_text("\n".join(f"{name},gnu,gnu,0.5" if line.startswith(name) else line for line in lines))
    with pytest.raises(UserError, match="has another class than in other folds"):
        pool(repeat)
    metrics_file = folder / "r0-f2" / "test_metrics.json"
    metrics_file.write_text(metrics_file.read_text().replace('"cat"', '"car"'))
    with pytest.raises(UserError, match="have other classes"):
        pool(folder)
    (folder / "folds.json").write_text('{"k": -1, "repeats": 1e9}')
    with pytest.raises(UserError, match=r"folds.json is damaged: k and repeats"):
        read(folder)


def test_two_cross_validations_are_paired_image_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folds_folder(tmp_path / name, skill=skill, lr=lr) for name, skill, lr in (("a", 0.9, 0.1), ("b", 0.6, 0.2))]
    a, b = (compared_folds(path.name, path) for path in paths)
    pair = paired(a, b)
    assert pair is not None
    right = [p.predicted == p.label for p in (predicted(120, 0, 0.9), predicted(120, 0, 0.6))]
    assert (pair.only_first, pair.only_second, pair.p) == mcnemar(*right)
    assert pair.gain.value == pytest.approx(right[0].mean() - right[1].mean())
    compare(paths, tmp_path / "page.html")
    text = capsys.readouterr().out
    assert "a gets the most test images right" in text
    assert "exact McNemar test" in " ".join(text.split())
    page = Page(tmp_path / "page.html")
    assert "Each row is a cross-validation" in page.text
    assert "stages.0.lr" in page.text


def test_repeats_are_compared_by_what_each_image_gets_of_them(tmp_path: Path) -> None:
    a, b, c = (
        compared_folds(name, folds_folder(tmp_path / name, repeats=r, skill=s))
        for name, r, s in (("a", 4, 0.9), ("b", 4, 0.8), ("c", 1, 0.8))
    )
    shares = [
        np.mean([p.predicted == p.label for p in (predicted(120, r, skill) for r in range(repeats))], axis=0)
        for repeats, skill in ((4, 0.9), (4, 0.8), (1, 0.8))
    ]
    for other, share in ((b, shares[1]), (c, shares[2])):
        pair = paired(a, other)
        assert pair is not None
        assert pair.test == "sign-flip test over images"
        assert pair.gain.value == pytest.approx(shares[0].mean() - share.mean())
        assert (pair.only_first, pair.only_second) == ((shares[0] > share).sum(), (shares[0] < share).sum())
        assert pair.gain.low < pair.gain.value < pair.gain.high


def test_sign_flips_of_single_predictions_are_mcnemars_test() -> None:
    rng = np.random.default_rng(0)
    for share in (0.5, 0.6, 0.75):
        a, b = rng.random(200) < share, rng.random(200) < 0.5
        only_a, only_b, exact = mcnemar(a, b)
        assert sign_flips(a.astype(float), b.astype(float))[:2] == (only_a, only_b)
        assert sign_flips(a.astype(float), b.astype(float))[2] == pytest.approx(exact, abs=0.02)
    assert sign_flips(np.ones(5), np.ones(5)) == (0, 0, 1.0)


def test_folds_and_runs_are_not_compared(tmp_path: Path) -> None:
    folder = folds_folder(tmp_path / "folds")
    with pytest.raises(UserError, match="compare folds with folds"):
        compare([folder, folder / "r0-f0"], tmp_path / "page.html")
