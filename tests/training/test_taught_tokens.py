"""Pre-training on the map of a teacher (distill.target: tokens): by hand, stored and computed, resumed, and what is refused."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import made_recipe, slow
from cut_runs import computed_and_stored, stopping_at
from safetensors.torch import load_file
from test_taught_features import HEAD, PRETRAIN, of_pictures, pictures, run
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import same, trials, world
from benchmarks.world import Trial
from tltrain.cache import disk_store, feature_table
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.data.views import Views
from tltrain.models.tracing import traced_blocks
from tltrain.models.tracing.maps import as_map
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.pages import methods
from tltrain.runs.record import read_run
from tltrain.training import optim
from tltrain.training.experiment import Experiment, asks_teacher
from tltrain.training.matching import linear_map
from tltrain.training.matching.grid import averaged
from tltrain.training.run import train

__all__ = ["pictures"]  # a fixture

VIT, RESNET = "shipped:vit-tiny-printed", "shipped:resnet-tiny-printed"
"""At 32 px the map of the one has 4 x 4 places beside the class token, that of the other 2 x 2."""
MOBILE: dict[str, Any] = {"name": "torchvision:mobilenet_v3_small"}
AT_64 = {"size": 64, "resize": 64}


def student(*stages: dict[str, Any], teacher: str = VIT, **changes: Any) -> Recipe:
    distill = {"teacher": {"weights": teacher}, "target": "tokens", **changes.pop("distill", {})}
    return made_recipe(**({"distill": distill, "stages": stages or (PRETRAIN, HEAD)} | changes))


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def stores() -> list[disk_store.StoreInfo]:
    return disk_store.stores(Path(os.environ["TLTRAIN_CACHE"]) / "store")


def seen(net: nn.Module, path: str, x_BCHW: Tensor) -> Tensor:
    """What a module gives when a network runs as a whole."""
    given: list[Tensor] = []
    hook = net.get_submodule(path).register_forward_hook(lambda _, __, out: given.append(out))
    net(x_BCHW)
    hook.remove()
    return given[0]


def test_a_step_is_the_one_worked_out_by_hand(tmp_path: Path) -> None:
    """One step of SGD on all images at once, so that their order does not matter."""
    sgd = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "lr": 0.5, "steps": 1, "views": 1, "augment": "none"}
    recipe = student(PRETRAIN | sgd, HEAD, distill={"loss": "smooth_l1", "logits": "float32"})
    images = open_images(recipe.data)
    recipe = recipe.model_copy(update={"batch": len(images.train)})
    experiment = Experiment.open(recipe, images)
    chain, teacher = experiment.student.chain, experiment.teacher
    assert teacher is not None
    views = Views(images.train, experiment.student.preprocess, "none", False, recipe.data.seed)
    pixels_B3HW = torch.stack([views.view(i, 0) for i in range(len(images.train))])
    with torch.no_grad():
        tokens_BTD = seen(teacher.chain.net, "vit.layernorm", teacher.chain.normalise(pixels_B3HW))
    patches_BDhw = tokens_BTD[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    taught_BTD = F.adaptive_avg_pool2d(patches_BDhw, 2).flatten(2).transpose(1, 2)
    mapper = linear_map.attach(copy.deepcopy(chain), experiment.plan[0], recipe.seed).net.get_submodule("fc")
    own_BTC = seen(chain.net, "layer4", chain.normalise(pixels_B3HW)).flatten(2).transpose(1, 2)
    assert own_BTC.shape[:2] == taught_BTD.shape[:2] == (len(images.train), 4)
    loss = F.smooth_l1_loss(F.linear(own_BTC, mapper.map_weight, mapper.map_bias), taught_BTD)  # type: ignore[arg-type]
    loss.backward()
    folder = run(recipe, tmp_path / "run")
    assert read_rows(folder)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    got = load_file(folder / "stages" / "0-pretrain" / "weights.safetensors")
    moved = {name: parameter for name, parameter in chain.net.named_parameters() if not name.startswith("fc.")}
    assert len(moved) > 20
    for name, parameter in moved.items():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], (parameter - 0.5 * parameter.grad).detach(), rtol=1e-4, atol=1e-5)
    assert got["fc.weight"].abs().sum() == 0, "the head that a run begins with is handed on"


@pytest.mark.parametrize(("whole", "side"), [(16, 7), (14, 7), (7, 5), (6, 6)])
def test_a_map_is_averaged_as_torch_does(whole: int, side: int) -> None:
    x = torch.randn(2, 3, whole, whole, dtype=torch.float64, requires_grad=True)
    ours, theirs = averaged(x.permute(0, 2, 3, 1), side), F.adaptive_avg_pool2d(x, side).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*slopes)
    assert averaged(x.half().permute(0, 2, 3, 1), side).dtype == torch.float32


class Transposed(nn.Module):
    """Tokens (B, 16, 64) that are averaged as (B, 64, 16), which could be taken for a map of 8 x 8 places."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))
        self.norm, self.behind, self.head = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.behind(self.norm(x).transpose(1, 2).mean(2)))


def test_the_map_of_a_traced_network_is_found() -> None:
    net = Transposed().eval()
    block = traced_blocks(net, "head", 0.0, 32)[-2]
    assert block.last_map is not None
    assert block.last_map.behind == ("behind",)
    found = block.last_map.step(net, torch.randn(2, 16, 64))
    assert found.shape == (2, 16, 64)
    assert as_map(found).shape == (2, 4, 4, 64)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("backbone", "teacher", "changes", "said"),
    [
        (
            {"weights": RESNET}, VIT, {},
            ("2 x 2 places, 2 views of 92 images x 768 B", "the 96 features of shipped:vit-tiny-printed at 2 x 2 places"),
        ),
        (
            {"weights": VIT}, RESNET, {"trains": "lora", "ema": 0.9, "carry": "ema", "unfreeze": "block.2", "mixup": 0.2},
            ("2 x 2 places, 2 views of 92 images x 1.02 KB", "the 128 features of shipped:resnet-tiny-printed at 2 x 2 places"),
        ),
    ],
    ids=["tokens to a map", "a map to tokens"],
)  # fmt: skip
def test_a_run_is_the_same_stored_computed_and_resumed(
    backbone: dict[str, Any], teacher: str, changes: dict[str, Any], said: tuple[str, ...], pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    raw = {"backbone": backbone, "distill.target": "tokens", "distill.teacher.weights": teacher}
    recipe = of_pictures(pictures, PRETRAIN | changes, HEAD).override(raw)
    computed, stored = computed_and_stored(recipe, tmp_path)
    stop = stopping_at(("pretrain", 2), ("head", 1))
    flags = RunFlags(folder=tmp_path / "resumed", workers=0, cache="always")
    assert [train(recipe, flags, on_step=stop)["outcome"] for _ in range(3)] == ["stopped", "stopped", "finished"]
    assert trials.differences(tmp_path / "resumed", computed) == []
    assert set(load_file(computed / "weights.safetensors")) == set(load_file(computed / "stages" / "0-pretrain" / "weights.safetensors"))
    plan = (stored / "plan.txt").read_text()
    for text in said:
        assert text in plan
    assert "the network learned the features at each place of the last map of the teacher" in methods.paragraph(read_run(computed))
    capsys.readouterr()
    assert main(["cache", "ls", "--json"]) == 0
    assert "the teacher's features of pool at 2 x 2 places" in capsys.readouterr().out
    assert main(["cache", "verify"]) == 0
    assert "0 with something wrong" in capsys.readouterr().out


def test_pooled_features_and_each_grid_have_a_store_of_their_own(tmp_path: Path) -> None:
    """The same teacher and the same views: what differs is what of it is kept."""
    asked: dict[str, dict[str, Any]] = {"pooled": {"distill": {"target": "features"}}, "2 x 2": {}, "4 x 4": {"backbone": {"weights": VIT}}}
    for name, changes in asked.items():
        run(student(PRETRAIN | {"steps": 2}, HEAD | {"steps": 1}, **changes), tmp_path / name, cache="always")
    kept = [store for store in stores() if store.kind == "teacher"]
    assert sorted(str(store.key.get("grid")) for store in kept) == ["None", "[2]", "[4]"]
    shapes = {tuple(disk_store.read(file)["rows"].shape[1:]) for store in kept for file in disk_store.list_shards(store.path).values()}
    assert shapes == {(96,), (4, 96), (16, 96)}


def test_what_the_pooled_vector_alone_passes_stays_as_it_is(tmp_path: Path) -> None:
    """MobileNetV3 has a linear layer behind its pooling, in the last block before the head: a map gives it no gradient."""
    recipe = student(PRETRAIN | {"steps": 2, "trains": "lora"}, HEAD | {"steps": 1}, backbone=MOBILE, data=AT_64)
    experiment = Experiment.open(recipe, open_images(recipe.data))
    stage, chain = experiment.plan[0], experiment.student.chain
    assert stage.features is not None
    assert (stage.features.num_in, stage.features.num_out, stage.features.side) == (576, 96, 2)
    folder = run(recipe, tmp_path / "lora")
    begun, handed = chain.net.state_dict(), load_file(folder / "stages" / "0-pretrain" / "weights.safetensors")
    moved = {name for name in handed if not torch.equal(handed[name], begun[name])}
    assert "features.12.0.weight" in moved
    assert "classifier.0.weight" not in moved
    folder = run(recipe.override({"stages.0.trains": "all"}), tmp_path / "all")
    handed = load_file(folder / "stages" / "0-pretrain" / "weights.safetensors")
    kept = {name for name, _ in chain.net.named_parameters() if torch.equal(handed[name], begun[name])}
    assert kept == {"classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias"}
    all_of_it = Experiment.open(recipe.override({"stages.0.trains": "all"}), open_images(recipe.data)).plan[0]
    below = sum(p.numel() for name, p in chain.net.named_parameters() if not name.startswith("classifier"))
    assert optim.trainable(chain, all_of_it) == below + 96 * (576 + 1)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        pytest.param("torchvision:squeezenet1_1", "the 512 features of", id="whose head is a convolution of its map"),
        pytest.param("timm:test_vit", "the 64 features of", id="whose pooled vector, a class token, lies otherwise in memory"),
    ],
)
def test_a_map_of_a_traced_teacher_is_learned(name: str, features: str, tmp_path: Path) -> None:
    teacher = run(made_recipe(backbone={"name": name}, data=AT_64, stages=[HEAD | {"steps": 1}]), tmp_path / "teacher")
    folder = run(student(PRETRAIN | {"steps": 2}, HEAD | {"steps": 1}, teacher=str(teacher), data=AT_64), tmp_path / "run", cache="never")
    assert features in (folder / "plan.txt").read_text()


@pytest.mark.parametrize(
    ("backbone", "teacher", "size", "told"),
    [
        (
            {"name": "torchvision:alexnet"}, VIT, 64,
            "the student torchvision:alexnet learns a teacher's features (distill.target: tokens), and this network keeps no map of 64 px "
            "before its head; name another backbone, or take distill.target: features or logits",
        ),
        ({"name": "torchvision:squeezenet1_1"}, VIT, 64, "the head of this network is no single linear layer"),
        (
            {"weights": VIT}, "timm:levit_128s", 224,
            "the teacher timm:levit_128s teaches its features (distill.target: tokens), and this network cannot be cut: it has 2 "
            "classifiers; give another teacher",
        ),
        (MOBILE, VIT, 32, "keeps no map of 32 px before its head"),
    ],
)  # fmt: skip
def test_a_network_without_a_map_is_refused(backbone: dict[str, Any], teacher: str, size: int, told: str) -> None:
    spec = {"weights": VIT} if teacher == VIT else {"name": teacher, "weights": "DEFAULT"}
    recipe = student(backbone=backbone, distill={"teacher": spec}, data={"size": size, "resize": size})
    with pytest.raises(UserError) as refused:
        Experiment.outline(recipe, open_images(recipe.data), print)
    assert told in str(refused.value)


def test_what_does_not_go_with_it_names_it() -> None:
    with pytest.raises(UserError, match="top_k: 3 keeps logits of some classes, and target: tokens has none"):
        student(distill={"top_k": 3})
    with pytest.raises(UserError, match=r"without labels \(distill.target: tokens\); it is the only one"):
        student(PRETRAIN)


# --- a teacher that is not asked again


@pytest.mark.parametrize("target", ["tokens", "features"])
def test_a_run_goes_on_without_a_teacher_that_is_not_asked_again(
    target: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gone behind the stage that learns from it, it is not missed, and the record keeps its hash. Before, it is."""
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes((finished_run / "weights.safetensors").read_bytes())
    recipe = student(teacher=str(weights), distill={"target": target})
    whole = run(recipe, tmp_path / "whole")

    def stop(stage: str, step: int) -> None:
        if (stage, step) in (("pretrain", 2), ("head", 1)):
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    flags = RunFlags(folder=folder, workers=0)
    assert train(recipe, flags, on_step=stop)["outcome"] == "stopped"
    aside = weights.rename(tmp_path / "aside.safetensors")
    with pytest.raises(UserError, match="no such file"):
        train(recipe, flags)
    aside.rename(weights)
    assert train(recipe, flags, on_step=stop)["outcome"] == "stopped"
    assert asks_teacher(tmp_path / "damaged", recipe, print), "a run that has not begun"
    shutil.copytree(folder, tmp_path / "damaged")
    assert not asks_teacher(tmp_path / "damaged", recipe, print)
    for kept in (tmp_path / "damaged" / "checkpoints").glob("*-01-*/weights.safetensors"):
        kept.write_bytes(b"")
    assert asks_teacher(tmp_path / "damaged", recipe, print), "an older checkpoint is taken then, whose stage asks it"
    weights.unlink()
    capsys.readouterr()
    assert train(recipe, flags)["outcome"] == "finished"
    planned = [(each / "plan.txt").read_text().splitlines() for each in (folder, whole)]
    ours, theirs = ([line for line in lines if line.startswith(("trains", "distil"))] for lines in planned)
    assert len(ours) == 2
    assert ours == theirs
    assert "teacher not opened: the stages that learn from it are finished" in capsys.readouterr().out
    assert trials.differences(folder, whole) == []


# --- several processes


@pytest.mark.parametrize(("strategy", "backbone"), [slow("ddp", RESNET), slow("ddp", "mobile"), slow("fsdp2", VIT)])
def test_one_and_two_processes_train_alike(strategy: str, backbone: str, tmp_path: Path) -> None:
    """MobileNetV3 too, some of whose parameters get no gradient: DDP waits for each that has one."""
    own: dict[str, Any] = {"backbone": {"weights": backbone}, "teacher": RESNET if backbone == VIT else VIT}
    changes = {"backbone": MOBILE, "data": AT_64} if backbone == "mobile" else own
    spec = student(PRETRAIN | {"clip": 0.5}, HEAD, batch=13, **changes).model_dump(mode="json")
    one = world.finish(Trial(spec, str(tmp_path / "one"), float64=True))
    many = world.finish(Trial(spec, str(tmp_path / "many"), 2, strategy, {"max_device_batch": 4}, float64=True))
    assert trials.distance(many, one) < 1e-9
    ours, theirs = ([row["loss"] for row in read_rows(folder) if row["kind"] == "train"] for folder in (many, one))
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow
def test_two_processes_that_are_killed_in_the_fill_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)
    trial = Trial(student(PRETRAIN, HEAD | {"steps": 2}).model_dump(mode="json"), str(tmp_path / "run" / "run"), 2)
    undisturbed = world.finish(same.online(Trial(trial.recipe, str(tmp_path / "online" / "run"), 2)))
    struck, problems = same.killed_fill(trial, tmp_path / "stores", undisturbed, [(2, 0), (6, 0)])
    assert (struck, problems) == (2, [])
