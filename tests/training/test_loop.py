"""The loop without waste: recomputed activations, layouts, fused optimizers, compiled stages."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ALL, HEAD, made_recipe, slow
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from benchmarks import world
from benchmarks.world import Trial
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Stage
from tltrain.distributed import runtime
from tltrain.distributed.strategies import Strategy
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.runs.metrics_log import read_rows
from tltrain.training import optim
from tltrain.training.run import train

NETS = [("resnet-micro", 0.0), ("resnet-micro", 0.4), ("vit-tiny", 0.0), ("vit-tiny", 0.4)]
FIXED = {"carry": "last", "eval_epochs": 10}


def chain_of(name: str, dropout: float = 0.0) -> Chain:
    """On 32 pixels, in training mode; the head's weights are not zero, so that gradients reach below it."""
    spec = Backbone(name=name, dropout=dropout)
    chain = factory.load(spec, classes=("a", "b", "c"), size=32, resize=None, head="new", seed=0).chain
    for _, parameter in chain.parameters_of(len(chain.blocks) - 1):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return chain


def images(num: int = 6) -> Tensor:
    return torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def two_steps(chain: Chain) -> list[Tensor]:
    """Losses, gradients and buffers of two steps of SGD."""
    optimizer, seen = torch.optim.SGD([p for p in chain.parameters() if p.requires_grad], lr=0.01), []
    for step in range(2):
        torch.manual_seed(step)
        loss = F.cross_entropy(chain(images()), torch.arange(6) % 3)
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in chain.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [*seen, *chain.buffers()]


@pytest.mark.parametrize(("name", "dropout"), NETS)
@pytest.mark.parametrize("first", [0, 2])
def test_recomputed_activations_change_no_bit(name: str, dropout: float, first: int) -> None:
    """Losses, gradients and BatchNorm statistics, which move once a step."""
    chain = chain_of(name, dropout).freeze(first, norm_stats=True).train()
    again = copy.deepcopy(chain)
    again.recompute = True
    calls: list[int] = []
    block = again.net.get_submodule(again.blocks[2].owns[0])
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    want, got = two_steps(chain), two_steps(again)
    assert len(calls) == 4, "once forward and once in backward, in each of two steps"
    assert len(want) == len(got)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    norms = [m for m in chain.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert all(int(m.num_batches_tracked or 0) == 2 for m in norms)
    assert bool(norms) == name.startswith("resnet")


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_frozen_blocks_and_evaluations_are_not_recomputed(name: str) -> None:
    chain = chain_of(name).freeze(2, norm_stats=True).train()
    chain.recompute = True
    calls: list[int] = []
    for i in (0, 1):
        chain.net.get_submodule(chain.blocks[i].owns[0]).register_forward_pre_hook(lambda *_: calls.append(1))
    chain(images()).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        assert chain(images()).grad_fn is None


def trial(tmp_path: Path, strategy: str, num: int, start: dict[str, Any], name: str, timeout_s: float = 150.0, **changes: Any) -> Path:
    """A run of two stages in a world, and its folder."""
    last = ALL | FIXED | {"steps": 3, "optimizer": "sgd", "lr": 0.05} | changes
    recipe = made_recipe(
        backbone={"name": name, "dropout": 0.2}, batch=12, stages=[HEAD | FIXED | {"steps": 2}, last], data={"eval_limit": 20}
    )
    folder = tmp_path / f"{strategy}-{'-'.join(start)}" / "run"
    made = Trial(recipe.model_dump(mode="json"), str(folder), num, strategy, start | {"max_device_batch": 4})
    assert world.run(made, timeout_s) == [0] * num, world.log(made)
    return folder


def assert_same_run(run: Path, other: Path) -> None:
    losses = [[row["loss"] for row in read_rows(folder) if row["kind"] == "train"] for folder in (run, other)]
    assert losses[0] == losses[1]
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("strategy", "num", "name", "changes"),
    [
        ("ddp", 1, "resnet-micro", {"norm_stats": "train"}),
        ("ddp", 2, "resnet-micro", {"norm_stats": "train"}),
        ("fsdp2", 2, "vit-tiny", {}),
        slow("zero2", 2, "vit-tiny", {}),
    ],
)
def test_a_run_with_recompute_is_the_run_without(strategy: str, num: int, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    runs = [trial(tmp_path, strategy, num, start, name, **changes) for start in ({}, {"recompute": True})]
    assert_same_run(runs[1], runs[0])


def test_compile_and_recompute_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--compile and --recompute exclude each other"):
        RunFlags(compile=True, recompute=True)


def test_a_slice_fed_from_a_stored_tensor_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With channels last, what a frozen prefix says is stored contiguous, and read into the layout of the chain again."""
    monkeypatch.setattr(Chain, "channels_last", True)
    chain = chain_of("resnet-micro").to(memory_format=torch.channels_last).eval()
    x_BCHW = images()
    with torch.no_grad():
        whole = chain(x_BCHW)
        for k in range(1, len(chain.blocks)):
            direct = chain(x_BCHW, stop=k)
            assert torch.equal(chain(direct.contiguous(), start=k), whole)
            assert torch.equal(chain(direct, start=k), whole)
    seen: list[bool] = []
    chain.net.get_submodule("layer2.0").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    chain(chain(x_BCHW, stop=2).contiguous(), start=2)
    assert seen == [True]


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_weights_that_come_out_are_contiguous(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the layout inside: files of weights and of the optimizer's state, and a run that goes on from them, bit for bit."""
    monkeypatch.setattr(Chain, "channels_last", True)
    recipe = made_recipe(backbone={"name": name}, stages=[ALL | FIXED | {"steps": 4}])
    assert train(recipe, RunFlags(folder=tmp_path / "whole", workers=0))["outcome"] == "finished"
    run = tmp_path / "run"
    stopped = Trial(recipe.model_dump(mode="json"), str(run), before="layouts.stop_with_channels_last", arguments=(2,))
    assert world.run(stopped) == [75], world.log(stopped)
    assert train(recipe, RunFlags(folder=run, workers=0))["outcome"] == "finished"
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_optimizers_are_fused(optimizer: str, dtype: torch.dtype) -> None:
    """And do what torch's plain ones do, to rounding."""
    spec = Stage.model_validate({"name": "all", "unfreeze": "all", "steps": 1, "lr": 0.01, "optimizer": optimizer, "weight_decay": 0.1})
    chain = chain_of("resnet-micro").to(dtype)
    other = copy.deepcopy(chain)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    plain = {"lr": 0.01, "fused": False} | ({} if optimizer == "adamw" else {"momentum": spec.momentum})
    ours = optim.make_optimizer([{"params": list(chain.parameters()), "weight_decay": 0.1}], spec)
    theirs = kinds[optimizer]([{"params": list(other.parameters()), "weight_decay": 0.1}], **plain)
    assert {group["fused"] for group in ours.param_groups} == {True}
    for net, made in ((chain, ours), (other, theirs)):
        for step in range(3):
            for i, parameter in enumerate(net.parameters()):
                parameter.grad = torch.randn(parameter.shape, dtype=dtype, generator=torch.Generator().manual_seed(100 * step + i))
            made.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip(chain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("strategy", "num", "name", "changes"),
    [
        ("ddp", 1, "resnet-micro", {"norm_stats": "train"}),
        ("ddp", 2, "vit-tiny", {}),
        ("fsdp2", 2, "vit-tiny", {}),
    ],
)
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_compiled_run_ends_where_the_run_does_to_rounding(
    strategy: str, num: int, name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Every loss to 1e-4, dropout included; uneven micro-batches; guards run, and find nothing."""
    plain = trial(tmp_path, strategy, num, {}, name, **changes)
    run = trial(tmp_path, strategy, num, {"compile": True, "check_steps": 1}, name, timeout_s=900, **changes)
    losses = [[row["loss"] for row in read_rows(folder) if row["kind"] == "train"] for folder in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1] or strategy != "ddp", "compiled kernels round otherwise: nothing was compiled"
    assert load_file(run / "weights.safetensors").keys() == load_file(plain / "weights.safetensors").keys()


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    recipe = made_recipe(backbone={"name": "vit-tiny"}, stages=[HEAD | FIXED]).model_dump(mode="json")
    refused = Trial(recipe, str(tmp_path / "zero" / "run"), 2, "zero2", {"compile": True})
    assert world.run(refused) == [2, 2], world.log(refused)
    assert "--compile does not work under DeepSpeed" in world.log(refused)


def test_a_configuration_that_recomputes_too_is_refused(tmp_path: Path) -> None:
    recipe = made_recipe(backbone={"name": "vit-tiny"}, stages=[HEAD | FIXED]).model_dump(mode="json")
    setting = ("FSDP_ACTIVATION_CHECKPOINTING", "true")
    refused = Trial(recipe, str(tmp_path / "run"), 2, "fsdp2", {"recompute": True}, before="memory.configure", arguments=setting)
    assert world.run(refused) == [2, 2], world.log(refused)
    assert "the accelerate configuration sets fsdp_activation_checkpointing; remove it" in world.log(refused)


def test_a_configuration_that_compiles_too_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    AcceleratorState._reset_state(reset_partial_state=True)  # it is read once a process
    try:
        with pytest.raises(UserError, match="the accelerate configuration sets dynamo_backend to INDUCTOR; remove it"):
            train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_stage_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each shape that a stage has, uneven micro-batches and evaluations included, however many steps it takes."""
    counter = CompileCounter()

    def counted(self: Chain, **named: Any) -> None:
        nn.Module.compile(self, backend=counter, dynamic=named["dynamic"])

    monkeypatch.setattr(Chain, "compile", counted)
    graphs = []
    for num_steps in (2, 5):
        counter.frame_count = 0
        stages = [ALL | {"steps": num_steps, "unfreeze": "layer3"}, ALL | {"name": "again", "steps": num_steps, "unfreeze": "layer3"}]
        start = RunFlags(folder=tmp_path / str(num_steps), workers=0, compile=True, max_device_batch=5, check_steps=1)
        assert train(made_recipe(stages=stages, batch=13), start)["outcome"] == "finished"
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]
    assert graphs[0] % 2 == 0, "both stages alike"
    assert 2 <= graphs[0] // 2 <= 6


def test_sgd_of_fp16_begins_with_its_first_finite_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss scale is too large at first, and the step is left out; torch's fused SGD would leave its momentum uninitialised."""
    scales = iter([float("inf"), float("inf")])

    class TooLarge(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            return super().scale(outputs) * next(scales, 1.0)

    def with_scaler(**named: Any) -> Any:
        accelerator = Accelerator(**named)
        accelerator.scaler = TooLarge("cpu", init_scale=64.0)
        return accelerator

    seen: list[list[bool]] = []
    step = Strategy.step

    def recorded(self: Strategy) -> Any:
        out = step(self)
        states = self.optimizer.optimizer.state.values()
        seen.append([bool(state["momentum_buffer"].abs().max() < 1e3) for state in states if state])
        return out

    monkeypatch.setattr(runtime, "Accelerator", with_scaler)
    monkeypatch.setattr(Strategy, "step", recorded)
    stage = ALL | FIXED | {"optimizer": "sgd", "lr": 1e-3, "steps": 6}
    assert train(made_recipe(stages=[stage]), RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"
    assert [bool(states) for states in seen] == [False, False, True, True, True, True], "a step that is left out makes no state"
    assert all(all(finite) for finite in seen)
