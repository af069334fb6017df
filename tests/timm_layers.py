"""timm's own learning-rate scale of every parameter against ours, for the tests of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from tltrain.core import stage_plan
from tltrain.core.recipe import validate
from tltrain.models.chain import Chain
from tltrain.training import optim

DECAY, LR = 0.7, 0.1


def timms(net: nn.Module) -> dict[str, float]:
    """The scale of each parameter, by its name, as timm's training scripts give it."""
    names = {id(p): name for name, p in net.named_parameters()}
    groups: list[Mapping[str, Any]] = param_groups_layer_decay(net, layer_decay=DECAY)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def ours(chain: Chain, frozen_before: str = "all") -> dict[str, float]:
    """The same of a stage of ours, read from its optimizer's groups. What is frozen has none."""
    stage = {"name": "s", "unfreeze": frozen_before, "steps": 1, "lr": LR, "layer_decay": DECAY, "carry": "last"}
    raw = {"name": "t", "batch": 8, "data": {"source": "digits"}, "backbone": {"name": "timm:test_vit"}, "stages": [stage]}
    (planned,) = stage_plan.plan(validate(raw, "test"), chain, 8, has_val=False)
    names = {id(p): name for name, p in chain.net.named_parameters()}
    return {names[id(p)]: group["peak_lr"] / LR for group in optim.parameter_groups(chain, planned) for p in group["params"]}
