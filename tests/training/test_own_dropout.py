"""What a network of a library drops by itself depends on the number of processes, and the plan says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, HEAD
from hf_nets import config_of, net_of, saved

from tltrain.core import stage_plan
from tltrain.core.recipe import Recipe
from tltrain.models import factory
from tltrain.training import optim, plan_table

Made = Callable[..., Recipe]


def _lines(recipe: Recipe) -> list[str]:
    """The notes on dropout of a plan over two processes."""
    loaded = factory.skeleton(recipe.backbone, 10, 64, 64)
    plan = stage_plan.plan(recipe, loaded.chain, 60, True)
    text = plan_table.text(plan_table.render(recipe, loaded.chain, plan, 2, 1, "", ()))
    return [line for line in text.splitlines() if "drawn per process" in line]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("torchvision:mobilenet_v3_small", "classifier.2"),
        ("torchvision:convnext_tiny", "features.1.1.stochastic_depth"),
        ("timm:ghostnet_050", "before the head"),
        ("timm:test_vit", None),
    ],
)
def test_the_plan_says_that_a_networks_own_dropout_depends_on_processes(name: str, where: str | None, made_recipe: Made) -> None:
    lines = _lines(made_recipe(backbone={"name": name}, stages=[ALL]))
    if where is None:
        assert lines == []
    else:
        [line] = lines
        assert f"the network's own dropout ({where}" in line
        assert "so the result depends on their number" in line


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", None])
def test_a_configuration_of_transformers_may_hold_dropout(where: str | None, made_recipe: Made, tmp_path: Path) -> None:
    changes: dict[str, Any] = {} if where is None else {where: 0.2}
    folder = saved(net_of(config_of("dinov2", **changes)), tmp_path)
    recipe = made_recipe(backbone={"weights": str(folder)}, data={"size": 32, "resize": 32}, stages=[ALL])
    assert len(_lines(recipe)) == (where is not None)


def test_frozen_blocks_drop_nothing(made_recipe: Made) -> None:
    recipe = made_recipe(backbone={"name": "torchvision:convnext_tiny"}, stages=[HEAD])
    loaded = factory.skeleton(recipe.backbone, 10, 64, 64)
    assert optim.own_dropout(loaded.chain, stage_plan.plan(recipe, loaded.chain, 60, True)) == []
