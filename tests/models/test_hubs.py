"""Weights of torchvision and of the Hugging Face hub, from real caches, without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from backbone_files import CLASSES, assert_head_is_zero, assert_same, load, vit_net
from transformers import ViTImageProcessor

from tltrain.core.errors import UserError
from tltrain.models.factory import WeightsMetadata


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("name", "weights", "resize"),
    [
        ("resnet18", "IMAGENET1K_V1", 256),
        pytest.param("resnet50", "IMAGENET1K_V2", 232, marks=pytest.mark.slow),
        pytest.param("resnet50", "DEFAULT", 232, marks=pytest.mark.slow),
    ],
)
def test_torchvision_weights(torch_home: Path, name: str, weights: str, resize: int) -> None:
    entry = torchvision.models.get_model_weights(name)[weights]
    net = torchvision.models.get_model(name)
    torch.save(net.state_dict(), torch_home / entry.url.rsplit("/", 1)[1])
    loaded = load(name, weights)
    got = loaded.chain.net.state_dict()
    assert_same(got, net.state_dict(), but="fc.")
    assert_head_is_zero(loaded, 3)
    assert loaded.card == WeightsMetadata(name, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, resize, "bilinear", CLASSES)
    assert loaded.origin == f"torchvision's {entry}; their head for 1000 classes left out"
    assert all(p.requires_grad for p in loaded.chain.parameters())
    with pytest.raises(UserError, match="know 1000 classes, and the data has 3") as caught:
        load(name, weights, head="keep")
    assert "the weights lack (2): ant, cat" not in str(caught.value)  # bee is one of ImageNet's
    kept = load(name, weights, head="keep", classes=tuple(entry.meta["categories"]))
    assert_same(kept.chain.net.state_dict(), net.state_dict(), but="-")


def test_a_broken_torchvision_file_is_refused(torch_home: Path) -> None:
    path = torch_home / "resnet18-f37072fd.pth"
    path.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth is no whole weights file .*delete it"):
        load("resnet18", "DEFAULT")
    torch.save(torchvision.models.resnet18().state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="is no whole weights file"):
        load("resnet18", "DEFAULT")


def test_a_torchvision_file_that_could_run_code_is_refused(torch_home: Path) -> None:
    torch.save({"fc.weight": Path("x")}, torch_home / "resnet18-f37072fd.pth")
    with pytest.raises(UserError, match="is no whole weights file"):
        load("resnet18", "DEFAULT")


def _hub_cache(home: Path, repo: str, processor: bool) -> None:
    """As huggingface_hub lays it out, with the commit named by refs/main."""
    root, commit = home / "hub" / f"models--{repo.replace('/', '--')}", "c0ffee" + "0" * 34
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    folder = root / "snapshots" / commit
    vit_net().save_pretrained(folder)
    if processor:
        ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}).save_pretrained(folder)


_LOAD = """
import sys
from tltrain.models import factory as backbones; from tltrain.core import recipe
for name, weights in zip(sys.argv[1::2], sys.argv[2::2]):
    spec = recipe.Backbone(name=name, weights=weights)
    for make in (lambda: backbones.skeleton(spec, 3, None, None),
                 lambda: backbones.load(spec, classes=("ant", "bee", "cat"), size=None, resize=None, head="keep", seed=0)):
        try:
            loaded = make()
            print(loaded.card.name, loaded.card.mean, loaded.origin)
        except backbones.UserError as error:
            print("refused", error)
"""


def _without_network(home: Path, *names_and_weights: str, port: int = 9) -> list[str]:
    """Two lines for each pair: its skeleton, then itself with its head kept.

    In a process of its own: huggingface_hub and urllib look at the environment once. The network is a closed port, or that of the test.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(home), "TORCH_HOME": str(home), "https_proxy": f"http://127.0.0.1:{port}", "no_proxy": ""}
    command = [sys.executable, "-c", _LOAD, *names_and_weights]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("processor", [True, False])
def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path: Path, processor: bool) -> None:
    _hub_cache(tmp_path, "org/some-vit", processor)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1] if processor else 9  # without a preprocessor the hub is asked for one
        lines = _without_network(tmp_path, "vit", "org/some-vit", port=port)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody called
            proxy.accept()
    mean = "(0.1, 0.2, 0.3)" if processor else "(0.5, 0.5, 0.5)"
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"vit {mean} hub org/some-vit at revision c0ffee000000")
        assert ("preprocessor_config" in line) == (not processor)


def test_what_cannot_be_fetched_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """A plan makes do with the name; a run says what to fetch, and where it belongs."""
    lines = _without_network(tmp_path, "vit-b16", "org/other", "resnet18", "DEFAULT", "vit", "org/other")
    hub_plan, hub_run, torch_plan, torch_run, nameless, _ = lines
    assert hub_plan.startswith("vit-b16 (0.5, 0.5, 0.5) hub org/other; it is not in the hub's cache")
    assert hub_run.startswith("refused weights 'org/other' are neither a folder here nor a hub repository that can be read")
    assert "hf download org/other" in hub_run
    assert torch_plan == "resnet18 (0.485, 0.456, 0.406) torchvision's ResNet18_Weights.IMAGENET1K_V1"
    assert "download https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere" in torch_run
    assert torch_run.endswith(f"put it at {tmp_path / 'hub' / 'checkpoints' / 'resnet18-f37072fd.pth'}")
    assert nameless.startswith("refused weights 'org/other' are neither")
