"""Several test images of one patient: a run and all that is said of it has intervals that respect groups."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from digit_files import digit_folder

from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.runs import run_dir
from tltrain.runs.record import read_predictions
from tltrain.runs.report.stats import accuracy_interval
from tltrain.training.run import train

Made = Callable[..., Recipe]


def test_a_run_on_images_in_groups_says_so_wherever_its_interval_stands(
    made_recipe: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = digit_folder(tmp_path / "images")
    group_of = {}
    with (tmp_path / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        for i, path in enumerate(sorted(images.rglob("*.png"), reverse=True)):  # splits are mixed in the table, as groups are
            name = path.relative_to(images).as_posix()
            split, label = name.split("/")[:2]
            group_of[name] = f"{split} {label} {i % 2}"
            writer.writerow([f"images/{name}", label, split, group_of[name]])
    recipe = made_recipe(data={"source": f"csv:{tmp_path / 'images.csv'}", "resize": 36, "per_class": None, "eval_limit": None})
    run = tmp_path / "run"
    assert train(recipe, RunFlags(folder=run, workers=0))["outcome"] == "finished"
    assert "16 test (8 groups)" in (run / "plan.txt").read_text(encoding="utf-8")
    predicted, test = read_predictions(run), run_dir.test_metrics(run)
    assert test is not None
    assert predicted is not None
    assert predicted.group is not None
    names = [group_of[name.removeprefix("images/")] for name, _ in predicted.samples]
    assert len({*zip(names, predicted.group.tolist(), strict=True)}) == len({*names}) == len({*predicted.group.tolist()}) == 8
    expected = accuracy_interval(predicted.right, predicted.group)
    assert (test["groups"], test["ends"]) == (8, pytest.approx(expected[1:]))
    for k, row in enumerate(test["per_class"]):
        of = predicted.label == k
        assert row["ends"] == pytest.approx(accuracy_interval(predicted.right[of], predicted.group[of])[1:])
    assert all("ends" in b for b in test["reliability"])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["top1_low"], figures["top1_high"]) == pytest.approx(expected[1:])
    assert figures["groups"] == 8
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "16 in 8 groups" in said
    assert f"{100 * expected.low:.1f} to {100 * expected.high:.1f}" in said
    report = run_dir.report_file(run).read_text(encoding="utf-8").replace("\xa0", " ")
    assert "16 test images in 8 groups" in report
    assert f"{100 * expected.low:.1f} to {100 * expected.high:.1f}" in report
    assert np.mean(predicted.right) == test["top1"]


def test_the_report_links_to_the_pages_beside_it(made_recipe: Made, tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "run"
    assert train(made_recipe(), RunFlags(folder=run, workers=0))["outcome"] == "finished"
    assert "See also" not in run_dir.report_file(run).read_text(encoding="utf-8")
    (tmp_path / "sweep" / "sweep.html").write_text("")
    assert main(["evaluate", str(run), "--corruptions", "jpeg", "--severities", "1", "--batch", "64"]) == 0
    links = {"corruptions/corruptions.html": "under corruptions", "../sweep.html": "the sweep"}
    text = run_dir.report_file(run).read_text(encoding="utf-8")
    for href, name in links.items():
        assert f'<a href="{href}">{name}</a>' in text
        assert (run / href).is_file()
    assert main(["report", str(run), "--out", str(tmp_path / "elsewhere" / "page.html")]) == 0
    assert 'href="../sweep/run/corruptions/corruptions.html"' in (tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
