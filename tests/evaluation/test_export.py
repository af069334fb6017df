"""Exports, each opened with the other side's own tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import slow
from digit_files import digit_folder, digit_image, run_with_weights
from torchvision.models import get_model

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Recipe
from tltrain.evaluation.exporters import Exported, export, hf
from tltrain.evaluation.predict import evaluation_view, predict
from tltrain.evaluation.trained import TrainedModel, load_trained
from tltrain.models import factory
from tltrain.models.weight_files import twins
from tltrain.training.run import train

Made = Callable[..., Recipe]
CLASSES = ("ant", "bee", "cat & dog", "Ünübersehbar", "eel")
NETS: dict[str, dict[str, Any]] = {
    "resnet": {"backbone": {"name": "resnet18"}, "data": {"size": 64, "resize": 72}},
    "vit": {"backbone": {"name": "vit-tiny"}, "data": {"size": 32, "resize": 32}},
    "micro": {"data": {"size": 32, "resize": 32}},
    "timm": {"backbone": {"name": "timm:test_vit"}, "data": {"size": 32, "resize": 36}},
}


@pytest.fixture(name="run_of")
def _run_of(made_recipe: Made, tmp_path: Path) -> Callable[[str], Path]:
    def run_of(net: str, temperature: float = 1.7) -> Path:
        return run_with_weights(tmp_path / net, made_recipe(**NETS[net]), CLASSES, temperature)

    return run_of


def views(trained: TrainedModel, numbers: range = range(6)) -> torch.Tensor:
    """The evaluation views of some digits, floats in [0, 1]."""
    return torch.stack([v for n in numbers if isinstance(v := evaluation_view(digit_image(n), trained.preprocess), torch.Tensor)]) / 255


def use(done: Exported, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """The names that the README's own code leaves, run in the export's folder."""
    text = (done.folder / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace("PATH OF THIS FOLDER", ".")
    monkeypatch.chdir(done.folder)
    exec(code, given)
    return given


def expected(run: Path) -> tuple[TrainedModel, torch.Tensor, np.ndarray]:
    """(the run, views, the logits that its plain weights give, divided by its temperature): read without our own calibration."""
    from safetensors.torch import load_file

    trained = load_trained(run)
    x = views(trained)
    reference = load_trained(run)
    reference.chain.net.load_state_dict(load_file(run / "weights.safetensors"))
    with torch.no_grad():
        return trained, x, (reference.chain(x) / trained.card.temperature).numpy()


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_transformers_opens_the_folder_as_it_is(
    net: str, run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    run = run_of(net)
    done = export(run, "hf")
    trained, x, logits = expected(run)
    model = AutoModelForImageClassification.from_pretrained(done.folder).eval()
    with torch.no_grad():
        theirs = model(pixel_values=trained.chain.normalise(x)).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-5, atol=1e-4)
    assert [model.config.id2label[i] for i in range(5)] == list(CLASSES)
    assert (done.folder / "model.safetensors").is_file()
    digit_image(4).save(tmp_path / "x.png")
    digit_image(4).save(done.folder / "x.jpg")
    assert use(done, monkeypatch)["classify"].model.config.num_labels == 5
    said = pipeline("image-classification", model=str(done.folder))(str(tmp_path / "x.png"), top_k=5)
    own = next(predict(trained, [tmp_path / "x.png"]))
    assert said[0]["label"] == own.label
    assert said[0]["score"] == pytest.approx(own.confidence, abs=0.02)  # the processor resizes with another library
    processor: Any = AutoImageProcessor.from_pretrained(done.folder)
    pixels = processor(images=digit_image(4), return_tensors="pt")["pixel_values"]
    off = (pixels - trained.chain.normalise(views(trained, range(4, 5)))) * torch.tensor(trained.card.std).view(3, 1, 1) * 255
    assert off.abs().max() <= 2
    assert any("pixels differ by" in note for note in done.notes)
    assert f"0 of {done.num_images} images get another class" in done.notes[-1]


@pytest.mark.parametrize("name", ["resnet18", slow("resnet50")])
def test_torchvision_loads_the_state_dict_strictly(name: str, made_recipe: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with_weights(tmp_path / "run", made_recipe(backbone={"name": name}, data={"size": 64, "resize": 72}), CLASSES, 0.6)
    done = export(run, "torchvision")
    trained, x, logits = expected(run)
    model = get_model(name, num_classes=5).eval()
    model.load_state_dict(torch.load(done.folder / "model.pth", weights_only=True), strict=True)
    with torch.no_grad():
        np.testing.assert_allclose(model(trained.chain.normalise(x)).numpy(), logits, rtol=1e-5, atol=1e-4)
    said = json.loads((done.folder / "model.json").read_text(encoding="utf-8"))
    assert said["classes"] == list(CLASSES)
    assert (said["name"], said["size"], said["resize"]) == (name, 64, 72)
    theirs = use(done, monkeypatch, image=digit_image(0))["logits"].detach().numpy()
    np.testing.assert_allclose(theirs, logits[:1], rtol=1e-5, atol=1e-4)


def test_resnet50_becomes_transformers_own_resnet(made_recipe: Made, tmp_path: Path) -> None:
    run = run_with_weights(tmp_path / "run", made_recipe(backbone={"name": "resnet50"}, data={"size": 64, "resize": 72}), CLASSES)
    trained, x, logits = expected(run)
    hf.write(trained, tmp_path / "hf", x)
    assert hf.classes(tmp_path / "hf") == list(CLASSES)
    with torch.no_grad():
        np.testing.assert_allclose(hf.read(tmp_path / "hf")(x).numpy(), logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("net", [slow("resnet"), "vit", "micro"])
def test_a_program_of_torch_export_takes_any_batch(net: str, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(net)
    done = export(run, "torch-export")
    _, x, logits = expected(run)
    extra = {"classes.json": ""}
    program = torch.export.load(done.folder / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == list(CLASSES)
    for n in (1, 3, 6):
        with torch.no_grad():
            np.testing.assert_allclose(program(x[:n]).numpy(), logits[:n], rtol=1e-5, atol=1e-4)
    assert use(done, monkeypatch, images=x)["classes"] == list(CLASSES)


@pytest.mark.parametrize("net", [slow("resnet"), "vit", "micro"])
def test_onnx_runtime_takes_any_batch(net: str, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = run_of(net)
    done = export(run, "onnx")
    assert done.difference <= 1e-4
    _, x, logits = expected(run)
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
    assert [path.name for path in sorted(done.folder.iterdir())] == ["README.md", "model.onnx"]
    for n in (1, 3, 6):
        np.testing.assert_allclose(session.run(None, {"images": x[:n].numpy()})[0], logits[:n], rtol=1e-5, atol=1e-4)
    assert use(done, monkeypatch, images=x.numpy())["classes"] == list(CLASSES)


@pytest.mark.parametrize(("net", "target"), [("micro", "hf"), ("micro", "torchvision"), ("vit", "torchvision")])
def test_a_network_without_a_class_there_is_refused_by_name(net: str, target: str, run_of: Callable[[str], Path]) -> None:
    run = run_of(net)
    says = {"micro": r"resnet-tiny; export it --to onnx or torch-export$", "vit": r"vit-tiny; export it --to hf, onnx or torch-export$"}
    with pytest.raises(UserError, match=says[net]):
        export(run, target)
    assert not (run / "export").exists()


def test_a_crop_that_transformers_rounds_otherwise_is_said(made_recipe: Made, tmp_path: Path) -> None:
    """43 pixels cut to 32 leave 5.5 on the left: torchvision takes 6 of them and transformers 5."""
    run = run_with_weights(tmp_path / "run", made_recipe(backbone={"name": "vit-tiny"}, data={"size": 32, "resize": 36}), CLASSES)
    digit_image(4).save(tmp_path / "x.png")
    done = export(run, "hf", images=[tmp_path / "x.png"])
    assert "it rounds the crop's corner otherwise" in done.notes[0]
    assert "of 1 images get another class" in done.notes[1]


def test_an_export_that_differs_is_not_kept(run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, convert = run_of("resnet"), twins.converted

    def crossed(state: dict[str, torch.Tensor], body: Any) -> twins.Twin | None:
        names = {"layer1.0": "layer1.1", "layer1.1": "layer1.0"}
        return convert({names.get(name[:8], name[:8]) + name[8:]: tensor for name, tensor in state.items()}, body)

    monkeypatch.setattr(twins, "converted", crossed)
    with pytest.raises(UserError, match="differ by"):
        export(run, "hf")
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize(("net", "target"), [("resnet", "hf"), ("vit", "hf"), ("resnet", "torchvision"), ("timm", "timm"), ("timm", "hf")])
def test_an_export_is_given_back_as_weights(net: str, target: str, run_of: Callable[[str], Path]) -> None:
    """It names its network, classes and preprocessing by itself, and its answers are those of the run."""
    run = run_of(net)
    done = export(run, target)
    trained, x, logits = expected(run)
    spec = Backbone(weights=str(done.folder))
    kept = factory.load(spec, classes=CLASSES, size=None, resize=None, head="keep", seed=0)
    assert (kept.card.name, kept.card.mean, kept.card.std) == (trained.card.name, trained.card.mean, trained.card.std)
    assert kept.preprocess == trained.preprocess
    with torch.no_grad():
        np.testing.assert_allclose(kept.chain(x).numpy(), logits, rtol=1e-5, atol=1e-4)
    again = factory.load(spec, classes=("x", "y"), size=None, resize=None, head="new", seed=0)
    assert "their head for 5 classes left out" in again.origin


def test_an_export_that_is_a_program_is_refused_as_weights(run_of: Callable[[str], Path]) -> None:
    done = export(run_of("micro"), "torch-export")
    for path in (done.folder, done.folder / "model.pt2"):
        with pytest.raises(UserError, match=r"torch\.export.*a program, not weights by name"):
            factory.load(Backbone(weights=str(path)), classes=CLASSES, size=None, resize=None, head="keep", seed=0)


def test_where_an_export_goes(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("micro")
    first, again = export(run, "torch-export"), export(run, "torch-export")
    assert first.folder == again.folder == run / "export" / "torch-export"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        export(run, "torch-export", tmp_path / "mine")
    with pytest.raises(UserError, match="--to is 'tflite'; it can be hf, torchvision, timm, onnx, torch-export"):
        export(run, "tflite")
    with pytest.raises(UserError, match=r"--to is 'onxx'; did you mean onnx\?"):
        export(run, "onxx")


def test_the_card_of_a_real_run_says_what_it_is(made_recipe: Made, tmp_path: Path) -> None:
    images = digit_folder(tmp_path / "images")
    recipe = made_recipe(data={"source": f"folder:{images}", "per_class": None}, backbone={"name": "vit-tiny"})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    done = export(tmp_path / "run", "hf")
    text = (done.folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert re.search(r"fingerprint .*`[0-9a-f]{32}`", text)
    assert re.search(r"\| accuracy \| [\d.]+ % \| [\d.]+ to [\d.]+ % ", text)
    assert re.search(r"\| F1, mean over classes \| [\d.]+ % \| [\d.]+ to [\d.]+ % ", text)
    assert "pipeline(" in text
    assert "digit 3" in text
    assert "Fewer than 30 test images" in text
    assert recipe.to_yaml() in text
    (images / "test").rename(tmp_path / "moved")
    for folder in ("train", "val"):
        (images / folder).rename(tmp_path / folder)
    with pytest.raises(UserError, match="--images"):
        export(tmp_path / "run", "torch-export")
    done = export(tmp_path / "run", "torch-export", images=sorted((tmp_path / "moved").rglob("*.png"))[:5])
    assert done.num_images == 5
