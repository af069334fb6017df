"""What a stage hands on: its average, or a blend of its start and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, made_recipe
from safetensors.torch import load_file
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.evaluation.evaluate import evaluate
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import read_run
from tltrain.training.run import train
from tltrain.training.weights.blend import SHARES, chosen

FAST = ALL | {"steps": 4, "lr": 0.008, "augment": "none", "schedule": "constant"}  # its end is worse than what lies before it
FIGURES = ("n", "loss", "top1", "f1_macro", "ece")


def run_of(folder: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    recipe = made_recipe(stages=list(stages), select="loss", **changes)
    assert train(recipe, RunFlags(folder=folder, workers=0))["outcome"] == "finished"
    return folder


def rows(run: Path, kind: str, stage: str = "all") -> list[dict[str, Any]]:
    return [row for row in read_rows(run) if row["kind"] == kind and row.get("stage") == stage]


def weights(run: Path, stage: str) -> dict[str, Tensor]:
    return load_file(run / "stages" / stage / "weights.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_stats": "train", "lr": 0.03},
        {"trains": "lora", "unfreeze": "layer3", "lr": 0.1},
        {"trains": "biases_and_norms", "lr": 0.1},
    ],
    ids=["all", "statistics", "lora", "biases"],
)
def test_a_blend_lies_between_the_stages_start_and_end(changes: dict[str, Any], tmp_path: Path) -> None:
    stage = FAST | changes
    run = run_of(tmp_path / "blend", HEAD, stage | {"carry": "blend"})
    end = weights(run_of(tmp_path / "last", HEAD, stage | {"carry": "last"}), "1-all")
    (found,), (first, *_, last) = rows(run, "blend"), rows(run, "val")
    curve = found["curve"]
    assert [share for share, _, _ in curve] == list(SHARES)
    assert curve[0][1:] == [first["loss"], first["loss"]], "exactly the figures of the start"
    assert curve[-1][1:] == [last["loss"], last["loss"]], "and of the end"
    share, _, loss = min(curve, key=lambda point: point[2])
    assert (found["share"], found["loss"]) == (share, loss)
    assert 0 < share < 1, "the task says something"
    assert loss < min(first["loss"], last["loss"])
    start, blended = weights(run, "0-head"), weights(run, "1-all")
    for name, tensor in blended.items():
        if name.endswith("running_var"):
            want = ((1 - share) * start[name].double().sqrt() + share * end[name].double().sqrt()).square()
        elif tensor.is_floating_point():
            want = (1 - share) * start[name].double() + share * end[name].double()
        else:
            want = (start if share < 0.5 else end)[name]
        assert torch.allclose(tensor.double(), want.double(), atol=1e-6), name
    assert any(not torch.equal(blended[name], end[name]) for name in end)
    assert evaluate(run, None, "val", 64)["loss"] == pytest.approx(loss, rel=1e-5), "what the run hands out is what was measured"
    assert ("interpolates BatchNorm" in (run / "plan.txt").read_text()) == (changes.get("norm_stats") == "train")
    page = (run / "report.html").read_text()
    assert "Val loss between start and end of stage all" in page
    assert f"handed on: {share:.0%} of the end" in page


def test_a_better_blend_is_the_best_of_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", HEAD, FAST | {"carry": "blend"}, HEAD | {"name": "still", "lr": 1e-30, "steps": 1, "carry": "best"})
    best = read_run(run).best
    assert best is not None
    assert best["kind"] == "blend"
    assert all(torch.equal(weights(run, "1-all")[name], tensor) for name, tensor in weights(run, "2-still").items())


def test_ties_of_a_blend_go_to_the_lower_loss() -> None:
    points = [(0.0, 0.5, 1.0), (0.1, 0.7, 0.9), (0.2, 0.7, 0.8), (0.3, 0.7, 0.8), (0.4, 0.6, 0.1)]
    found = [(share, {"top1": top1, "loss": loss}) for share, top1, loss in points]
    assert chosen(found, "top1")[0] == 0.2
    assert chosen(found, "loss")[0] == 0.4


def test_an_average_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    stages = HEAD, ALL | {"norm_stats": "train", "carry": "last"}
    plain = run_of(tmp_path / "plain", *stages)
    averaged = run_of(tmp_path / "averaged", stages[0], stages[1] | {"ema": 0.9})
    ours, theirs = weights(averaged, "1-all"), weights(plain, "1-all")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    kinds = ("train", "val")
    losses = [[row["loss"] for row in read_rows(run) if row["kind"] in kinds] for run in (averaged, plain)]
    assert losses[0] == losses[1]


def test_select_sees_the_average_that_is_carried(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", HEAD, FAST | {"ema": 0.9, "carry": "ema", "eval_epochs": 0.2})
    beside = run_of(tmp_path / "beside", HEAD, FAST | {"ema": 0.9, "carry": "last", "eval_epochs": 0.2})
    ours, theirs = rows(run, "val"), rows(beside, "val")
    assert len(ours) == 5
    for row, other in zip(ours, theirs, strict=True):
        assert [row[name] for name in FIGURES[1:]] == [other[f"ema_{name}"] for name in FIGURES[1:]]
        assert [row[f"last_{name}"] for name in FIGURES[1:]] == [other[name] for name in FIGURES[1:]]
    assert ours[0]["loss"] == ours[0]["last_loss"], "it begins with the stage's first weights"
    best = min(ours, key=lambda row: row["loss"])
    assert 0 < best["loss"] != best["last_loss"]
    assert best["best"]
    assert "val, not averaged" in (run / "report.html").read_text()
    assert "val, average" in (beside / "report.html").read_text()
    assert evaluate(run, None, "val", 64)["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_statistics_that_train_are_averaged_too(tmp_path: Path) -> None:
    """After one step the average is 0.1 of the start and 0.9 of the end."""
    stage = ALL | {"norm_stats": "train", "steps": 1, "unfreeze": "layer4", "carry": "last"}
    run = run_of(tmp_path / "last", HEAD, stage)
    average = weights(run_of(tmp_path / "ema", HEAD, stage | {"ema": 0.999, "carry": "ema"}), "1-all")
    start, end = weights(run, "0-head"), weights(run, "1-all")
    moved = [name for name in end if not torch.equal(start[name], end[name])]
    assert {"layer4.0.bn1.running_mean", "layer4.0.bn1.running_var", "layer4.0.bn1.num_batches_tracked"} <= set(moved)
    for name in moved:
        want = 0.1 * start[name] + 0.9 * end[name] if end[name].is_floating_point() else end[name]
        assert torch.allclose(average[name].double(), want.double(), atol=1e-6), name


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        ([HEAD | {"carry": "blend"}], {}, "is the first, which starts from a new head"),
        ([HEAD, ALL | {"carry": "blend"}], {"data": {"val_fraction": 0}}, "carry: blend and there is no val split"),
        ([HEAD | {"carry": "ema"}], {}, "carry: ema and ema is null"),
    ],
)
def test_what_cannot_be_handed_on_is_refused(stages: list[dict[str, Any]], changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(made_recipe(stages=stages, **changes), RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()


def test_without_val_the_last_average_is_carried(tmp_path: Path) -> None:
    recipe = made_recipe(stages=[HEAD | {"steps": 2, "ema": 0.9, "carry": "ema"}], data={"val_fraction": 0})
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"
    last = made_recipe(stages=[HEAD | {"steps": 2, "carry": "last"}], data={"val_fraction": 0})
    assert train(last, RunFlags(folder=tmp_path / "last", workers=0))["outcome"] == "finished"
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors")["fc.weight"] for name in ("run", "last"))
    assert not torch.equal(ours, theirs)
    assert ours.abs().max() > 0


def test_the_untrained_head_is_never_the_best(tmp_path: Path) -> None:
    """It says nothing, and of two heads that are equally often right on a small split it would have the lower loss."""
    run = run_of(tmp_path / "run", HEAD | {"steps": 4, "lr": 30.0}, ALL | {"steps": 1, "lr": 1e-6, "augment": "none"})
    first, *later = rows(run, "val", "head")
    assert not first["best"]
    assert min(row["loss"] for row in later) > 2 * first["loss"], "each trained one is worse here"
    assert later[0]["best"]
    assert load_file(run / "weights.safetensors")["fc.weight"].abs().max() > 0
