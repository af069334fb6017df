"""What comes after and before training, on the device there is: predict, evaluate, every export, doctor, and the plan's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEAD, made_recipe
from digit_files import digit_image
from gpu_device import DEVICES, DEVICES_SLOW, on_gpu, running_on, trained

import tltrain
from tltrain.cache.cost_model import Choice
from tltrain.cache.disk_store import read
from tltrain.cache.filling import CacheFiller
from tltrain.cache.planner import store_root
from tltrain.commands.doctor import doctor
from tltrain.core.output.console import clock
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.exporters import export
from tltrain.evaluation.predict import evaluation_view
from tltrain.evaluation.trained import load_trained

EXPORTS = [("resnet18", "torchvision"), ("resnet18", "hf"), ("vit-tiny", "onnx"), ("vit-tiny", "torch-export")]
WITHIN = 0.3
"""How far an estimate may be from what then happened, as a share of it."""


@pytest.fixture(scope="module")
def run_on(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run, trained on a device; on a GPU in bf16, as its configuration says."""
    made: dict[str, Path] = {}

    def get(device: str) -> Path:
        if device not in made:
            folder = tmp_path_factory.mktemp(device) / "run"
            made[device] = trained(made_recipe(), folder, device, "bf16" if device == "cuda" else "no")
        return made[device]

    return get


@pytest.mark.parametrize("device", DEVICES)
def test_predictions_are_those_of_the_network_on_the_cpu(device: str, run_on: Any) -> None:
    run = tltrain.load(run_on(device))
    pictures = [digit_image(i) for i in range(40)]
    said = run.predict(pictures, top=3)
    assert next(run._trained.placed.parameters()).device.type == device
    assert next(run.model.parameters()).device.type == "cpu"
    views = torch.stack([v for p in pictures if isinstance(v := evaluation_view(p, run._trained.preprocess), torch.Tensor)])
    share_BK = run.model(views).softmax(1)
    assert [p.confidence for p in said] == pytest.approx(share_BK.amax(1).tolist(), abs=1e-2)
    sure = share_BK.topk(2).values.diff().abs().flatten() > 0.05
    own = [run.classes[k] for k in share_BK.argmax(1)]
    assert [p.label for p, s in zip(said, sure, strict=True) if s] == [name for name, s in zip(own, sure, strict=True) if s]


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_evaluated_as_it_was_tested(device: str, run_on: Any) -> None:
    run = run_on(device)
    test = json.loads((run / "test_metrics.json").read_text())
    with running_on(device, "bf16" if device == "cuda" else "no"):
        again = evaluate(run, None, "test", 128)
    assert (again["n"], again["confusion"]) == (test["n"], test["confusion"])
    assert again["loss"] == pytest.approx(test["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("net", "to"), [("resnet18", "torchvision"), ("resnet18", "hf"), ("vit-tiny", "onnx"), ("vit-tiny", "torch-export")]
)
@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_what_a_device_trained_is_exported(device: str, net: str, to: str, tmp_path: Path) -> None:
    """Every form opens on its other side, and says what the run says."""
    if to == "onnx":
        pytest.importorskip("onnxscript")
    recipe = made_recipe(backbone={"name": net}, stages=[HEAD | {"steps": 2}])
    run = trained(recipe, tmp_path / "run", device, "bf16" if device == "cuda" else "no")
    done = export(run, to)
    assert done.difference < 1e-3
    assert next(load_trained(run).chain.parameters()).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_doctor_says_what_is_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(["--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert "two processes work together by gloo" in said
    if device == "cuda":
        assert torch.cuda.get_device_name(0) in said
        assert f"CUDA {torch.version.cuda}" in said
        assert "NCCL missing" not in said
        assert "train on" in said.splitlines()[-1] or "problem" in said.splitlines()[-1]


@pytest.mark.parametrize(("device", "backbone", "size"), [("cpu", "resnet-micro", 32), on_gpu("cuda", "resnet18", 224)])
def test_a_plan_says_what_then_happens(device: str, backbone: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a store exactly, and on a GPU the seconds that it takes to fill. On a CPU others are at work too.

    So many views that the first call of each kernel, half a second in all, is a small part.
    """
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    filled: list[tuple[Choice, float]] = []
    original = CacheFiller.fill

    def fill(filler: CacheFiller, opened: Any, choice: Choice, *arguments: Any) -> str | None:
        began = clock()
        why = original(filler, opened, choice, *arguments)
        filled.append((choice, clock() - began))
        return why

    monkeypatch.setattr(CacheFiller, "fill", fill)
    data = {"per_class": None, "size": size, "resize": size}
    stage = HEAD | {"views": 8 if device == "cuda" else 2, "augment": "light"}
    recipe = made_recipe(backbone={"name": backbone}, data=data, stages=[stage])
    trained(recipe, tmp_path / "run", device, "bf16" if device == "cuda" else "no", cache="always", cache_images="never")
    assert [choice.what.split(", ")[-1] for choice, _ in filled] == ["train", "val"]
    rows = [tensor for file in store_root().rglob("*.safetensors") for tensor in read(file).values()]
    assert sum(t.numel() * t.element_size() for t in rows) == sum(choice.num_bytes for choice, _ in filled)
    assert all(choice.line().split(", ")[0] in (tmp_path / "run" / "plan.txt").read_text() for choice, _ in filled)
    if device == "cuda":
        choice, seconds = filled[0]
        assert choice.fill_s == pytest.approx(seconds, rel=WITHIN), f"planned {choice.fill_s:.2f} s, took {seconds:.2f} s"
