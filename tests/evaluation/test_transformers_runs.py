"""Networks of transformers from training to what a person takes away: cut in the middle, stored or not, resumed, evaluated, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import slow
from cut_runs import same_stored_computed_and_resumed, stages_of
from digit_files import digit_image, run_with_weights
from hf_nets import config_of, net_of, saved
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.exporters import export
from tltrain.evaluation.predict import evaluation_view
from tltrain.evaluation.trained import load_trained

Made = Callable[..., Recipe]
CLASSES = ("ant", "bee", "cat & dog", "Ünübersehbar", "eel")
BEFORE = {"dinov2": "layer.0", "swin": "layers.0.blocks.1", "convnext": "stages.1.layers.0"}
MIDDLE = {"dinov2": "layer.1", "swin": "layers.1.blocks.0", "convnext": "stages.1.layers.1"}
NAMES = ("dinov2", slow("swin"), slow("convnext"))


def recipe_of(made: Made, name: str, folder: Path) -> Recipe:
    """The head, then from a cut in the middle on, from a folder of save_pretrained."""
    return made(backbone={"weights": str(folder)}, stages=stages_of(MIDDLE[name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_from_a_middle_cut_is_the_same_stored_computed_and_resumed(name: str, made_recipe: Made, tmp_path: Path) -> None:
    net = net_of(config_of(name))
    recipe = recipe_of(made_recipe, name, saved(net, tmp_path / "folder"))
    computed = same_stored_computed_and_resumed(recipe, tmp_path)
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, computed.get(n, t))}
    assert not any(f".{BEFORE[name]}." in n for n in moved)
    assert any(f".{MIDDLE[name]}." in n for n in moved)
    again = evaluate(tmp_path / "computed", None, "test", 16)
    assert again["top1"] == json.loads((tmp_path / "computed" / "test_metrics.json").read_text())["top1"]
    own = load_trained(tmp_path / "computed")
    assert own.card.name == f"hf:{net.config.model_type}"


def _exported_run(name: str, made: Made, folder: Path) -> Path:
    weights = saved(net_of(config_of(name)), folder / "weights", size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    return run_with_weights(folder / "run", made(backbone={"weights": str(weights)}, data={"size": 32, "resize": 40}), CLASSES, 1.7)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_export(name: str, made_recipe: Made, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    run = _exported_run(name, made_recipe, tmp_path)
    done = export(run, "hf")
    own = load_trained(run)
    x = torch.stack([v for n in range(6) if isinstance(v := evaluation_view(digit_image(n), own.preprocess), Tensor)]) / 255
    model: Any = AutoModelForImageClassification.from_pretrained(done.folder).eval()
    assert type(model) is type(own.chain.net)
    processor: Any = AutoImageProcessor.from_pretrained(done.folder)
    assert [*processor.image_mean] == pytest.approx([0.1, 0.2, 0.3])
    assert (processor.size.shortest_edge, processor.crop_size.height) == (40, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.card.mean, own.card.std))
    with torch.no_grad():
        np.testing.assert_allclose(model(pixel_values=(x - mean) / std).logits.numpy(), own.chain(x).numpy(), rtol=1e-4, atol=1e-5)
    said: Any = model.config
    assert [said.id2label[i] for i in range(5)] == list(CLASSES)
    assert said.label2id == {c: i for i, c in enumerate(CLASSES)}


@pytest.mark.parametrize("name", [slow("dinov2"), slow("convnext")])
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_programs_of_transformers_networks_agree(to: str, name: str, made_recipe: Made, tmp_path: Path) -> None:
    """Each exporter reads its file back and compares logits."""
    assert export(_exported_run(name, made_recipe, tmp_path), to).difference < 1e-4


@pytest.mark.slow
def test_a_backbone_that_transformers_gives_no_classifier_is_not_exported_there(made_recipe: Made, tmp_path: Path) -> None:
    run = _exported_run("dinov3_vit", made_recipe, tmp_path)
    with pytest.raises(UserError, match="transformers has no class for hf:dinov3_vit"):
        export(run, "hf")
