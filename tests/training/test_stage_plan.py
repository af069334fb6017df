"""What a stage means: scales, groups, schedule, steps, due evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, Stage, validate
from tltrain.models.chain import Block, Chain
from tltrain.training import optim
from tltrain.training.weights import trained


def chain() -> Chain:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def step(*indices: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        return lambda net, x: nn.Sequential(*(net.get_submodule(str(i)) for i in indices))(x)

    blocks = [Block("stem", ("0", "1"), step(0, 1)), Block("layer1.0", ("2",), step(2, 3, 4)), Block("head", ("5",), step(5))]
    return Chain(net, blocks, (0.5,) * 3, (0.5,) * 3)


def recipe(*specs: dict[str, Any], batch: int = 10) -> Recipe:
    raw = {"name": "t", "batch": batch, "data": {"source": "digits"}, "backbone": {"name": "resnet-tiny"}}
    return validate(raw | {"stages": [{"name": f"s{i}", "lr": 0.1, "carry": "last", **s} for i, s in enumerate(specs)]}, "test")


def planned(*specs: dict[str, Any], batch: int = 10, n: int = 25) -> tuple[stage_plan.StagePlan, ...]:
    return stage_plan.plan(recipe(*specs, batch=batch), chain(), n, has_val=True)


@pytest.mark.parametrize("num_blocks", [2, 14, 18])
def test_scales_equal_timms_rule(num_blocks: int) -> None:
    """timm's param_groups_layer_decay: layer_scales = [decay ** (layer_max - i) for i in range(num_layers)]."""
    layer_max, blocks = num_blocks - 1, [Block(str(i), (str(i),)) for i in range(num_blocks)]
    assert stage_plan.scales(blocks, 0, 0.75) == tuple(0.75 ** (layer_max - i) for i in range(num_blocks))
    assert stage_plan.scales(blocks, num_blocks - 1, 0.75) == (0.0,) * (num_blocks - 1) + (1.0,)


def test_a_block_may_count_its_layers_by_itself() -> None:
    """The pooling has no parameters, and the norm before the head is in the head's layer, as timm counts it."""
    blocks = [
        Block("stem", ("0", "1"), distances={"0.weight": 2, "0.bias": 2, "1.weight": 2, "1.bias": 2}),
        Block("pool", ("3",), distances={}),
        Block("last", ("2",), distances={"2.weight": 1, "2.bias": 0}),
        Block("head", ("5",), distances={"5.weight": 0, "5.bias": 0}),
    ]
    counted = Chain(chain().net, blocks, (0.5,) * 3, (0.5,) * 3)
    (stage,) = stage_plan.plan(recipe({"unfreeze": "all", "epochs": 1, "layer_decay": 0.5}), counted, 10, True)
    assert stage.scales == (0.25, 0.25, 1.0, 1.0)
    rates = {id(p): group["peak_lr"] for group in optim.parameter_groups(counted, stage) for p in group["params"]}
    named = {name: rates[id(p)] for name, p in counted.net.named_parameters()}
    near = dict.fromkeys(("2.bias", "5.weight", "5.bias"), 0.1)
    assert named == pytest.approx({**dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), 0.025), "2.weight": 0.05, **near})


def test_steps_are_full_batches_over_complete_epochs() -> None:
    first, second = planned({"unfreeze": "head", "epochs": 3}, {"unfreeze": "all", "steps": 4})
    assert (first.num_steps, first.first_step, first.first_epoch) == (math.ceil(3 * 25 / 10), 0, 0)
    assert (second.num_steps, second.first_step, second.first_epoch) == (
        4,
        8,
        4,
    )  # 8 steps touch a fourth epoch, so fresh views go on after it


def test_groups_cover_exactly_what_trains_and_spare_norms_and_biases() -> None:
    net, (stage,) = chain(), planned({"unfreeze": "all", "epochs": 1, "layer_decay": 0.5, "weight_decay": 0.3})
    trained.freeze(net, stage)
    groups = optim.parameter_groups(net, stage)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in net.parameters()}
    assert {g["name"]: (g["peak_lr"], g["weight_decay"]) for g in groups} == {
        "stem/decay": (0.025, 0.3), "stem/spared": (0.025, 0.0), "layer1.0/decay": (0.05, 0.3), "layer1.0/spared": (0.05, 0.0),
        "head/decay": (0.1, 0.3), "head/spared": (0.1, 0.0),
    }  # fmt: skip
    spared = [p for g in groups if g["name"] == "stem/spared" for p in g["params"]]
    assert all(p.ndim == 1 for p in spared)
    assert len(spared) == 3  # the convolution's bias, and the norm's weight and bias


def test_weight_decay_on_all_spares_nothing() -> None:
    (stage,) = planned({"unfreeze": "all", "epochs": 1, "weight_decay": 0.3, "weight_decay_on": "all"})
    assert all(g["weight_decay"] == 0.3 for g in optim.parameter_groups(chain(), stage))


def test_schedules() -> None:
    (cosine,) = planned({"unfreeze": "all", "steps": 100, "warmup": 0.1})
    assert cosine.lr_factor(0) == pytest.approx(1 / 11)
    assert cosine.lr_factor(10) == 1.0
    assert cosine.lr_factor(55) == pytest.approx(0.5)
    assert 0 < cosine.lr_factor(99) < 0.01
    assert all(cosine.lr_factor(i) > cosine.lr_factor(i + 1) for i in range(10, 99))
    (step,) = planned({"unfreeze": "all", "epochs": 10, "schedule": "step", "step_epochs": 3, "step_gamma": 0.1})  # 2.5 steps an epoch
    assert [round(step.lr_factor(i), 6) for i in (0, 7, 8, 14, 15)] == [1.0, 1.0, 0.1, 0.1, 0.01]
    (constant,) = planned({"unfreeze": "all", "steps": 5, "schedule": "constant"})
    assert {constant.lr_factor(i) for i in range(5)} == {1.0}


def test_schedule_equals_torchs_cosine() -> None:
    (stage,) = planned({"unfreeze": "all", "steps": 20})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for i in range(20):
        assert stage.lr_factor(i) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("batch", [1, 3, 10, 25, 40])
def test_an_evaluation_is_due_once_an_epoch_at_the_start_and_at_the_end(batch: int) -> None:
    (stage,) = planned({"unfreeze": "all", "epochs": 6}, batch=batch)
    due = [s for s in range(stage.num_steps + 1) if stage.evaluates_after(s)]
    assert (due[0], due[-1]) == (0, stage.num_steps)
    epochs_done = {math.floor(s * batch / 25) for s in due}
    assert epochs_done >= set(range(1, 7)) if batch <= 25 else True
    assert len(due) <= 8


def test_a_stage_that_needs_val_is_refused_without_one() -> None:
    with pytest.raises(UserError, match=r"stage s0 has carry: best and there is no val split"):
        stage_plan.plan(recipe({"unfreeze": "all", "epochs": 1, "carry": "best"}), chain(), 10, has_val=False)


def test_an_unknown_block_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"stage s1: .*'layer9'.*all, stem, layer1.0, head\. Name one of them with --stages\.1\.unfreeze"):
        planned({"unfreeze": "head", "epochs": 1}, {"unfreeze": "layer9", "epochs": 1})


def test_optimizers_follow_the_recipe() -> None:
    net, specs = chain(), {"unfreeze": "all", "steps": 1}
    (stage,) = planned({**specs, "optimizer": "sgd", "momentum": 0.7})
    optimizer = optim.make_optimizer(optim.parameter_groups(net, stage), stage.spec)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {g["momentum"] for g in optimizer.param_groups} == {0.7}
    assert optim.state_bytes(net, stage) == 4 * sum(p.numel() for p in net.parameters())
    assert isinstance(
        optim.make_optimizer(optim.parameter_groups(net, stage), Stage(name="a", unfreeze="all", steps=1, lr=1)),
        torch.optim.AdamW,
    )
    optim.set_lr(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.05}
