"""What of a stage's blocks trains: low-rank updates, biases and norms; in plain PyTorch too, and under every strategy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, slow
from safetensors.torch import load_file
from torch import Tensor, nn
from world_recipe import FIXED, losses, recipe
from world_trials import stop_and_go_on

from benchmarks import trials, world
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Stage, validate
from tltrain.core.stage_plan import StagePlan
from tltrain.distributed.strategies import Strategy
from tltrain.distributed.strategies.consistency import ConsistencyError
from tltrain.models import factory
from tltrain.models.chain import Block, Chain
from tltrain.training import optim
from tltrain.training.run import train
from tltrain.training.weights import lora, trained

LORA: dict[str, Any] = {"name": "low-rank", "trains": "lora", "lora_rank": 3, "lora_alpha": 12}
BIASES: dict[str, Any] = {"name": "biases", "trains": "biases_and_norms"}


def tiny(name: str) -> Chain:
    return factory.load(Backbone(**trials.NETS[name]), classes=["a", "b", "c"], size=32, resize=32, head="new", seed=0).chain


def planned(chain: Chain, **changes: Any) -> StagePlan:
    stage = {"name": "s", "unfreeze": "all", "steps": 1, "lr": 0.1, "carry": "last"} | changes
    raw = {"name": "r", "batch": 1, "data": {"source": "digits"}, "backbone": {"name": "resnet-tiny"}, "stages": [stage]}
    return stage_plan.plan(validate(raw, "test"), chain, 10, has_val=False)[0]


def attached(chain: Chain, stage: StagePlan) -> Chain:
    """With updates that do something."""
    trained.freeze(chain, stage)
    trained.add_updates(chain, stage, seed=1)
    for name, parameter in chain.net.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return chain.eval()


def test_merged_weights_answer_as_the_network_with_its_updates() -> None:
    for name in ("resnet-tiny", "vit-tiny"):
        chain = tiny(name)
        nn.init.normal_(next(chain.parameters_of(len(chain.blocks) - 1))[1], generator=torch.Generator().manual_seed(1))
        merged = copy.deepcopy(chain)
        stage = planned(chain, **LORA)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = chain(images)
            updated = attached(chain, stage)(images)
            merged.net.load_state_dict(lora.merged(chain.net.state_dict(), stage.spec))
            assert (updated - before).abs().max() > 0.01, "the updates do something"
            assert (merged(images) - updated).abs().max() < 1e-6
            assert chain.net.state_dict().keys() != merged.net.state_dict().keys()
            merged.net.load_state_dict(lora.plain(chain.net.state_dict()))
            assert torch.equal(merged(images), before), "the frozen weights themselves have not changed"


class Attention(nn.Module):
    """Reads the weights of its projections without calling them, as torch's does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(2), nn.Linear(64, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.body(x_BCHW)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_torchs_attention_has_updates_in_all_its_projections() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block("body", ("body",)), Block("attention", ("attention",)), Block("head", ("head",))]
        chain = Chain(Attention(), blocks, (0.5,) * 3, (0.5,) * 3)
    merged, stage = copy.deepcopy(chain), planned(chain, unfreeze="attention", **LORA)
    attached(chain, stage)
    names = {name.rpartition(".parametrizations")[0] for name in lora.updates(chain.net.state_dict())}
    assert names == {"attention", "attention.out_proj"}
    merged.net.load_state_dict(lora.merged(chain.net.state_dict(), stage.spec))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (merged.eval()(images) - chain(images)).abs().max() < 1e-6


def test_what_has_gradients_and_what_decays() -> None:
    chain = tiny("resnet-tiny")
    stage = planned(chain, unfreeze="layer3", weight_decay=0.3, **LORA)
    count = optim.trainable(chain, stage)
    attached(chain, stage)
    names = {name for name, parameter in chain.net.named_parameters() if parameter.requires_grad}
    pointwise = [f"layer{n}.0.downsample.0.parametrizations.weight.0.{part}" for n in (3, 4) for part in lora.PARAMETERS]
    assert names == {*pointwise, "fc.weight", "fc.bias"}
    assert count == sum(p.numel() for p in chain.net.parameters() if p.requires_grad)
    decay = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optim.parameter_groups(chain, stage)}
    assert decay == {0.3: count - 3, 0.0: 3}, "all but the head's bias"


def test_biases_and_norms_are_those_of_the_blocks_that_train_and_the_whole_head() -> None:
    chain = tiny("vit-tiny")
    stage = planned(chain, unfreeze="block.2", **BIASES)
    trained.freeze(chain, stage)
    names = {name for name, parameter in chain.net.named_parameters() if parameter.requires_grad}
    layers = [name for name, _ in chain.net.named_parameters() if name.startswith(("vit.layers.2.", "vit.layers.3.", "vit.layernorm"))]
    assert names == {name for name in layers if name.endswith(".bias") or "layernorm" in name} | {"classifier.weight", "classifier.bias"}
    assert optim.trainable(chain, stage) == sum(p.numel() for p in chain.net.parameters() if p.requires_grad)
    resnet = tiny("resnet-tiny")
    trained.freeze(resnet, planned(resnet, unfreeze="layer4", **BIASES))
    names = {name for name, parameter in resnet.net.named_parameters() if parameter.requires_grad}
    norms = {f"layer4.0.{norm}.{part}" for norm in ("bn1", "bn2", "downsample.1") for part in ("weight", "bias")}
    assert names == norms | {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("stage", "said"), [({"unfreeze": "head"} | LORA, "only its head"), ({"unfreeze": "head"} | BIASES, "only its head")]
)
def test_a_stage_of_which_nothing_else_would_train_is_refused(stage: dict[str, Any], said: str) -> None:
    chain = tiny("resnet-tiny")
    with pytest.raises(UserError, match=said):
        trained.check(chain, [planned(chain, **stage)])


def test_lora_where_nothing_takes_it_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    chain = Chain(net, [Block("conv", ("0",)), Block("head", ("1", "2"))], (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="no linear layer or 1x1 convolution"):
        trained.check(chain, [planned(chain, **LORA)])


# --- whole runs


def spec_of(backbone: str) -> dict[str, Any]:
    """The head, low-rank updates of the last blocks, then biases and norms of all; blends and averages are carried."""
    middle = {"resnet-tiny": "layer3", "vit-tiny": "block.2"}[backbone]
    low = ALL | LORA | {"unfreeze": middle, "steps": 3, "clip": 0.5, "weight_decay": 0.01, "carry": "blend", "ema": 0.9}
    biases = ALL | BIASES | {"steps": 3, "optimizer": "sgd", "lr": 0.02, "carry": "ema", "ema": 0.9}
    stages = [{**FIXED, **HEAD, "steps": 3, "eval_epochs": 10}, low | {"eval_epochs": 10}, biases | {"eval_epochs": 10}]
    return recipe(backbone, stages=stages, select="loss")


def test_frozen_parts_of_the_blocks_stay_and_the_plan_says_what_trains(tmp_path: Path) -> None:
    run = world.finish(Trial(spec_of("vit-tiny"), str(tmp_path / "run")))
    head, low, biases = (load_file(run / "stages" / name / "weights.safetensors") for name in ("0-head", "1-low-rank", "2-biases"))
    assert head.keys() == low.keys() == biases.keys(), "under the network's own names"
    changed = {name for name in head if not torch.equal(head[name], low[name])}
    updated = [name for name in head if name.startswith(("vit.layers.2.", "vit.layers.3.")) and head[name].ndim == 2]
    assert changed == {*updated, "classifier.weight", "classifier.bias"}
    ranks = {int(torch.linalg.matrix_rank(low[name].double() - head[name].double(), rtol=1e-3)) for name in updated}
    assert ranks <= {1, 2, 3}
    moved = {name for name in head if not torch.equal(low[name], biases[name])}
    assert moved <= {name for name in head if name.endswith(".bias") or "layernorm" in name} | {"classifier.weight"}
    assert len(moved) > 20
    plan = (run / "plan.txt").read_text()
    assert "lora, rank 3, 12 layers" in plan
    assert "biases and norms" in plan


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process, of each network and precision."""
    made: dict[tuple[str, bool], Path] = {}

    def get(backbone: str, float64: bool) -> Path:
        if (backbone, float64) not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[backbone, float64] = world.finish(Trial(spec_of(backbone), str(folder), float64=float64))
        return made[backbone, float64]

    return get


@pytest.mark.parametrize(
    ("strategy", "num", "backbone"),
    [("ddp", 2, "resnet-tiny"), ("fsdp2", 2, "vit-tiny"), slow("fsdp2", 3, "resnet-tiny")],
)
def test_the_world_changes_nothing(strategy: str, num: int, backbone: str, alone: Any, tmp_path: Path) -> None:
    """In float64: losses, evaluations, averages, blends and weights."""
    run = world.finish(Trial(spec_of(backbone), str(tmp_path / "run"), num, strategy, float64=True))
    assert losses(run) == pytest.approx(losses(alone(backbone, True)), rel=1e-9)
    assert figures(run) == pytest.approx(figures(alone(backbone, True)), rel=1e-9)
    assert distance(run, alone(backbone, True)) < 1e-8


@pytest.mark.parametrize(("strategy", "num"), [slow("zero2", 2), slow("zero3", 2)])
def test_zero_trains_evaluates_and_hands_on_the_same(strategy: str, num: int, alone: Any, tmp_path: Path) -> None:
    """In fp32."""
    run = world.finish(Trial(spec_of("resnet-tiny"), str(tmp_path / "run"), num, strategy))
    assert losses(run) == pytest.approx(losses(alone("resnet-tiny", False)), rel=1e-4)
    assert figures(run) == pytest.approx(figures(alone("resnet-tiny", False)), rel=1e-4)
    assert distance(run, alone("resnet-tiny", False)) < 1e-4


def figures(run: Path) -> list[float]:
    """The val loss of every evaluation: of the weights themselves, of their average, and of each share of a blend."""
    rows = [row for row in trials.rows_of(run) if row["kind"] in ("val", "blend")]
    keys = ("loss", "ema_loss", "last_loss", "share")
    return [row[key] for row in rows for key in keys if key in row] + [loss for row in rows for _, _, loss in row.get("curve", [])]


@pytest.mark.parametrize(
    ("strategy", "num", "num_steps"),
    [
        ("ddp", 1, 4),
        ("ddp", 1, 8),
        slow("ddp", 1, 3),
        slow("ddp", 1, 7),
        slow("ddp", 2, 5),
        slow("fsdp2", 2, 5),
        slow("zero2", 2, 8),
        slow("zero3", 2, 5),
    ],
)
def test_a_run_goes_on_bit_for_bit(strategy: str, num: int, num_steps: int, undisturbed: Any, tmp_path: Path) -> None:
    run = stop_and_go_on(Trial(spec_of("resnet-tiny"), str(tmp_path / "run"), num, strategy), num_steps)
    assert trials.differences(run, undisturbed(strategy, num)) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, int], Path] = {}

    def get(strategy: str, num: int) -> Path:
        if (strategy, num) not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            made[strategy, num] = world.finish(Trial(spec_of("resnet-tiny"), str(folder), num, strategy))
        return made[strategy, num]

    return get


@pytest.mark.slow
def test_another_strategy_goes_on(tmp_path: Path, alone: Any) -> None:
    """From a checkpoint within low-rank updates and their average."""
    spec, folder = spec_of("vit-tiny"), str(tmp_path / "run")
    first = Trial(spec, folder, 2, "fsdp2", float64=True, before="signal_after", arguments=(5,))
    assert world.run(first) == [75] * 2, world.log(first)
    run = world.finish(Trial(spec, folder, float64=True))
    assert figures(run) == pytest.approx(figures(alone("vit-tiny", True)), rel=1e-9)


@pytest.mark.parametrize("stage", [LORA, BIASES], ids=["lora", "biases"])
def test_a_frozen_part_of_a_block_that_changes_is_seen(stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Strategy.step

    def moved(self: Strategy) -> Any:
        norm = step(self)
        frozen = next(p for n, p in self.chain.net.named_parameters() if n.startswith("layer4.0.conv1") and not p.requires_grad)
        frozen.data.add_(1e-3)
        return norm

    monkeypatch.setattr(Strategy, "step", moved)
    spec = validate(trials.recipe(stages=[ALL | stage | {"steps": 1, "carry": "last"}]), "test")
    with pytest.raises(ConsistencyError, match=r"a part of block layer4.0 is frozen in this stage, but it changed"):
        train(spec, RunFlags(folder=tmp_path / "run", workers=0))


@pytest.mark.parametrize("stage", [LORA, BIASES], ids=["lora", "biases"])
def test_what_should_train_and_does_not_is_seen(stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = optim.make_optimizer

    def forgetful(groups: list[dict[str, Any]], spec: Stage) -> torch.optim.Optimizer:
        return made([group for group in groups if "layer4.0" not in group["name"]], spec)

    monkeypatch.setattr(optim, "make_optimizer", forgetful)
    one = ALL | stage | {"unfreeze": "layer3", "steps": 2, "carry": "last", "layer_decay": 0.5, "weight_decay": 0.0}
    spec = validate(trials.recipe(stages=[HEAD | {"steps": 1}, one]), "test")
    with pytest.raises(ConsistencyError, match=r"block layer4.0 should train in this stage, but none of its tensors changed"):
        train(spec, RunFlags(folder=tmp_path / "run", workers=0))


@pytest.mark.parametrize("stage", [LORA, slow(BIASES)])
def test_stored_features_change_nothing(stage: dict[str, Any], tmp_path: Path) -> None:
    """What is frozen before the first block that trains is computed once, as in any stage."""
    own_views = {"augment": "none", "views": 1}
    stages = [HEAD | {"steps": 1, "views": 1}, ALL | stage | own_views | {"unfreeze": "layer3", "ema": 0.9, "carry": "blend"}]
    runs = [tmp_path / name for name in ("stored", "computed")]
    spec = validate(trials.recipe(stages=stages), "test")
    train(spec, RunFlags(folder=runs[0], workers=0, cache="always"))
    train(spec, RunFlags(folder=runs[1], workers=0, cache="never"))
    assert "layer3.0, train, 1 view" in (runs[0] / "plan.txt").read_text()
    assert trials.rows_of(runs[0]) == trials.rows_of(runs[1])
    ours, theirs = (load_file(run / "weights.safetensors") for run in runs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
