"""Key figures of several labels on a run's page: what a random order would reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from tltrain.runs.record import RunRecord
from tltrain.runs.report import labels
from tltrain.runs.report.formatting import learned_nothing

SEEN = {"name": "cat", "support": 30, "frequency": 0.3, "ap": 0.9, "auroc": 0.9, "f1": 0.8}
UNSEEN = {"name": "dog", "support": 0, "frequency": 0.0, "ap": None, "auroc": None, "f1": 0.0}
TEST = {
    "n": 100, "map": 0.9, "f1_macro": 0.8, "f1_micro": 0.8, "auroc_macro": 0.9, "subset_accuracy": 0.7, "loss": 0.3, "weights": "best",
}  # fmt: skip


def test_few_images_are_too_few_and_the_kept_interval_decides() -> None:
    """Two cats and two others in perfect order: chance alone does that once in six."""
    few = {"n": 4, "per_label": [SEEN | {"support": 2, "auroc": 1.0}], "intervals": {"auroc_macro": [0.51, 1.0]}}
    said = learned_nothing(few)
    assert said is not None
    assert said.startswith("There are too few test images to tell the labels' order from a random one (AUROC 100.0")
    many = TEST | {"per_label": [SEEN | {"support": 30, "auroc": 0.6}]}
    assert learned_nothing(many | {"intervals": {"auroc_macro": [0.52, 0.7]}}) is None
    for kept in ({}, {"intervals": {"auroc_macro": [0.49, 0.7]}}):
        assert "nothing that was learned shows" in str(learned_nothing(many | kept))


def test_few_images_of_one_label_are_too_few() -> None:
    """Four of four, where always saying cat gets three."""
    test = {"n": 4, "top1": 1.0, "classes": ["cat", "dog"], "confusion": [[3, 0], [0, 1]]}
    assert str(learned_nothing(test)).startswith("There are too few test images to tell this from always saying cat")
    assert "nothing that was learned shows" in str(learned_nothing(test | {"top1": 0.5, "confusion": [[1, 2], [0, 1]]}))


def test_the_baseline_is_that_of_the_labels_that_map_is_the_mean_of() -> None:
    run = cast(RunRecord, SimpleNamespace(test=TEST | {"per_label": [SEEN, SEEN | {"name": "ant", "frequency": 0.1}, UNSEEN]}))
    shown = {name: value for name, value, _ in labels.figures(run)}
    assert shown["Baseline"].replace("\u202f", " ") == "20.0 %"
