"""What a finished run leaves for people: the mistakes that it was surest of, and every prediction."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.views import Preprocess, Views
from tltrain.evaluation import results
from tltrain.evaluation.metrics import Predictions

NUM = 90


@pytest.fixture(scope="module")
def images() -> DataSplits:
    return open_images(Data(source="digits"))


def said(images: DataSplits, num_wrong: int) -> Predictions:
    """Of every third test image; `num_wrong` of them are taken for another digit, anywhere among the others, right ones the surest."""
    assert images.test is not None
    draw = np.random.default_rng(num_wrong)
    index = np.arange(NUM) * 3
    label = images.test.labels[index]
    predicted = label.copy()
    wrong = draw.permutation(NUM)[:num_wrong]
    predicted[wrong] = (label[wrong] + draw.integers(1, 10, num_wrong)) % 10
    calibrated = draw.uniform(0.9, 1.0, NUM)
    calibrated[wrong] = draw.permutation(np.linspace(0.2, 0.8, num_wrong))
    confidence = draw.permutation(calibrated)  # before calibration another image is the surest
    return Predictions(index, label, predicted, confidence, np.ones(NUM), np.ones(NUM, bool), calibrated, temperature=2.0)


def written(images: DataSplits, p: Predictions, folder: Path) -> list[dict[str, Any]]:
    """mistakes.json, beside the other files."""
    assert images.test is not None
    views = Views(images.test, Preprocess(8, 8), "none", False, 0)
    results.write_test(folder, {"top1": 0.5}, p, images.test, views, images.classes)
    mistakes: list[dict[str, Any]] = json.loads((folder / "mistakes.json").read_text())
    return mistakes


@pytest.mark.parametrize(("num_wrong", "num_shown"), [(60, 24), (25, 24), (24, 24), (5, 5), (0, 0)])
def test_the_surest_mistakes_are_shown_the_surest_first(num_wrong: int, num_shown: int, images: DataSplits, tmp_path: Path) -> None:
    p = said(images, num_wrong)
    mistakes = written(images, p, tmp_path)
    wrong = [n for n in range(NUM) if p.label[n] != p.predicted[n]]
    expected = sorted(wrong, key=lambda n: p.calibrated[n], reverse=True)[:num_shown]
    assert len(mistakes) == num_shown
    assert images.test is not None
    for mistake, n in zip(mistakes, expected, strict=True):
        position = int(p.position[n])
        assert mistake["id"] == images.test.ids[position]
        assert (mistake["label"], mistake["predicted"]) == (str(p.label[n]), str(p.predicted[n]))
        assert mistake["confidence"] == p.calibrated[n]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(mistake["png"]))))
        assert np.array_equal(shown, np.asarray(images.test.read(position)))  # 8 x 8 pixels, as the digits are


def test_of_equally_sure_mistakes_the_first_come_first(images: DataSplits, tmp_path: Path) -> None:
    p = said(images, 60)
    p.calibrated[:] = 0.5
    assert images.test is not None
    wrong = [images.test.ids[p.position[n]] for n in range(NUM) if p.label[n] != p.predicted[n]]
    assert [mistake["id"] for mistake in written(images, p, tmp_path)] == wrong[:24]


def test_every_prediction_has_a_row_in_the_order_of_the_split(images: DataSplits, tmp_path: Path) -> None:
    p = said(images, 60)
    written(images, p, tmp_path)
    assert images.test is not None
    with (tmp_path / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [images.test.ids[position] for position in p.position]
    assert [(row["label"], row["predicted"]) for row in rows] == list(zip(map(str, p.label), map(str, p.predicted), strict=True))
    assert [float(row["confidence"]) for row in rows] == pytest.approx(p.calibrated.tolist(), abs=5.1e-7)
    assert json.loads((tmp_path / "test_metrics.json").read_text()) == {"top1": 0.5}


def test_right_answers_are_shown_the_surest_of_each_class(images: DataSplits, tmp_path: Path) -> None:
    p = said(images, 20)
    written(images, p, tmp_path)
    shown = json.loads((tmp_path / "right_answers.json").read_text())
    right = [n for n in range(NUM) if p.label[n] == p.predicted[n]]
    surest = {c: max((n for n in right if p.label[n] == c), key=lambda n: p.calibrated[n]) for c in {int(p.label[n]) for n in right}}
    expected = sorted(surest.values(), key=lambda n: p.calibrated[n], reverse=True)[:8]
    assert images.test is not None
    assert [item["id"] for item in shown] == [images.test.ids[int(p.position[n])] for n in expected]
    assert all(item["label"] == item["predicted"] for item in shown)
