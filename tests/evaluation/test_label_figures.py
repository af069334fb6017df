"""Figures of several labels, by hand; thresholds and temperature that are fitted on val."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import f1_score

from tltrain.core.metric import metric, of_data
from tltrain.evaluation import metrics
from tltrain.evaluation.multilabel.details import details, predictions_csv
from tltrain.evaluation.multilabel.fitting import fit_temperature, fit_thresholds
from tltrain.evaluation.multilabel.intervals import intervals, weighted
from tltrain.evaluation.multilabel.names import under_classes
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.runs.report.stats import accuracy_interval


def _said(target: list[list[int]], logit: list[list[float]]) -> LabelPredictions:
    return LabelPredictions(np.arange(len(target)), np.array(target) > 0, np.array(logit, dtype=np.float64))


def _drawn(num: int = 400, scale: float = 1.0) -> LabelPredictions:
    """Answers that are calibrated where `scale` is 1, of labels with three frequencies."""
    generator = np.random.default_rng(0)
    logit_NK = generator.normal((0, -1, -2), 2, (num, 3))
    return LabelPredictions(np.arange(num), generator.random((num, 3)) < expit(logit_NK), scale * logit_NK)


def test_the_figures_are_those_worked_out_by_hand() -> None:
    p = _said([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], [[2, -1, -3], [1, 1, -2], [3, 2, -1], [-1, -2, -4]])
    figures = metrics.summary(p, 3)
    # The first label is found at the places 2 and 3 of its order, (1/2 + 2/3) / 2; the second is ordered rightly; no image has the third.
    assert figures["map"] == pytest.approx((7 / 12 + 1) / 2)
    assert figures["auroc_macro"] == pytest.approx((0.5 + 1) / 2)
    assert figures["f1_macro"] == pytest.approx((0.8 + 1) / 2)
    assert figures["f1_micro"] == pytest.approx(8 / 9)
    assert figures["subset_accuracy"] == 0.75
    assert figures["loss"] == pytest.approx(float(np.logaddexp(0, np.where(p.target, -p.logit, p.logit)).mean()))
    assert set(figures) == {"n", *of_data(multilabel=True)}
    rows = metrics.details(p, ["a", "b", "c"])["per_label"]
    assert (rows[2]["support"], rows[2]["ap"], rows[2]["auroc"]) == (0, None, None)


def test_figures_of_one_class_an_image_are_the_same_as_ever() -> None:
    names = "loss top1 top5 precision_macro recall_macro f1_macro precision_weighted recall_weighted f1_weighted ece"
    assert of_data(multilabel=False) == names.split()
    assert all(metric(name).of for name in of_data(multilabel=True))


def test_a_threshold_is_the_best_of_all_for_its_label() -> None:
    p = _drawn(60)
    thresholds = fit_thresholds(p)
    for share_N, target_N, threshold in zip(p.calibrated.T, p.target.T, thresholds, strict=True):
        best = max(f1_score(target_N, share_N >= t) for t in share_N)
        assert f1_score(target_N, share_N >= threshold) == pytest.approx(best)
        assert threshold not in share_N.tolist()
    nobody = LabelPredictions(p.position, np.zeros_like(p.target), p.logit)
    assert fit_thresholds(nobody) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_makes_up_for_logits_that_are_too_large_or_too_small(scale: float) -> None:
    assert fit_temperature(_drawn(4000, scale)) == pytest.approx(scale, rel=0.06)


def test_labels_of_other_images_are_matched_by_name() -> None:
    theirs = np.array([[1, 0, 0], [0, 1, 0]], np.uint8)
    label_NK, notes = under_classes(theirs, ("b", "a", "x"), ("a", "b", "c"))
    assert label_NK.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert "labels c" in notes[0]


def test_images_in_groups_widen_every_interval_and_are_written() -> None:
    p = _drawn(60)
    group_N = np.repeat(np.arange(6), 10)
    grouped = metrics.with_groups(p, group_N, None)
    assert isinstance(grouped, LabelPredictions)
    plain, said = details(p, ("a", "b", "c")), details(grouped, ("a", "b", "c"))
    assert said["groups"] == 6
    assert "groups" not in plain
    assert "ends" not in plain
    right = (p.named == p.target).all(1)
    assert said["ends"] == list(accuracy_interval(right, group_N)[1:])
    low, high = accuracy_interval(right)[1:]
    assert said["ends"][1] - said["ends"][0] > high - low
    lines = predictions_csv(grouped, [str(i) for i in range(60)], ("a", "b", "c")).splitlines()
    assert lines[0].endswith(",group")
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == [str(g) for g in group_N]


def test_the_bootstrap_of_means_over_labels_counts_each_image_as_often_as_it_was_drawn() -> None:
    """Against scikit-learn on images that stand there so often; with equal logits, and with draws in which a label has no image."""
    generator = np.random.default_rng(1)
    logit_NK = np.round(generator.normal(size=(40, 3)), 1)
    target_NK = generator.random((40, 3)) < (0.4, 0.4, 0.04)
    p = LabelPredictions(np.arange(40), target_NK, logit_NK)
    drawn_BN = np.stack([np.bincount(generator.integers(0, 40, 40), minlength=40) for _ in range(6)])
    found = weighted(p, drawn_BN.astype(np.float64))
    assert any(not target_NK[row > 0, 2].any() for row in drawn_BN)
    for b, row in enumerate(drawn_BN):
        again_N = np.repeat(np.arange(40), row)
        figures = metrics.summary(LabelPredictions(np.arange(40), target_NK[again_N], logit_NK[again_N]), 3)
        assert {name: value[b] for name, value in found.items()} == pytest.approx({name: figures[name] for name in found})


def test_means_over_labels_have_intervals_that_hold_them_and_respect_groups() -> None:
    p = _drawn(200)
    alone = details(p, ["a", "b", "c"])["intervals"]
    figures = metrics.summary(p, 3)
    assert all(low < figures[name] < high for name, (low, high) in alone.items())
    alike = replace(p, target=p.target[:40].repeat(5, 0), logit=p.logit[:40].repeat(5, 0), group=np.arange(40).repeat(5))
    groups = intervals(alike)
    assert all(high - low > 1.4 * (alone[name][1] - alone[name][0]) for name, (low, high) in groups.items())
    right = replace(p, logit=np.where(p.target, 5.0, -5.0))
    assert intervals(right)["map"] == pytest.approx((200 / (200 + 1.959964**2), 1), abs=1e-6), "Wilson's, where all are right"
    assert intervals(replace(p, logit=p.logit * np.nan)) == {}


def test_images_without_any_label_have_no_means_over_labels() -> None:
    p = replace(_drawn(8), target=np.zeros((8, 3), bool))
    figures = metrics.summary(p, 3)
    nothing = {"map", "auroc_macro", "f1_macro", "precision_macro", "recall_macro"}
    assert {name for name, value in figures.items() if value is None} == nothing
    json.dumps({**figures, **details(p, ["a", "b", "c"])}, allow_nan=False)
