"""Key figures of several labels on a run's page: what a random order would reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from tltrain.runs.record import RunRecord
from tltrain.runs.report import labels

SEEN = {"name": "cat", "support": 30, "frequency": 0.3, "ap": 0.9, "auroc": 0.9, "f1": 0.8}
UNSEEN = {"name": "dog", "support": 0, "frequency": 0.0, "ap": None, "auroc": None, "f1": 0.0}
TEST = {
    "n": 100, "map": 0.9, "f1_macro": 0.8, "f1_micro": 0.8, "auroc_macro": 0.9, "subset_accuracy": 0.7, "loss": 0.3, "weights": "best",
}  # fmt: skip


def test_the_baseline_is_that_of_the_labels_that_map_is_the_mean_of() -> None:
    run = cast(RunRecord, SimpleNamespace(test=TEST | {"per_label": [SEEN, SEEN | {"name": "ant", "frequency": 0.1}, UNSEEN]}))
    shown = {name: value for name, value, _ in labels.figures(run)}
    assert shown["Baseline"].replace("\u202f", " ") == "20.0 %"
