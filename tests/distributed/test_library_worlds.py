"""Networks of transformers and timm over several processes, sharded: a run is that of one process, or is refused before its first step.

Both read parameters of their own (class token, position embeddings) beside calling modules, which a strategy must gather for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, made_recipe
from hf_nets import config_of, net_of, saved
from safetensors.torch import load_file
from world_recipe import FIXED, losses

from benchmarks import world
from benchmarks.world import Trial


def _recipe(name: str, folder: Path) -> dict[str, Any]:
    """The head, then from a block in the middle on, then everything."""
    if name == "timm":
        backbone, middle = {"name": "timm:test_vit"}, "blocks.1"
    else:
        backbone, middle = {"weights": str(saved(net_of(config_of(name)), folder))}, "layer.1"
    steps = {"steps": 2} | FIXED
    stages = [HEAD | steps, ALL | steps | {"name": "mid", "unfreeze": middle}, ALL | steps]
    return made_recipe(backbone=backbone, batch=8, stages=stages, data={"eval_limit": 8}).model_dump(mode="json")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), [("dinov2", "fsdp2"), ("dinov2", "zero3"), ("timm", "fsdp2"), ("timm", "zero3")])
def test_a_sharded_run_is_that_of_one_process(name: str, strategy: str, tmp_path: Path) -> None:
    spec = _recipe(name, tmp_path / "weights")
    one = world.finish(Trial(spec, str(tmp_path / "one")))
    many = world.finish(Trial(spec, str(tmp_path / "many"), 2, strategy))
    assert losses(many) == pytest.approx(losses(one), rel=1e-3)
    want, got, start = (
        load_file(path / "stages" / stage / "weights.safetensors") for path, stage in ((one, "2-all"), (many, "2-all"), (one, "0-head"))
    )
    assert want.keys() == got.keys()
    moved = [n for n, t in want.items() if not torch.equal(t, start[n])]
    assert len(moved) > len(want) // 2
    assert all(not torch.equal(got[n], start[n]) for n in moved), "each parameter that one process trains is trained"
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=0.05, atol=5e-3, msg=n)
