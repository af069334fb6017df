"""Backbones compared on several labels an image: mean average precision as scikit-learn's, and intervals by the bootstrap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from label_files import label_pictures
from sklearn.metrics import average_precision_score

import tltrain
from tltrain.analysis.probe import judge
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.evaluation.multilabel.judged import by_logits
from tltrain.heads.neighbours import neighbours


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "time_frozen", lambda frozen, side, device: (0.001, 512))


def _answers(num: int = 150) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    logits_NK = random.normal(size=(num, 4))
    return logits_NK, (random.random((num, 4)) < 1 / (1 + np.exp(2 - logits_NK * (2, 1, 0, 1)))).astype(np.uint8) * (1, 1, 1, 0)


def test_the_mean_is_scikit_learns_over_the_labels_that_images_have() -> None:
    logits_NK, label_NK = _answers()
    found = by_logits(logits_NK, label_NK, None)
    each = [average_precision_score(label_NK[:, k], logits_NK[:, k]) for k in range(3)]
    assert found.value == pytest.approx(np.mean(each), rel=1e-12)
    again = np.random.default_rng(0).integers(0, 150, 150)  # the first draw: images that count as often as they were drawn
    drawn = [average_precision_score(label_NK[again, k], logits_NK[again, k]) for k in range(3)]
    assert found.draws[0] == pytest.approx(np.mean(drawn), rel=1e-12)
    _, low, high = found.interval
    assert low < found.value < high
    assert by_logits(logits_NK, label_NK, None).draws.tolist() == found.draws.tolist()
    grouped = by_logits(np.repeat(logits_NK, 4, 0), np.repeat(label_NK, 4, 0), np.arange(600) // 4)
    alone = by_logits(np.repeat(logits_NK, 4, 0), np.repeat(label_NK, 4, 0), None)
    assert np.ptp(grouped.interval[1:]) > 1.5 * np.ptp(alone.interval[1:])


def test_equal_logits_order_no_image() -> None:
    label_NK = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.uint8)  # by number, the first label would be found at once
    found = by_logits(np.zeros((4, 2)), label_NK, None)
    assert found.value == pytest.approx(0.5)
    assert found.value == average_precision_score(label_NK, np.zeros((4, 2)))


def test_neighbours_give_each_label_the_share_of_their_votes() -> None:
    random = np.random.default_rng(0)
    label_NK = random.integers(0, 2, (60, 3))
    features_ND = torch.from_numpy(random.normal(size=(60, 5)))
    share_NK = neighbours(features_ND, label_NK, 3, 4).sigmoid()
    one_N = neighbours(features_ND, label_NK[:, 0], 2, 4).softmax(1)[:, 1]  # a label is one of two classes
    assert torch.corrcoef(torch.stack([share_NK[:, 0], one_N]))[0, 1] > 0.99
    assert (neighbours(features_ND, np.ones((60, 3)), 3, 4) > 0).all()


def test_a_probe_of_labels_from_the_command_line_and_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_pictures(tmp_path, 120)
    words = ["probe", f"csv:{tmp_path}/sets.csv", "--backbones", "resnet-tiny", "--k", "4", "--workers", "0", "--size", "16"]
    words += ["--out", str(tmp_path / "probe.html")]
    assert main([*words, "--label-separator", "|"]) == 0
    shown = capsys.readouterr().out
    assert "mAP %" in shown
    assert "a random order of 3 labels gives" in " ".join(shown.split())
    assert "mAP against cost" in (tmp_path / "probe.html").read_text(encoding="utf-8")
    assert main([*words, "--json", "--label-separator", "|"]) == 0
    said = json.loads(capsys.readouterr().out)
    (row,) = tltrain.probe(
        f"csv:{tmp_path}/columns.csv", ["resnet-tiny"], k=4, size=16, label_columns=["Column", "Row", "Square"], workers=0
    )
    assert said["figure"] == "map"
    assert row.accuracy == pytest.approx(said["rows"][0]["accuracy"])
    assert row.low < row.accuracy <= row.high
    assert row.accuracy > said["baseline"] + 0.2
    with pytest.raises(UserError, match="nearest_mean, which is of one class"):
        tltrain.probe(f"csv:{tmp_path}/sets.csv", ["resnet-tiny"], head="nearest_mean", label_separator="|")
