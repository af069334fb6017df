"""What a recipe asks for is what is trained: runs against an independent loop in plain PyTorch, loss by loss and weight by weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_files import digit_image
from plain_loop import PlainBatch, PlainLoss, PlainNet, authors_dist, authors_dkd, plain_stage
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks import plants, trials, world
from benchmarks.world import Trial
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe, validate
from tltrain.data import Split, open_images
from tltrain.data.sampler import SampleRef, SampleStream, derive_seed
from tltrain.data.unlabelled.pictures import apart, beside
from tltrain.data.views import Preprocess, Views
from tltrain.runs.metrics_log import read_rows
from tltrain.training import experiment
from tltrain.training.run import train

COUNTS = (2, 9, 4, 6, 3, 7, 2, 5, 8, 3)  # images of each digit: unbalanced
STAGE = {
    "name": "one", "unfreeze": "all", "steps": 4, "lr": 0.02, "optimizer": "sgd", "momentum": 0.9, "schedule": "constant",
    "augment": "light", "carry": "last",
}  # fmt: skip
OTHER = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3)}  # not the teacher's


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, target = tmp_path_factory.mktemp("photos"), load_digits().target
    for k, count in enumerate(COUNTS):
        (root / f"{k}").mkdir()
        for number in np.flatnonzero(target == k)[:count]:
            digit_image(int(number)).save(root / f"{k}" / f"{number}.png")
    return root


def recipe_of(photos: Path, *stages: dict[str, Any], net: str = "resnet-tiny", **changes: Any) -> Recipe:
    data = {"source": f"folder:{photos}", "seed": 5, "size": 32, "resize": 36, "flip": False, "val_fraction": 0, "test_fraction": 0}
    raw: dict[str, Any] = {
        "name": "objective",
        "seed": 3,
        "batch": 13,
        "backbone": trials.NETS[net] | {k: changes.pop(k) for k in OTHER if k in changes},
        "data": data | changes.pop("data", {}),
        "stages": [STAGE | stage for stage in stages],
    }
    return validate(raw | changes, "test")


def plain_nets(recipe: Recipe) -> tuple[PlainNet, PlainNet | None]:
    """The networks that the run begins with."""
    images = open_images(recipe.data)
    student, teacher = plants.fill_head(experiment.open_nets, recipe, images)
    return tuple(None if n is None else PlainNet(n.chain.net.eval(), n.chain.mean, n.chain.std) for n in (student, teacher))  # type: ignore[return-value]


def plain_batches(recipe: Recipe, index: int, first_epoch: int = 0, draw_weights: tuple[float, ...] | None = None) -> list[PlainBatch]:
    """The pixels of each step of a stage: who is in it is a pure function, which other tests watch."""
    stage, images = recipe.stages[index], open_images(recipe.data)
    split = apart(images, beside(images, recipe).unlabelled, recipe.data.source).pool
    stream = SampleStream(
        recipe.seed, index, len(split), recipe.batch, stage.views, first_epoch, draw_weights, stage.mixup, stage.cutmix, size=32
    )
    views = Views(split, Preprocess(32, 36), stage.augment, recipe.data.flip, recipe.data.seed)
    assert stage.steps is not None
    return [_batch(stream.step(step), split, views) for step in range(stage.steps)]


def _batch(items: Sequence[SampleRef], split: Split, views: Views) -> PlainBatch:
    pixels = torch.stack([views.view(item.position, item.view) for item in items])
    labels = torch.tensor([int(split.labels[item.position]) for item in items])
    if items[0].partner < 0:
        return PlainBatch(pixels, labels)
    partners = torch.stack([views.view(item.partner, item.partner_view) for item in items])
    partner_labels = torch.tensor([int(split.labels[item.partner]) for item in items])
    return PlainBatch(pixels, labels, partners, partner_labels, tuple(i.lam for i in items), tuple(i.box for i in items))


@pytest.fixture
def with_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process in float64, from a head that is not zero."""
    monkeypatch.setattr(experiment, "open_nets", partial(plants.fill_head, experiment.open_nets))


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if row["kind"] == "train"]


def assert_equal(run: Path, losses: Sequence[float], student: PlainNet) -> None:
    assert len(set(losses)) == len(losses), "the task says something"
    assert losses_of(run) == pytest.approx(losses, rel=1e-6)  # the pixels, the mixing and the teacher's logits are fp32 or less
    ours, theirs = load_file(run / "weights.safetensors"), student.net.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.is_floating_point():  # the bias of a key projection has no gradient but rounding
            assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm().clamp_min(1e-4), name


def sgd(student: PlainNet, lr: float = 0.02, trained: str = "") -> list[dict[str, Any]]:
    return [{"params": [p for name, p in student.net.named_parameters() if name.startswith(trained)], "lr": lr}]


SGD = partial(torch.optim.SGD, momentum=0.9, fused=False, foreach=False)
INVERSE = [sum(COUNTS) / len(COUNTS) / count for count in COUNTS]


@pytest.mark.parametrize(
    ("stage", "changes", "loss", "start"),
    [
        ({}, {}, PlainLoss(), {}),
        ({"mixup": 0.4}, {}, PlainLoss(), {}),
        ({"cutmix": 1.0}, {}, PlainLoss(), {}),
        ({"mixup": 0.4, "cutmix": 1.0}, {}, PlainLoss(), {}),
        ({"label_smoothing": 0.2}, {}, PlainLoss(smoothing=0.2), {}),
        ({"mixup": 0.4, "label_smoothing": 0.2}, {"data": {"balance": "weights"}}, PlainLoss(0.2, INVERSE), {}),
        ({}, {"data": {"balance": "weights"}}, PlainLoss(class_weights=INVERSE), {}),
        ({"mixup": 0.4}, {}, PlainLoss(), {"max_device_batch": 5}),
    ],
    ids=["plain", "mixup", "cutmix", "both", "smoothing", "mixed, weighed and smoothed", "weights", "uneven micro-batches"],
)
@pytest.mark.usefixtures("with_head")
def test_an_objective_reaches_the_weights(
    stage: dict[str, Any], changes: dict[str, Any], loss: PlainLoss, start: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(photos, stage, **changes)
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0, **start))
    student, _ = plain_nets(recipe)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), loss, sgd(student), SGD)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
def test_classes_are_drawn_equally_often(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(photos, {}, data={"balance": "sampler"})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    labels = open_images(recipe.data).train.labels
    student, _ = plain_nets(recipe)
    batches = plain_batches(recipe, 0, draw_weights=tuple(INVERSE[label] for label in labels))
    losses, _ = plain_stage(student, batches, PlainLoss(), sgd(student), SGD)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
def test_each_stage_has_its_own_blocks_order_and_views(photos: Path, tmp_path: Path) -> None:
    """The second begins where the first ended: with its weights, in an order of its own, with views that no epoch before has seen."""
    recipe = recipe_of(
        photos, {"unfreeze": "layer4", "schedule": "cosine", "clip": 0.5}, {"name": "two", "schedule": "cosine", "lr": 0.01, "steps": 5}
    )
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, _ = plain_nets(recipe)
    late = [{"params": [p for n, p in student.net.named_parameters() if n.startswith(("layer4", "fc"))], "lr": 0.02}]
    losses, factors = plain_stage(student, plain_batches(recipe, 0), PlainLoss(), late, SGD, clip=0.5, schedule="cosine")
    first_epoch = -(-4 * 13 // sum(COUNTS))
    assert first_epoch == 2, "the first stage touches two epochs"
    second = plain_stage(student, plain_batches(recipe, 1, first_epoch), PlainLoss(), sgd(student, 0.01), SGD, schedule="cosine")
    assert_equal(tmp_path / "run", losses + second[0], student)
    logged = [row["lr"] for row in read_rows(tmp_path / "run") if row["kind"] == "train"]
    assert logged == pytest.approx([0.02 * f for f in factors] + [0.01 * f for f in second[1]], rel=1e-12)


@pytest.mark.usefixtures("with_head")
def test_adamw_decays_layer_by_layer_and_spares_what_it_should(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(photos, {"optimizer": "adamw", "lr": 1e-3, "layer_decay": 0.6, "weight_decay": 0.5}, net="vit-tiny", **OTHER)
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, _ = plain_nets(recipe)
    depth = {"classifier": 0, "vit.layernorm": 1} | {f"vit.layers.{i}": 4 - i for i in range(4)} | {"vit.embeddings": 5}
    groups = []
    for name, parameter in student.net.named_parameters():
        (below_head,) = {steps for prefix, steps in depth.items() if name.startswith(prefix + ".")}
        spared = name.endswith((".bias", "cls_token", "position_embeddings")) or "layernorm" in name
        groups.append({"params": [parameter], "lr": 1e-3 * 0.6**below_head, "weight_decay": 0.0 if spared else 0.5})
    assert sum(group["weight_decay"] == 0 for group in groups) > 20
    adamw = partial(torch.optim.AdamW, fused=False, foreach=False)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), PlainLoss(), groups, adamw)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
@pytest.mark.parametrize(("stage", "logits"), [({}, "float16"), ({"mixup": 0.4, "cutmix": 1.0}, "float32")], ids=["alone", "mixed"])
def test_a_teacher_is_asked_what_the_student_sees(
    stage: dict[str, Any], logits: str, photos: Path, finished_run: Path, tmp_path: Path
) -> None:
    """A trained teacher of another family, another mean and another standard deviation; three tenths are the labels' part."""
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.7, "logits": logits}
    recipe = recipe_of(photos, stage, net="vit-tiny", distill=distill, **OTHER)
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, teacher = plain_nets(recipe)
    assert teacher is not None
    assert tuple(teacher.mean) != OTHER["mean"]
    loss = PlainLoss(teacher=teacher, temperature=2.0, weight=0.7, teacher_dtype=getattr(torch, logits))
    losses, _ = plain_stage(student, plain_batches(recipe, 0), loss, sgd(student), SGD)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
@pytest.mark.parametrize(("loss", "formula"), [("dist", authors_dist), ("dkd", authors_dkd)], ids=["dist", "dkd"])
def test_a_loss_of_the_literature_reaches_the_weights(loss: str, formula: Any, photos: Path, finished_run: Path, tmp_path: Path) -> None:
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.7, "logits": "float32", "loss": loss}
    recipe = recipe_of(photos, {}, net="vit-tiny", distill=distill, **OTHER)
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, teacher = plain_nets(recipe)
    plain = PlainLoss(teacher=teacher, temperature=2.0, weight=0.7, term=formula)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), plain, sgd(student), SGD)
    assert_equal(tmp_path / "run", losses, student)
    assert "micro-batches" not in (tmp_path / "run" / "plan.txt").read_text()


def test_two_processes_compare_the_images_of_both(photos: Path, loose: Path, finished_run: Path, tmp_path: Path) -> None:
    """dist, 7 images on one process and 6 on the other, labelled or not: the weights are those of the formula over all 13."""
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.7, "logits": "float32", "loss": "dist"}
    recipe = recipe_of(photos, {"clip": 8.0}, net="resnet-tiny", distill=distill | {"unlabelled": f"folder:{loose}"}, **OTHER)
    run = world.finish(Trial(recipe.model_dump(mode="json"), str(tmp_path / "run"), 2, before="begin_with_a_head"))
    student, teacher = plain_nets(recipe)
    loss = PlainLoss(teacher=teacher, temperature=2.0, weight=0.7, term=authors_dist)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), loss, sgd(student), SGD, clip=8.0)
    assert_equal(run, losses, student)


def test_the_plan_says_within_how_many_images_a_loss_compares(photos: Path, finished_run: Path, tmp_path: Path) -> None:
    recipe = recipe_of(photos, {}, distill={"teacher": {"weights": str(finished_run)}, "loss": "dist"})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0, max_device_batch=5))
    plan = (tmp_path / "run" / "plan.txt").read_text()
    assert "note    dist compares the images of a micro-batch of all processes, 4 of 13, so the result depends on" in plan
    assert "0.9 x dist at T = 4" in plan
    with pytest.raises(UserError, match=r"compares the images of a micro-batch, and one has 1; raise batch or --max-device-batch"):
        train(recipe, RunFlags(folder=tmp_path / "alone", workers=0, max_device_batch=1))
    assert not (tmp_path / "alone").exists()


def test_a_loss_that_reads_labels_refuses_mixed_images(photos: Path, finished_run: Path, tmp_path: Path) -> None:
    dkd = {"teacher": {"weights": str(finished_run)}, "loss": "dkd"}
    recipe = recipe_of(photos, {"cutmix": 1.0}, distill=dkd)
    told = r"distill.loss is dkd, which reads the one label of an image, and stage one has cutmix, whose images have two; set cutmix: 0"
    with pytest.raises(UserError, match=told):
        train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    with pytest.raises(UserError, match=r"dkd, which reads labels, and the pictures of distill.unlabelled \(digits\) have none; take"):
        train(recipe_of(photos, {}, distill=dkd | {"unlabelled": "digits"}), RunFlags(folder=tmp_path / "run", workers=0))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures without class folders, two of them further down."""
    root = tmp_path_factory.mktemp("loose")
    (root / "more").mkdir()
    for number in range(1000, 1011):
        digit_image(number).save(root / ("more" if number > 1008 else "") / f"{number}.png")
    return root


@pytest.mark.usefixtures("with_head")
@pytest.mark.parametrize("stage", [{}, {"mixup": 0.4, "label_smoothing": 0.1}], ids=["alone", "mixed and smoothed"])
def test_pictures_without_labels_have_the_teachers_term_alone(
    stage: dict[str, Any], photos: Path, loose: Path, finished_run: Path, tmp_path: Path
) -> None:
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.7, "logits": "float32"}
    recipe = recipe_of(photos, stage, net="vit-tiny", distill=distill | {"unlabelled": f"folder:{loose}"}, **OTHER)
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, teacher = plain_nets(recipe)
    batches = plain_batches(recipe, 0)
    assert sum(int((batch.labels < 0).sum()) for batch in batches) > 5
    loss = PlainLoss(stage.get("label_smoothing", 0.0), teacher=teacher, temperature=2.0, weight=0.7)
    losses, _ = plain_stage(student, batches, loss, sgd(student), SGD)
    assert_equal(tmp_path / "run", losses, student)


def test_two_processes_train_on_the_mean_over_the_global_batch(photos: Path, finished_run: Path, tmp_path: Path) -> None:
    """7 images on one, 6 on the other, one at a time, so that the last is empty there; everything that weighs a sample at once.

    A clip that always bites would hide a gradient that is too small.
    """
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.7, "logits": "float32"}
    stage = {"mixup": 0.4, "label_smoothing": 0.1, "clip": 8.0}
    recipe = recipe_of(photos, stage, net="resnet-tiny", data={"balance": "weights"}, distill=distill, **OTHER)
    spec, start = recipe.model_dump(mode="json"), {"max_device_batch": 1}
    run = world.finish(Trial(spec, str(tmp_path / "run"), 2, start=start, before="begin_with_a_head"))
    student, teacher = plain_nets(recipe)
    loss = PlainLoss(0.1, INVERSE, teacher, temperature=2.0, weight=0.7)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), loss, sgd(student), SGD, clip=8.0)
    assert_equal(run, losses, student)


def test_every_forward_drops_something_else(photos: Path, tmp_path: Path) -> None:
    """In each stage, step, micro-batch and process."""
    backbone = trials.NETS["resnet-tiny"] | {"dropout": 0.5}
    stages = ({"unfreeze": "head", "steps": 2}, {"name": "two", "steps": 2})
    recipe = recipe_of(photos, *stages, backbone=backbone, batch=12)
    masks = tmp_path / "masks"
    trial = Trial(recipe.model_dump(mode="json"), str(tmp_path / "run"), 2, start={"max_device_batch": 3})
    world.finish(Trial(**{**trial.__dict__, "before": "record_masks", "arguments": (str(masks),)}))
    lines = [line for rank in range(2) for line in Path(f"{masks}.rank{rank}").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 * 2, "stages, steps, micro-batches, processes"
    assert {line.rpartition(" ")[0] for line in lines} == {"(3, 128)"}
    assert len(set(lines)) == len(lines)


class PlainLora(nn.Module):
    """A network whose linear layers have W + alpha / rank * B @ A in place of W. Only A, B and the head train."""

    def __init__(self, net: nn.Module, seed: int, rank: int, alpha: float, head: str) -> None:
        super().__init__()
        self.net, self.scale, self.head, self.added = [net], alpha / rank, head, nn.ParameterDict()  # in a list: no submodule
        generator = torch.Generator().manual_seed(seed)
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear) and name != head:
                bound = module.in_features**-0.5
                a = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
                self.added[f"{name}/a".replace(".", "|")] = nn.Parameter(a.double())
                self.added[f"{name}/b".replace(".", "|")] = nn.Parameter(torch.zeros(module.out_features, rank, dtype=torch.float64))

    def weights(self) -> dict[str, Tensor]:
        found = dict(self.net[0].state_dict(keep_vars=True))
        for key, a in self.added.items():
            layer = key.replace("|", ".").removesuffix("/a")
            if key.endswith("/a"):
                found[f"{layer}.weight"] = found[f"{layer}.weight"] + self.scale * self.added[key.replace("/a", "/b")] @ a
        return found

    def forward(self, x_BCHW: Tensor) -> Any:
        return torch.func.functional_call(self.net[0], self.weights(), (x_BCHW,))

    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        return {name: tensor.detach() for name, tensor in self.weights().items()}


@pytest.mark.usefixtures("with_head")
def test_lora_trains_low_rank_updates_and_hands_on_plain_weights(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(photos, {"trains": "lora", "lora_rank": 3, "lora_alpha": 12, "lr": 0.05}, net="vit-tiny")
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    start, _ = plain_nets(recipe)
    for parameter in start.net.parameters():
        parameter.requires_grad_(False)
    plain = PlainLora(start.net, derive_seed(3, "lora", 0), 3, 12, "classifier")
    assert len(plain.added) == 2 * 4 * 6, "queries, keys, values, output and two of the MLP in each of four layers"
    head = list(start.net.get_submodule("classifier").parameters())
    groups = [{"params": [*plain.added.values(), *head], "lr": 0.05}]
    student = PlainNet(plain.eval(), start.mean, start.std)
    losses, _ = plain_stage(student, plain_batches(recipe, 0), PlainLoss(), groups, SGD)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
def test_biases_and_norms_train_and_nothing_else_below_the_head(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(photos, {"trains": "biases_and_norms", "unfreeze": "layer3"})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, _ = plain_nets(recipe)
    norms = [f"layer{n}.0.{norm}." for n in (3, 4) for norm in ("bn1", "bn2", "downsample.1")]
    groups: list[dict[str, Any]] = [{"params": [p for n, p in student.net.named_parameters() if n.startswith((*norms, "fc"))], "lr": 0.02}]
    assert sum(len(group["params"]) for group in groups) == 2 * len(norms) + 2
    losses, _ = plain_stage(student, plain_batches(recipe, 0), PlainLoss(), groups, SGD)
    assert_equal(tmp_path / "run", losses, student)


@pytest.mark.usefixtures("with_head")
@pytest.mark.parametrize("limit", [0.9, 0.15])
def test_the_average_of_the_weights_is_carried(limit: float, photos: Path, tmp_path: Path) -> None:
    """It begins with the stage's first weights, and its decay rises from 0.1 to its limit."""
    recipe = recipe_of(photos, {"ema": limit, "carry": "ema"})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    student, _ = plain_nets(recipe)
    average = {name: tensor.detach().clone() for name, tensor in student.net.named_parameters()}
    steps = itertools.count()

    def averaged(*_: Any) -> None:
        step = next(steps)
        decay = min(limit, (1 + step) / (10 + step))
        for name, tensor in student.net.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * tensor.detach()

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = SGD(groups)
        made.register_step_post_hook(averaged)
        return made

    losses, _ = plain_stage(student, plain_batches(recipe, 0), PlainLoss(), sgd(student), optimizer)
    assert next(steps) == 4
    student.net.load_state_dict(average, strict=False)
    assert_equal(tmp_path / "run", losses, student)
