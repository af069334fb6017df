"""Networks of timm from training to what a person takes away: cut in the middle, stored or not, resumed, evaluated, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import slow
from cut_runs import same_stored_computed_and_resumed, stages_of
from digit_files import digit_image, run_with_weights
from safetensors.torch import load_file

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.exporters import export
from tltrain.evaluation.predict import evaluation_view, predict
from tltrain.evaluation.trained import load_trained

Made = Callable[..., Recipe]
CLASSES = ("ant", "bee", "cat & dog", "Ünübersehbar", "eel")
MIDDLE = {"test_vit": "blocks.3", "test_efficientnet": "blocks.2.0"}


def recipe_of(made: Made, name: str) -> Recipe:
    """The head, then from a cut in the middle on, of random weights at 32 px."""
    return made(backbone={"name": f"timm:{name}"}, stages=stages_of(MIDDLE[name]))


@pytest.mark.parametrize("name", ["test_vit", slow("test_efficientnet")])
def test_a_stage_from_a_middle_cut_is_the_same_stored_computed_and_resumed(name: str, made_recipe: Made, tmp_path: Path) -> None:
    recipe = recipe_of(made_recipe, name)
    computed = same_stored_computed_and_resumed(recipe, tmp_path)
    begun = timm_net(recipe)
    assert torch.equal(computed[_first(name)], begun[_first(name)])
    assert not torch.equal(computed[_last(name)], begun[_last(name)])
    again = evaluate(tmp_path / "computed", None, "test", 16)
    said = json.loads((tmp_path / "computed" / "test_metrics.json").read_text())
    assert again["top1"] == said["top1"]
    digit_image(3).save(tmp_path / "x.png")
    assert next(predict(load_trained(tmp_path / "computed"), [tmp_path / "x.png"])).label in load_trained(tmp_path / "computed").classes


def timm_net(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The random weights that the run began with."""
    from tltrain.models import factory

    classes = [str(i) for i in range(10)]
    net = factory.load(recipe.backbone, classes=classes, size=32, resize=32, head="new", seed=recipe.seed).chain.net
    return dict(net.state_dict())


def _first(name: str) -> str:
    return "blocks.0.mlp.fc1.weight" if name == "test_vit" else "conv_stem.weight"


def _last(name: str) -> str:
    return "blocks.5.mlp.fc1.weight" if name == "test_vit" else "conv_head.weight"


@pytest.fixture(name="run")
def _run(made_recipe: Made, tmp_path: Path) -> Path:
    return run_with_weights(
        tmp_path / "run", made_recipe(backbone={"name": "timm:test_vit"}, data={"size": 64, "resize": 72}), CLASSES, 1.7
    )


def _expected(run: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(views in [0, 1], normalised by hand, logits of the plain weights divided by the temperature), with timm alone."""
    own = load_trained(run)
    x = torch.stack([v for n in range(6) if isinstance(v := evaluation_view(digit_image(n), own.preprocess), torch.Tensor)]) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.card.mean, own.card.std))
    net = timm.create_model("test_vit", num_classes=5, img_size=64).eval()
    net.load_state_dict(load_file(run / "weights.safetensors"), strict=True)
    with torch.no_grad():
        return x, (x - mean) / std, (net((x - mean) / std) / 1.7).numpy()


def test_timm_loads_the_export_strictly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = export(run, "timm")
    _, normalised, logits = _expected(run)
    model = timm.create_model("test_vit", num_classes=5, img_size=64, checkpoint_path=str(done.folder / "model.safetensors")).eval()
    folder = timm.create_model(f"local-dir:{done.folder}", pretrained=True).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(normalised).numpy(), logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(folder(normalised).numpy(), logits, rtol=1e-5, atol=1e-5)
    code = (done.folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(done.folder)
    names: dict[str, Any] = {}
    exec(code.replace("PATH OF THIS FOLDER", "."), names)
    with torch.no_grad():
        np.testing.assert_allclose(names["model"].eval()(normalised).numpy(), logits, rtol=1e-5, atol=1e-5)
    assert names["said"]["label_names"] == list(CLASSES)
    config = timm.data.resolve_model_data_config(folder)
    card = load_trained(run).card
    assert [tuple(config[key]) for key in ("input_size", "mean", "std")] == [(3, 64, 64), card.mean, card.std]
    assert config["interpolation"] == "bicubic"
    assert round(64 / config["crop_pct"]) == 72
    assert "0 of 16 images get another class" in done.notes[-1]


def test_transformers_loads_the_export(run: Path) -> None:
    from transformers import AutoModelForImageClassification

    done = export(run, "hf")
    _, normalised, logits = _expected(run)
    model = AutoModelForImageClassification.from_pretrained(done.folder).eval()
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    with torch.no_grad():
        np.testing.assert_allclose(model(pixel_values=normalised).logits.numpy(), logits, rtol=1e-5, atol=1e-5)
    assert [model.config.id2label[i] for i in range(5)] == list(CLASSES)


@pytest.mark.parametrize("to", [slow("onnx"), slow("torch-export")])
def test_programs_of_timm_networks_agree(to: str, run: Path) -> None:
    """Each exporter reads its file back and compares logits."""
    assert export(run, to).difference < 1e-4


def test_a_network_of_another_library_is_not_exported_to_timm(made_recipe: Made, tmp_path: Path) -> None:
    run = run_with_weights(tmp_path / "run", made_recipe(), CLASSES)
    with pytest.raises(UserError, match="resnet-tiny is no network of timm; export it --to"):
        export(run, "timm")
