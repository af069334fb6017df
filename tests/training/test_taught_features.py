"""Pre-training on a teacher's features: by hand, stored and computed, resumed, on one and two processes, and what is refused."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_recipe, slow
from cut_runs import computed_and_stored, stopping_at
from digit_files import digit_folder, digit_image
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks import trials, world
from benchmarks.world import Trial
from tltrain.cache.frozen import FrozenModel
from tltrain.cli.main import main
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe, validate
from tltrain.data import open_images
from tltrain.data.views import Views
from tltrain.runs import checkpoint
from tltrain.runs.checkpoint import Best, Progress
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages import methods
from tltrain.runs.record import read_run
from tltrain.training.experiment import Experiment, check_objective
from tltrain.training.matching import linear_map
from tltrain.training.matching.features import feature_loss
from tltrain.training.matching.losses import cosine, smooth_l1
from tltrain.training.run import train

VIT = "shipped:vit-tiny-printed"
PRETRAIN = {"name": "pretrain", "unfreeze": "all", "steps": 7, "lr": 0.01, "views": 2, "augment": "light", "carry": "last"}
HEAD = {"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.01, "views": 1, "carry": "last"}


def features(**distill: Any) -> dict[str, Any]:
    return {"teacher": {"weights": VIT}, "target": "features", **distill}


def student(*stages: dict[str, Any], **changes: Any) -> Recipe:
    return made_recipe(**({"distill": features(), "stages": stages or (PRETRAIN, HEAD)} | changes))


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`labelled`, 80 train images of ten classes that the teacher does not know, and `loose`, twelve pictures."""
    digit_folder(tmp_path / "labelled", 10)
    (tmp_path / "loose").mkdir()
    for number in range(1000, 1012):
        digit_image(number).save(tmp_path / "loose" / f"{number}.png")
    return tmp_path


def of_pictures(pictures: Path, *stages: dict[str, Any]) -> Recipe:
    raw = student(*stages).model_dump(mode="json")
    raw["data"] = {"source": f"folder:{pictures / 'labelled'}", "size": 32, "resize": 32, "flip": False}
    raw["distill"]["unlabelled"] = f"folder:{pictures / 'loose'}"
    return validate(raw, "test")


def run(recipe: Recipe, folder: Path, **start: Any) -> Path:
    assert train(recipe, RunFlags(folder=folder, workers=0, **start))["outcome"] == "finished"
    return folder


def test_a_step_is_the_one_worked_out_by_hand(tmp_path: Path) -> None:
    """One step of SGD on all images at once, so that their order does not matter."""
    sgd = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "lr": 0.5, "steps": 1, "views": 1, "augment": "none"}
    recipe = student(PRETRAIN | sgd, HEAD, distill=features(loss="smooth_l1", logits="float32"))
    images = open_images(recipe.data)
    recipe = recipe.model_copy(update={"batch": len(images.train)})
    experiment = Experiment.open(recipe, images)
    chain, teacher = experiment.student.chain, experiment.teacher
    assert teacher is not None
    views = Views(images.train, experiment.student.preprocess, "none", False, recipe.data.seed)
    pixels_B3HW = torch.stack([views.view(i, 0) for i in range(len(images.train))])
    with torch.no_grad():
        taught_BD = teacher.chain(pixels_B3HW, stop=len(teacher.chain.blocks) - 1)
    assert (features_ := experiment.plan[0].features) is not None
    assert features_.num_out == taught_BD.shape[1] != features_.num_in == chain.net.get_submodule("fc").in_features
    linear_map.attach(chain, experiment.plan[0], recipe.seed)
    loss = F.smooth_l1_loss(chain(pixels_B3HW), taught_BD)
    loss.backward()
    folder = run(recipe, tmp_path / "run")
    assert read_rows(folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    got = load_file(folder / "stages" / "0-pretrain" / "weights.safetensors")
    moved = {name: parameter for name, parameter in chain.net.named_parameters() if "map_" not in name}
    assert len(moved) > 20
    for name, parameter in moved.items():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], (parameter - 0.5 * parameter.grad).detach(), rtol=1e-4, atol=1e-5)
    assert got["fc.weight"].abs().sum() == 0, "the head that a run begins with is handed on"


def test_the_losses_by_hand() -> None:
    ours, theirs = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]]).half()
    torch.testing.assert_close(cosine(ours, theirs), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(smooth_l1(ours, theirs), torch.tensor([(2.5 + 3.5) / 2, (0.5 + 1.5) / 2]))


def test_features_of_zeros_have_a_gradient_that_a_step_survives() -> None:
    ours = torch.zeros(1, 2, requires_grad=True)
    cosine(ours, torch.tensor([[3.0, 4.0]])).sum().backward()
    assert ours.grad is not None
    assert 0 < ours.grad.norm() < 1001


@pytest.mark.parametrize("changes", [{}, {"trains": "lora", "ema": 0.9, "carry": "ema", "unfreeze": "layer3", "mixup": 0.2}])
def test_a_run_is_the_same_stored_computed_and_resumed(
    changes: dict[str, Any], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = of_pictures(pictures, PRETRAIN | changes, HEAD)
    computed, stored = computed_and_stored(recipe, tmp_path)
    stop = stopping_at(("pretrain", 2), ("head", 1))
    flags = RunFlags(folder=tmp_path / "resumed", workers=0, cache="always")
    assert train(recipe, flags, on_step=stop)["outcome"] == "stopped"
    kept = checkpoint.load(checkpoint.committed(tmp_path / "resumed" / "checkpoints")[0])
    assert {"fc.map_weight", "fc.map_bias"} <= set(kept.weights)
    assert kept.optimizer is not None
    assert "fc.map_weight" in kept.optimizer
    assert [train(recipe, flags, on_step=stop)["outcome"] for _ in range(2)] == ["stopped", "finished"]
    assert trials.differences(tmp_path / "resumed", computed) == []
    names = set(load_file(computed / "weights.safetensors"))
    assert names == set(load_file(computed / "stages" / "0-pretrain" / "weights.safetensors"))
    assert not any("map" in name or "parametrizations" in name for name in names)
    plan = (stored / "plan.txt").read_text()
    assert "pretrain: the teacher's features, 2 views of 92 images x 192 B" in plan
    assert f"distil  pretrain: the 96 features of {VIT} (cosine, by a linear map in place of the head), without labels" in plan
    assert "head: features before head, train, 1 view of 80 images" in plan, "the stages after it learn from labelled images alone"
    assert "the teacher's logits" not in plan
    assert not [row for row in read_rows(stored) if row["stage"] == "pretrain" and row["kind"] == "val"]
    capsys.readouterr()
    assert main(["cache", "ls", "--json"]) == 0
    listed = capsys.readouterr().out
    assert "the teacher's features of pool" in listed
    assert "features before head of train" in listed, "pictures without labels teach in the first stage alone"
    assert main(["cache", "verify"]) == 0
    said = capsys.readouterr().out
    assert "\nteacher-" in said
    assert "0 with something wrong" in said


@pytest.mark.parametrize(("strategy", "num"), [slow("ddp", 2), slow("fsdp2", 2)])
def test_one_and_two_processes_train_alike(strategy: str, num: int, tmp_path: Path) -> None:
    spec = student(PRETRAIN | {"clip": 0.5}, HEAD, batch=13).model_dump(mode="json")
    one = world.finish(Trial(spec, str(tmp_path / "one"), float64=True))
    many = world.finish(Trial(spec, str(tmp_path / "many"), num, strategy, {"max_device_batch": 4}, float64=True))
    assert trials.distance(many, one) < 1e-9
    ours, theirs = ([row["loss"] for row in read_rows(folder) if row["kind"] == "train"] for folder in (many, one))
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow
def test_zero_starts_as_one_process_does(tmp_path: Path) -> None:
    spec = student(batch=13).model_dump(mode="json")
    one, many = (world.finish(Trial(spec, str(tmp_path / f"of {n}"), n, "zero3" if n > 1 else "ddp")) for n in (1, 2))
    ours, theirs = ([row["loss"] for row in read_rows(folder) if row["kind"] == "train"] for folder in (many, one))
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)


def test_a_backbone_teaches_without_a_run_and_a_head_is_solved_on_what_was_learned(finished_run: Path, tmp_path: Path) -> None:
    """A teacher that knows the classes of this data is one whose head is not asked, and a stage behind the first may be solved."""
    solved = {"name": "head", "unfreeze": "head", "solve": "ridge", "carry": "last"}
    ours, theirs = (
        run(student(PRETRAIN, solved, distill=features(teacher={"weights": weights})), tmp_path / name)
        for name, weights in (("of a run", str(finished_run)), ("of a backbone", "shipped:resnet-tiny-printed"))
    )
    first, second = (load_file(folder / "stages" / "0-pretrain" / "weights.safetensors") for folder in (ours, theirs))
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])
    assert [row["solve"] for row in read_rows(ours) if row["kind"] == "solve"] == ["ridge"]
    assert not [row for row in read_rows(ours) if row["kind"] == "teacher"], "its answers are of other classes"
    said = methods.paragraph(read_run(ours))
    assert f"Before it saw labels, in stage pretrain, the network learned the pooled features of the teacher {finished_run}" in said
    assert "softened answers" not in said
    assert "Loss (stage pretrain: cosine loss of the teacher's features)" in html.unescape((ours / "report.html").read_text())


def test_a_teachers_feature_that_float16_cannot_hold_is_thought_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "features exceed 65,504 and are kept in float16: set distill.logits: float32"
    monkeypatch.setattr(FrozenModel, "kept", lambda self, out: (out * 1e6).to(self.dtype))
    outcome = train(student(), RunFlags(folder=tmp_path / "short", workers=0))
    assert outcome["outcome"] == "failed"
    assert told in outcome["error"]
    run(student(distill=features(logits="float32")), tmp_path / "whole")


def test_a_plain_function_of_a_package_is_told_how_it_would_read_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", lambda kind, name, what: lambda student, teacher, temperature: student.sum(1))
    recipe = student().model_copy(deep=True)
    assert recipe.distill is not None
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"loss": "toy"})})
    with pytest.raises(UserError, match='or give it reads="features"'):
        feature_loss(recipe)


def test_the_untrained_head_behind_the_first_stage_is_never_the_best() -> None:
    figures = {"top1": 0.1, "loss": 2.3}
    begun, better = Progress(stage=1).after_evaluation(figures, "top1")
    assert (begun.best, better) == (None, False)
    _, better = Progress(stage=1, step=1).after_evaluation(figures, "top1")
    assert better
    best = Best(0.05, 0, 4, 2.4)
    assert Progress(stage=1, best=best).after_evaluation(figures, "top1")[1], "a later stage may begin with better ones"


@pytest.mark.parametrize(
    ("distill", "stages", "told"),
    [
        ({"weight": 0.5}, (), "weight: 0.5 leaves them a share; set weight: 1, and loss: cosine or smooth_l1"),
        ({"temperature": 2}, (), "temperature: 2 softens logits, and target: features has none"),
        ({"ensemble": [VIT]}, (), "the features of several networks have no mean; leave ensemble out"),
        ({}, (PRETRAIN,), "it is the only one: add stages behind it that learn labels"),
        ({}, (PRETRAIN | {"carry": "best"}, HEAD), "as carry: best asks; set carry: last, or ema"),
        ({}, (PRETRAIN | {"label_smoothing": 0.1, "patience": 2}, HEAD), "label_smoothing: 0.1, patience: 2 would do nothing there"),
        ({}, (PRETRAIN | {"ema": 0.9}, HEAD), "ema: 0.9 would do nothing there, leave it out"),
        ({}, (HEAD | {"solve": "ridge", "lr": None, "steps": None}, HEAD | {"name": "b"}), "solve: ridge would do nothing there"),
        ({}, (PRETRAIN, HEAD | {"unfreeze": "auto"}), "stage head has unfreeze: auto, which races depths by labels"),
        ({"loss": "dist"}, (), "distill.loss is dist, which compares answers to classes, and distill.target is features; take"),
        ({"loss": "dkd"}, (), "distill.loss is dkd, which compares answers"),
        ({"target": "logits", "loss": "cosine"}, (), "distill.loss is cosine, which compares features, and distill.target is logits"),
        ({"teacher": {"name": "resnet18"}}, (), "a resnet18 with random weights has no features worth learning; give weights"),
        ({}, (PRETRAIN | {"unfreeze": "head"}, HEAD), "no block below the head would: the linear map in place of the head is not"),
        ({}, (PRETRAIN, HEAD | {"carry": "blend"}), "carry: blend and is the first with labels, which starts from a new head of zeros"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_features_is_one_message(distill: dict[str, Any], stages: tuple[dict[str, Any], ...], told: str) -> None:
    def begun() -> None:
        recipe = student(*stages, distill=features(**distill))
        images = open_images(recipe.data)
        check_objective(recipe, images, 16)
        Experiment.outline(recipe, images, print)

    with pytest.raises(UserError) as refused:
        begun()
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2, "where it stands, and what is wrong"


@pytest.mark.parametrize(
    ("backbone", "teacher", "told"),
    [
        ({"name": "torchvision:squeezenet1_1"}, VIT, "the student torchvision:squeezenet1_1 learns a teacher's features"),
        ({"weights": VIT}, "squeezenet", "the teacher torchvision:squeezenet1_1 teaches its features"),
    ],
)
def test_a_network_without_pooled_features_is_refused(backbone: dict[str, Any], teacher: str, told: str) -> None:
    spec = {"weights": teacher} if teacher == VIT else {"name": "torchvision:squeezenet1_1", "weights": "DEFAULT"}
    recipe = student(backbone=backbone, distill=features(teacher=spec))
    with pytest.raises(UserError, match=told):
        Experiment.outline(recipe, open_images(recipe.data), print)
