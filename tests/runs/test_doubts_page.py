"""The report's section on sets of classes and answers withheld: every figure that was counted stands there, and nothing without them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
from fake_run import fake_run

from tltrain.runs.pages.doubts import doubts
from tltrain.runs.record import read_run
from tltrain.uncertainty import abstain, conformal
from tltrain.uncertainty.answers import Answers


def made(folder: Path, num_val: int) -> Path:
    """A run whose test has 40 images: the surest 30 right, of the others every second; two classes, the second is covered less."""
    run = fake_run(folder, ["cat", "dog <b>"])
    val = Answers(np.linspace(0.5, 1, num_val), np.linspace(0.4, 0.9, num_val), np.ones(num_val, bool))
    confidence, right = np.linspace(0.4, 0.99, 40), (np.arange(40) >= 10) | (np.arange(40) % 2 == 0)
    test = Answers(confidence, np.where(right, confidence, 0.1), right)
    sizes, label = np.where(confidence > 0.6, 1, 2), np.arange(40) % 2
    sets = [conformal.figures(s, test, sizes, label, ["cat", "dog <b>"]) for s in conformal.reachable(val)]
    rules = [abstain.figures(abstain.fit_abstention(val, target), test) for target in abstain.TARGETS]
    file = run / "test_metrics.json"
    figures = json.loads(file.read_text()) | {"sets": sets, "abstain": rules, "answered_curve": abstain.curve(test)}
    file.write_text(json.dumps(figures))
    return run


def text_of(run: Path) -> str:
    section = doubts(read_run(run))
    assert section is not None
    return unescape(re.sub(r"<[^>]+>", " ", str(section))).replace("\u202f", " ")


def test_the_section_says_what_was_counted(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", text_of(made(tmp_path / "run", 20)))
    assert "luck of which 20 images are in val" in text
    assert "90 % 75 to 99 87.5 73.9 to 94.5" in text  # 35 of 40 on test; Beta(19, 2) and Wilson by hand
    assert "95 % 83 to 100" in text
    assert "99 % 9" not in text.partition("By class")[0], "20 val images promise no 99 %"
    by_class = text.partition("By class, 90 % promised")[2]
    assert by_class.index("dog <b>") < by_class.index("cat"), "the least covered first"
    assert "dog <b> 20 75.0" in by_class
    assert "Accuracy of the answers" in text


def test_groups_of_val_are_said(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 20)
    assert "groups" not in text_of(run)
    file = run / "test_metrics.json"
    file.write_text(file.read_text().replace('"num_groups": null', '"num_groups": 5'))
    assert "lie in 5 groups of images that are alike" in text_of(run)


def test_a_network_that_is_always_right_has_a_chart(tmp_path: Path) -> None:
    run = made(tmp_path / "run", 20)
    file = run / "test_metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"answered_curve": [[0.5, 1.0], [1.0, 1.0]]}))
    assert " 96 97 98 99 100 " in re.sub(r"\s+", " ", text_of(run))


def test_a_val_that_is_too_small_is_said_and_older_runs_have_no_section(tmp_path: Path) -> None:
    small = text_of(made(tmp_path / "small", 8))
    assert "Val has 8 images, too few to promise a coverage: 90 % takes 9, 95 % 19, 99 % 99." in small
    assert "too few to promise anything of answers withheld: 90 % takes 57, 95 % 117, 99 % 597, all right." in small
    assert "Promised" not in small
    assert "Accuracy of the answers" in small, "which is of test, and stands on its own"
    assert "Promised, %" in text_of(made(tmp_path / "large", 57))
    assert doubts(read_run(fake_run(tmp_path / "old", ["a", "b"]))) is None
