"""What pages say in cases that are not the usual: several labels, a solved head, a recipe with reasons, losses far apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_run import fake_run, write_rows
from page_reader import Page
from scipy.special import expit

from tltrain.evaluation import metrics
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages.write import write_comparison, write_report

LABELS = ["cat", "dog", "eel"]


def labelled(folder: Path, seed: int = 0) -> Path:
    """The folder of a run with several labels an image."""
    run, generator = fake_run(folder, LABELS, seed=seed), np.random.default_rng(seed)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"source": "csv:sets.csv", "label_separator": "|"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"select": "map"}))
    logit_NK = generator.normal((0, -1, -2), 2, (150, 3))
    p = LabelPredictions(np.arange(150), generator.random((150, 3)) < expit(logit_NK), logit_NK)
    test = {"split": "test", "weights": "best", **metrics.summary(p, 3), **metrics.details(p, LABELS)}
    (run / "test_metrics.json").write_text(json.dumps(test))
    env = json.loads((run / "env.json").read_text())
    by_class = {"train": [60, 20, 10], "val": [6, 2, 1], "test": [75, 50, 30]}
    (run / "env.json").write_text(json.dumps(env | {"data": {"train": 80, "val": 8, "test": 150, "names": LABELS, "by_class": by_class}}))
    for name in ("mistakes.json", "test_predictions.csv"):
        (run / name).unlink(missing_ok=True)
    return run


def words(page: Path) -> str:
    return " ".join(Page(page).text.split())


def _ends(run: Path, key: str) -> str:
    low, high = json.loads((run / "test_metrics.json").read_text())["intervals"][key]
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def test_a_report_of_several_labels_gives_every_mean_its_interval_and_speaks_of_labels(tmp_path: Path) -> None:
    run = labelled(tmp_path / "run")
    text = words(write_report(run))
    test = json.loads((run / "test_metrics.json").read_text())
    assert f"mAP is {100 * test['map']:.1f} %; all labels are right on {100 * test['subset_accuracy']:.1f} % of 150 test images" in text
    for key in ("map", "f1_macro", "auroc_macro"):
        assert f"{100 * test[key]:.1f} % {_ends(run, key)}; mean over labels" in text, key
    assert "the bootstrap over images for means over labels" in text
    assert "80 training images of 3 labels, beside 8 val and 150 test images. There are 6.0 times as many of cat as of eel." in text
    assert "Confusion" not in text
    test.pop("intervals")  # as an older version wrote it
    (run / "test_metrics.json").write_text(json.dumps(test))
    text = words(write_report(run))
    assert f"{100 * test['f1_macro']:.1f} % mean over labels" in text
    assert "bootstrap" not in text


def test_a_comparison_of_several_labels_says_what_is_right_and_has_the_intervals_of_the_report(tmp_path: Path) -> None:
    runs = [labelled(tmp_path / name, seed) for seed, name in enumerate("ab")]
    text = words(write_comparison(runs, tmp_path / "c.html", "Comparison"))
    assert "All labels right, mean" in text
    assert "Run All labels right" in text
    assert "Test accuracy" not in text
    assert "ECE" not in text
    for run in runs:
        assert _ends(run, "map") in text
        assert _ends(run, "f1_macro") in text


def test_the_run_of_a_fit_shows_its_recipe_with_the_reasons_that_still_hold(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", LABELS)
    reasoned = (run / "recipe.yaml").read_text().replace("batch: 64", "# as many as fit\nbatch: 64")
    (tmp_path / "recipe.yaml").write_text(reasoned)
    assert "# as many as fit" in words(write_report(run))
    (tmp_path / "recipe.yaml").write_text(reasoned.replace("batch: 64", "batch: 32"))
    assert "# as many as fit" not in words(write_report(run)), "another recipe than the run's"


@pytest.mark.parametrize(("first", "title"), [(2.0, "Loss"), (200.0, "Loss, logarithmic")])
def test_losses_that_lie_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path: Path, first: float, title: str) -> None:
    run = fake_run(tmp_path / "run", LABELS)
    rows = [{**row, "loss": first if row["run_step"] == 1 else 0.5} if "loss" in row else row for row in read_rows(run)]
    write_rows(run / "metrics-000001.jsonl", rows)
    assert f"{title} train val" in words(write_report(run))


def test_a_head_that_was_solved_has_no_curve(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", LABELS)
    kept = [row for row in read_rows(run) if row["kind"] != "train"]
    solved = {**kept[-1], "kind": "solve", "notes": ["ridge of strength 10"], "features": 80}
    write_rows(run / "metrics-000001.jsonl", [*kept, solved])
    text = words(write_report(run))
    assert "Val accuracy, %" not in text
    assert "was worked out, not trained: ridge of strength 10." in text


def test_one_mistake_is_no_trend(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", LABELS)
    test = json.loads((run / "test_metrics.json").read_text())
    test |= {"n": 100, "top1": 0.99, "confusion": [[34, 0, 1], [0, 35, 0], [0, 0, 30]]}
    (run / "test_metrics.json").write_text(json.dumps(test))
    assert "; the one mistake takes cat for eel." in words(write_report(run))
