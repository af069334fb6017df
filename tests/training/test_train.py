"""A whole run: what it leaves, what it freezes, how it ends, and that it goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALL, HEAD, made_recipe
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score

from benchmarks import trials
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe, load
from tltrain.data.mixing import apply_mixup
from tltrain.evaluation.evaluate import evaluate
from tltrain.runs.metrics_log import read_rows
from tltrain.training.loop import OnStep
from tltrain.training.run import train

Made = Callable[..., Recipe]


def stop_after(num_steps: int, number: int = signal.SIGTERM) -> OnStep:
    """Send this process a signal once it has taken `num_steps` optimizer steps."""
    taken = iter(range(1, 10**6))

    def on_step(stage: str, step: int) -> None:
        if next(taken) == num_steps:
            os.kill(os.getpid(), number)

    return on_step


def test_a_run_leaves_everything_a_person_needs(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "recipe.yaml", "env.json", "plan.txt", "metrics-000001.jsonl", "checkpoints", "stages", "weights.safetensors",
        "test_metrics.json", "test_predictions.csv", "mistakes.json", "right_answers.json", "outcome.json", "report.html",
    }  # fmt: skip
    assert all("lit" in item for name in ("mistakes", "right_answers") for item in json.loads((finished_run / f"{name}.json").read_text()))
    assert json.loads((finished_run / "outcome.json").read_text())["outcome"] == "finished"
    assert {path.name for path in (finished_run / "stages").iterdir()} == {"0-head", "1-all"}
    kinds = [row["kind"] for row in read_rows(finished_run)]
    assert kinds.count("stage_end") == 2
    assert kinds[-1] == "test"
    plan = (finished_run / "plan.txt").read_text()
    assert "frozen" in plan
    assert "batch   16 = 1 process x 1 micro-batch x 16 images" in plan


def test_the_test_figures_equal_scikit_learn_on_the_predictions(finished_run: Path) -> None:
    with (finished_run / "test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    label, predicted = [r["label"] for r in rows], [r["predicted"] for r in rows]
    figures = json.loads((finished_run / "test_metrics.json").read_text())
    assert figures["n"] == len(rows) == 40
    assert figures["top1"] == accuracy_score(label, predicted)
    assert figures["f1_macro"] == pytest.approx(f1_score(label, predicted, average="macro", zero_division=0), abs=1e-12)
    assert np.sum(figures["confusion"]) == 40


def test_evaluate_gives_the_same_figures_from_the_folder_alone(finished_run: Path) -> None:
    kept = json.loads((finished_run / "test_metrics.json").read_text())
    again = evaluate(finished_run, None, "test", 128)
    assert again.pop("notes") == []
    assert again.pop("top1_low") < again["top1"] < again.pop("top1_high"), "which the report works out anew"
    assert {k: again[k] for k in again} == {k: kept[k] for k in again}


def test_a_stage_changes_exactly_the_blocks_it_trains(finished_run: Path, made_recipe: Made, tmp_path: Path) -> None:
    """Under AdamW with weight decay, BatchNorm buffers included."""
    from tltrain.models import factory

    recipe = made_recipe()
    start = factory.load(recipe.backbone, classes=[str(i) for i in range(10)], size=32, resize=32, head="new", seed=0)
    before, head = start.chain.net.state_dict(), load_file(finished_run / "stages" / "0-head" / "weights.safetensors")
    changed = {name for name in before if not torch.equal(before[name], head[name])}
    assert changed == {"fc.weight", "fc.bias"}
    stage = HEAD | {"name": "deep", "unfreeze": "layer4", "weight_decay": 0.1, "norm_stats": "train", "carry": "last"}
    train(made_recipe(stages=[stage]), RunFlags(folder=tmp_path / "run", workers=0))
    deep = load_file(tmp_path / "run" / "weights.safetensors")
    changed = {name for name in before if not torch.equal(before[name], deep[name])}
    assert changed == {name for name in before if name.startswith(("layer4.", "fc."))}


@pytest.mark.parametrize("num_steps", [1, 3, 4, 5, 8, 9])
def test_a_stopped_run_goes_on_and_ends_bit_for_bit_where_it_would_have(
    num_steps: int, finished_run: Path, made_recipe: Made, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = train(made_recipe(), RunFlags(folder=run, workers=0), stop_after(num_steps))
    assert outcome["outcome"] == "stopped"
    assert outcome["signal"] == "SIGTERM"
    assert (run / "report.html").exists()
    assert train(made_recipe(), RunFlags(folder=run, workers=0))["outcome"] == "finished"
    assert trials.differences(run, finished_run) == []


def test_a_finished_run_is_not_trained_again(finished_run: Path, made_recipe: Made) -> None:
    before = (finished_run / "weights.safetensors").stat().st_mtime_ns
    assert train(made_recipe(), RunFlags(folder=finished_run))["outcome"] == "finished"
    assert (finished_run / "weights.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_another_recipe_is_refused_with_the_difference(finished_run: Path, made_recipe: Made) -> None:
    with pytest.raises(UserError, match=r"stages\.0\.lr: 0\.01 -> 0\.5"):
        train(made_recipe(stages=[HEAD | {"lr": 0.5}, ALL]), RunFlags(folder=finished_run))


def test_a_folder_that_is_no_run_is_not_written_into(made_recipe: Made, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is no run folder"):
        train(made_recipe(), RunFlags(folder=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(made_recipe: Made, tmp_path: Path) -> None:
    stages = [HEAD, ALL | {"lr": 1e30, "optimizer": "sgd", "steps": 8, "schedule": "constant"}]
    outcome = train(made_recipe(stages=stages), RunFlags(folder=tmp_path / "run", workers=0))
    assert outcome["outcome"] == "failed"
    assert "in stage all, step" in outcome["error"]
    assert "learning rate 1e+30" in outcome["error"]
    kept = load_file(tmp_path / "run" / "stages" / "0-head" / "weights.safetensors")
    assert all(t.isfinite().all() for t in kept.values() if t.is_floating_point())


@pytest.mark.parametrize("val_fraction", [0.1, 0])
def test_weights_that_the_last_step_has_spoilt_are_not_handed_out(val_fraction: float, made_recipe: Made, tmp_path: Path) -> None:
    """The loss of a step says nothing of the weights behind it: the evaluation does, on val or at the end on test."""
    spoil = ALL | {"optimizer": "sgd", "lr": 1e30, "steps": 1, "schedule": "constant", "carry": "last"}
    recipe = made_recipe(stages=[HEAD, spoil], data={"val_fraction": val_fraction})
    outcome = train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    assert outcome["outcome"] == "failed"
    split = "val" if val_fraction else "test"
    assert f"the {split} loss became nan in stage all, step 1, at learning rate 1e+30" in outcome["error"]
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_patience_ends_the_stage_and_not_the_run(made_recipe: Made, tmp_path: Path) -> None:
    """The second evaluation without a better one ends it; the one before the first step does not count."""
    stages = [HEAD, HEAD | {"name": "still", "steps": 60, "lr": 1e-12, "patience": 2, "eval_epochs": 0.5, "carry": "best"}, ALL]
    train(made_recipe(stages=stages), RunFlags(folder=tmp_path / "run", workers=0))
    rows = read_rows(tmp_path / "run")
    ends = [(row["stage"], row["reason"], row["step"]) for row in rows if row["kind"] == "stage_end"]
    assert ends == [("head", "finished", 4), ("still", "early", 4), ("all", "finished", 5)]
    assert [row["step"] for row in rows if row["kind"] == "val" and row["stage"] == "still"] == [0, 2, 4]  # 30 of 60 images each
    assert [row["unchanged"] for row in rows if row["kind"] == "stage_end"] == [False, True, False]


def test_patience_waits_while_the_loss_falls(made_recipe: Made, tmp_path: Path) -> None:
    slow = HEAD | {"lr": 1e-4, "steps": 6, "patience": 1, "eval_epochs": 0.25}
    train(made_recipe(stages=[slow]), RunFlags(folder=tmp_path / "run", workers=0))
    rows = read_rows(tmp_path / "run")
    val = [row for row in rows if row["kind"] == "val"]
    assert len({row["top1"] for row in val}) < len(val), "the accuracy stands still here"
    assert [row["loss"] for row in val] == sorted((row["loss"] for row in val), reverse=True)
    assert next(row for row in rows if row["kind"] == "stage_end")["reason"] == "finished"


@pytest.mark.parametrize("select", ["top1", "loss", "f1_macro"])
def test_the_best_is_chosen_by_what_the_recipe_selects(select: str, made_recipe: Made, tmp_path: Path) -> None:
    """And handed on: val of the last weights is the best row's."""
    stages = [HEAD | {"lr": 0.003, "eval_epochs": 0.25}, ALL | {"lr": 0.05, "optimizer": "sgd", "steps": 8, "eval_epochs": 0.25}]
    train(made_recipe(select=select, stages=stages, data={"eval_limit": 60}), RunFlags(folder=tmp_path / "run", workers=0))
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "val"]

    def best_by(name: str) -> list[bool]:
        values = [(-row[name] if name == "loss" else row[name], -row["loss"]) for row in rows]  # of equal values the lower loss
        return [i > 0 and all(value > earlier for earlier in values[1:i]) for i, value in enumerate(values)]  # the first is untrained

    assert [row["best"] for row in rows] == best_by(select)
    assert len({tuple(best_by(name)) for name in ("top1", "loss", "f1_macro")}) == 3, "the three choose differently here"
    best = [row for row in rows if row["best"]][-1]
    again = evaluate(tmp_path / "run", None, "val", 128)
    assert [again[name] for name in ("top1", "loss", "f1_macro")] == pytest.approx([best[name] for name in ("top1", "loss", "f1_macro")])


def test_the_best_of_an_earlier_stage_is_not_forgotten(made_recipe: Made, tmp_path: Path) -> None:
    """A stage that spoils the network hands on its last weights; the next one still knows the best of all, and hands them on."""
    spoil = ALL | {"name": "spoil", "optimizer": "sgd", "lr": 0.5, "steps": 2, "carry": "last"}
    still = HEAD | {"name": "still", "steps": 2, "lr": 1e-12, "carry": "best"}
    train(made_recipe(stages=[HEAD, spoil, still]), RunFlags(folder=tmp_path / "run", workers=0))
    good, spoilt, last = (load_file(tmp_path / "run" / "stages" / s / "weights.safetensors") for s in ("0-head", "1-spoil", "2-still"))
    assert not torch.equal(spoilt["fc.weight"], good["fc.weight"])
    assert all(torch.equal(last[name], good[name]) for name in good)
    rows = [(row["stage"], row["step"]) for row in read_rows(tmp_path / "run") if row["kind"] == "val" and row["best"]]
    assert rows[-1] == ("head", 4)


def test_accumulation_and_one_batch_agree_without_batchnorm_statistics(finished_run: Path, made_recipe: Made, tmp_path: Path) -> None:
    train(made_recipe(stages=[HEAD]), RunFlags(folder=tmp_path / "run", workers=0, max_device_batch=3))
    ours = load_file(tmp_path / "run" / "stages" / "0-head" / "weights.safetensors")
    theirs = load_file(finished_run / "stages" / "0-head" / "weights.safetensors")
    assert "6 micro-batches x at most 3 images" in (tmp_path / "run" / "plan.txt").read_text()
    torch.testing.assert_close(ours["fc.weight"], theirs["fc.weight"], rtol=1e-3, atol=1e-6)


def test_a_student_learns_from_a_teacher_of_another_family(finished_run: Path, made_recipe: Made, tmp_path: Path) -> None:
    distill = {"teacher": {"weights": str(finished_run)}, "weight": 1.0, "temperature": 2.0}
    recipe = made_recipe(backbone={"name": "vit-tiny"}, distill=distill, stages=[ALL | {"steps": 2}])
    train(recipe, RunFlags(folder=tmp_path / "student", workers=0))
    rows = read_rows(tmp_path / "student")
    assert rows[0]["kind"] == "teacher"
    best = [row for row in read_rows(finished_run) if row["kind"] == "val" and row["best"]][-1]
    assert rows[0]["top1"] == best["top1"]
    assert rows[0]["loss"] == pytest.approx(best["loss"], rel=1e-6)


def test_a_teacher_of_other_classes_is_refused(finished_run: Path, made_recipe: Made, tmp_path: Path) -> None:
    recipe = made_recipe(data={"source": "printed"}, distill={"teacher": {"weights": str(finished_run)}})
    with pytest.raises(UserError, match="classes"):
        train(recipe, RunFlags(folder=tmp_path / "student", workers=0))


def test_clip_bites(made_recipe: Made, tmp_path: Path) -> None:
    """One step of SGD moves the weights by lr x the clipped norm, and no further."""
    spec = HEAD | {"steps": 1, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "clip": 1e-3, "carry": "last", "schedule": "constant"}
    train(made_recipe(stages=[spec]), RunFlags(folder=tmp_path / "run", workers=0))
    head = load_file(tmp_path / "run" / "weights.safetensors")
    moved = torch.cat([head["fc.weight"].flatten(), head["fc.bias"]]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_cutmix_and_mixup_pixels() -> None:
    x, y = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
    box, lam = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]]), torch.tensor([0.75, 0.25])
    blended = apply_mixup({"image": x, "partner_image": y, "lam": lam, "box": box})["image"]
    assert blended[0, :, :2, :2].max() == 0.0
    assert blended[0].mean().item() == pytest.approx(0.75)
    assert (blended[1] == 0.25).all()


def test_smoke_runs_everything_in_miniature(tmp_path: Path) -> None:
    recipe = load("digits-vit").smoke()
    assert train(recipe, RunFlags(folder=tmp_path / "run", smoke=True, workers=0))["outcome"] == "finished"
    steps = {row["stage"]: row["step"] for row in read_rows(tmp_path / "run") if row["kind"] == "stage_end"}
    assert set(steps.values()) == {2}
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text())["n"] == recipe.data.eval_limit


def test_the_loss_scale_of_fp16_goes_on_with_the_run(made_recipe: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that has grown is in the checkpoint, and the next start takes it up; a new stage begins with a fresh one."""
    from accelerate import Accelerator

    from tltrain.distributed import runtime
    from tltrain.distributed.strategies import Strategy

    taken: list[float] = []

    def with_scaler(**named: Any) -> Any:
        accelerator = Accelerator(**named)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        return accelerator

    load_extra = Strategy.load_extra

    def recorded(self: Strategy, saved: dict[str, Any]) -> None:
        taken.append(saved["scaler"]["scale"])
        load_extra(self, saved)

    monkeypatch.setattr(runtime, "Accelerator", with_scaler)
    monkeypatch.setattr(Strategy, "load_extra", recorded)
    assert train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0), stop_after(2))["outcome"] == "stopped"
    assert train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"
    assert len(taken) == 1
    assert taken[0] > 8.0


@pytest.mark.parametrize(("changes", "flags"), [({"batch": 1}, {}), ({}, {"max_device_batch": 1})])
def test_batch_norm_of_one_value_is_refused_before_the_first_step(changes: dict[str, Any], flags: dict[str, Any], tmp_path: Path) -> None:
    small = {"source": "digits", "size": 8, "resize": 8}
    recipe = made_recipe(stages=[HEAD, ALL | {"norm_stats": "train"}], data=small, **changes)
    with pytest.raises(UserError, match="stage all has norm_stats: train, and BatchNorm has no statistics of one image of 8 px"):
        train(recipe, RunFlags(folder=tmp_path / "run", workers=0, **flags))
    assert not (tmp_path / "run").exists()
