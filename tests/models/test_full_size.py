"""ResNet-50 and ViT-B/16 at their real size: two real optimizer steps in each of three stages, from weights files made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_recipe
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import ResNet50_Weights, resnet50
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from tltrain.core.flags import RunFlags
from tltrain.training.run import train

pytestmark = pytest.mark.slow


def photos(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(random.integers(0, 255, (250, 300, 3), dtype=np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def run_three_stages(backbone: dict[str, str], middle: str, tmp_path: Path) -> Path:
    stage = {"steps": 2, "lr": 1e-3, "carry": "last", "eval_epochs": 100}
    stages = [{"name": f"s{i}", "unfreeze": where, **stage} for i, where in enumerate(("head", middle, "all"))]
    data = {"source": f"folder:{photos(tmp_path / 'photos')}", "size": None, "resize": None, "per_class": None, "eval_limit": 2}
    recipe = made_recipe(backbone=backbone, stages=stages, data=data, batch=4)
    run = tmp_path / "run"
    assert train(recipe, RunFlags(folder=run, workers=0, keep=1, max_device_batch=2))["outcome"] == "finished"
    assert "2 micro-batches x 2 images" in (run / "plan.txt").read_text()
    return run


def test_resnet50_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "torch" / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V2.url).name
    file.parent.mkdir(parents=True)
    made = resnet50(num_classes=1000)
    torch.save(made.state_dict(), file)
    run = run_three_stages({"name": "resnet50", "weights": "IMAGENET1K_V2"}, "layer4", tmp_path)
    head, deep, whole = (load_file(run / "stages" / f"{i}-s{i}" / "weights.safetensors") for i in range(3))
    before = made.state_dict()
    assert torch.equal(head["conv1.weight"], before["conv1.weight"])
    assert torch.equal(deep["layer3.5.conv3.weight"], before["layer3.5.conv3.weight"])
    assert not torch.equal(deep["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
    assert not torch.equal(whole["conv1.weight"], before["conv1.weight"])
    assert torch.equal(whole["bn1.running_mean"], before["bn1.running_mean"])
    resnet50(num_classes=3).load_state_dict(whole, strict=True)
    assert "224 px (shorter side 232)" in (run / "plan.txt").read_text()


def test_vit_b16_from_a_folder_of_a_headless_model(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    made = ViTModel(ViTConfig())
    made.save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    run = run_three_stages({"name": "vit-b16", "weights": str(folder)}, "block.10", tmp_path)
    head, deep, whole = (load_file(run / "stages" / f"{i}-s{i}" / "weights.safetensors") for i in range(3))
    name = "vit.layers.{}.attention.q_proj.weight"
    before = made.state_dict()["layers.0.attention.q_proj.weight"]
    assert torch.equal(head[name.format(0)], before)
    assert torch.equal(deep[name.format(9)], head[name.format(9)])
    assert not torch.equal(deep[name.format(10)], head[name.format(10)])
    assert not torch.equal(whole[name.format(0)], before)
