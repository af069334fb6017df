"""The benchmark of rules that choose weights: its head is the one that a run trains, and each rule takes what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HEAD

from benchmarks import selection
from benchmarks.selection import RULES, Evaluation
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train

Made = Callable[..., Recipe]
STAGE = HEAD | {"views": 1, "steps": 12, "eval_epochs": 1, "weight_decay": 0.1, "label_smoothing": 0.1, "warmup": 0.2}


def test_it_trains_the_head_of_a_run(made_recipe: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation by evaluation, with test as val, so that both figures of the benchmark stand in the run's rows."""
    recipe = made_recipe(stages=[STAGE], data={"eval_limit": None})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "val"]
    seen: list[list[Evaluation]] = []
    stage = selection.head_stage

    def watched(*arguments: Any) -> list[Evaluation]:
        seen.append(stage(*arguments))
        return seen[-1]

    monkeypatch.setattr(selection, "head_stage", watched)
    found, sizes = selection.over_splits(recipe, 2)
    images = open_images(recipe.data)
    assert images.val is not None
    assert images.test is not None
    assert sizes == f"{len(images.train)} train, {len(images.val)} val, {len(images.test)} test"
    assert [at.val_top1 for at in seen[0]] == pytest.approx([row["top1"] for row in rows])
    assert [at.val_loss for at in seen[0]] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert len(rows) > 3
    assert found["the last weights"] == [at[-1].test_top1 for at in seen]
    assert seen[0] != seen[1], "each split is its own"


def test_rules_take_what_they_say() -> None:
    evaluations = [
        Evaluation(0.7, 0.9, 0),
        Evaluation(0.8, 0.8, 1),
        Evaluation(0.8, 0.6, 2),
        Evaluation(0.7, 0.5, 3),
        Evaluation(0.7, 0.7, 4),
    ]
    taken = [max(evaluations, key=key).test_top1 for rule, key in RULES.items() if rule != selection.LAST]
    assert taken == [2, 1, 3]
    assert "| select: loss | 2 | 55.0 | 7.1 | +5.0 (+0.0 to +10.0) |" in selection.show({"now": [0.5, 0.5], "select: loss": [0.5, 0.6]})


def test_a_first_stage_that_is_no_head_is_refused(made_recipe: Made) -> None:
    with pytest.raises(UserError, match="is not the head alone on view 0"):
        selection.over_splits(made_recipe(), 2)
