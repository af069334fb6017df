"""Networks that several libraries hold under other names: their weights are converted, and the answers are equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from backbone_files import images, load, ours
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetModel

from tltrain.core.errors import UserError
from tltrain.models.families import resnet_hf
from tltrain.models.family import family_of
from tltrain.models.weight_files.fit import Fitted, fit
from tltrain.models.weight_files.recognise import recognise


def filled(net: nn.Module) -> nn.Module:
    """No tensor is what a fresh net would hold, so that none can be left out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net.eval()


def timm_vit() -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "mlp_ratio": 2, "num_classes": 3}
    return filled(timm.models.VisionTransformer(**sizes))


def torchvision_vit() -> Any:
    return filled(torchvision.models.VisionTransformer(32, 8, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=3))


def hf_vit() -> Any:
    family = family_of("vit-tiny")
    return filled(family.build(family.default_card("vit-tiny"), 3))


def logits(net: Any, x_BCHW: Tensor) -> Tensor:
    out = net(x_BCHW)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("make", [timm_vit, torchvision_vit])
def test_a_vit_of_timm_or_torchvision_is_a_vit_here(tmp_path: Path, make: Callable[[], Any]) -> None:
    """With the epsilon of its LayerNorms, so that the features are equal: before the head, which is new."""
    theirs = make()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    loaded = load("vit-tiny", tmp_path / "w.pth")
    assert "ViT of " + ("timm" if make is timm_vit else "torchvision") in loaded.origin
    assert loaded.card.config["layer_norm_eps"] == 1e-6
    with torch.no_grad():
        features = loaded.chain(images(), stop=len(loaded.chain.blocks) - 1)
        head = theirs.head if make is timm_vit else theirs.heads.head
        assert torch.allclose(head(features), logits(theirs, loaded.chain.normalise(images())), atol=1e-4)


VITS = {"timm": (timm_vit, "head"), "torchvision": (torchvision_vit, "heads.head"), "transformers": (hf_vit, "classifier")}


@pytest.mark.parametrize("source", VITS)
@pytest.mark.parametrize("target", VITS)
def test_vits_convert_in_every_direction(source: str, target: str) -> None:
    theirs, ours_ = VITS[source][0](), VITS[target][0]()
    want = {name: tuple(tensor.shape) for name, tensor in ours_.state_dict().items()}
    fitted = fit(theirs.state_dict(), want, VITS[target][1], "w.pth")
    assert isinstance(fitted, Fitted)
    ours_.load_state_dict(fitted.state, strict=True)
    for net in (theirs, ours_):
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
    with torch.no_grad():
        x_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(logits(theirs, x_BCHW), logits(ours_, x_BCHW), atol=1e-4)
    assert bool(fitted.notes) == (source != target)


def test_position_embeddings_of_another_size_say_the_size(tmp_path: Path) -> None:
    net = timm.models.VisionTransformer(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=4, mlp_ratio=2, num_classes=0)
    torch.save(filled(net).state_dict(), tmp_path / "w.pth")
    loaded = load("vit-tiny", tmp_path / "w.pth")
    assert "their position embeddings are for images of 64 px" in loaded.origin
    assert (loaded.card.size, loaded.chain(images(64)).shape) == (64, (2, 3))
    smaller = load("vit-tiny", tmp_path / "w.pth", size=32)
    assert "position embeddings interpolated from 64 to 32 px" in smaller.origin


def test_a_resnet_of_timm_has_the_names_of_torchvision(tmp_path: Path) -> None:
    torch.save({"state_dict": timm.create_model("resnet18", num_classes=5).state_dict()}, tmp_path / "w.pth.tar")
    assert "their head for 5 classes left out" in load("resnet18", tmp_path / "w.pth.tar").origin


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_resnet_in_a_folder_of_transformers_is_torchvisions(tmp_path: Path, name: str, file: str) -> None:
    """As `tltrain export --to hf` writes it, and as the hub has it, with a head and without."""
    written = ours(tmp_path / "w.safetensors", name)
    model = resnet_hf.converted(written.chain.net)
    model.config.id2label = dict(enumerate(("ant", "bee", "cat")))
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    if file.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / file)
    kept = load(None, folder, head="keep")
    want = written.chain.net.state_dict()
    assert (kept.card.name, kept.card.classes) == (name, ("ant", "bee", "cat"))
    assert all(torch.equal(tensor, want[key]) for key, tensor in kept.chain.net.state_dict().items())
    if not file.endswith(".bin"):
        ResNetModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
        assert "they have no head" in load(name, tmp_path / "bare").origin
        assert "ResNet of transformers, and converted" in load(name, folder / file).origin


def small_convnexts() -> dict[str, tuple[Any, str]]:
    pairs = zip((8, 16, 24, 32), (16, 24, 32, None), (1, 1, 2, 1), strict=True)
    settings = [CNBlockConfig(width, after, depth) for width, after, depth in pairs]
    hf = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    hf.num_labels = 3
    return {
        "timm": (timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=3), "head.fc"),
        "torchvision": (ConvNeXt(settings, num_classes=3), "classifier.2"),
        "transformers": (ConvNextForImageClassification(hf), "classifier"),
    }


@pytest.mark.parametrize("source", ["timm", "torchvision", "transformers"])
@pytest.mark.parametrize("target", ["timm", "torchvision", "transformers"])
def test_convnexts_convert_in_every_direction(source: str, target: str) -> None:
    (theirs, _), (ours_, head) = small_convnexts()[source], small_convnexts()[target]
    filled(theirs)
    fitted = fit(theirs.state_dict(), {name: tuple(t.shape) for name, t in ours_.state_dict().items()}, head, "w.pth")
    assert isinstance(fitted, Fitted)
    ours_.eval().load_state_dict(fitted.state, strict=True)
    for net in (theirs, ours_):
        for module in net.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-6
    with torch.no_grad():
        x_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(logits(theirs, x_BCHW), logits(ours_, x_BCHW), rtol=1e-4, atol=1e-4)


def test_a_vit_that_has_more_than_its_twin_is_refused(tmp_path: Path) -> None:
    state = {**timm_vit().state_dict(), "dist_token": torch.ones(1, 1, 96)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"do not fit vit-tiny.*unexpected .*"):
        load("vit-tiny", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: timm.create_model("vit_small_patch16_224", num_classes=0), "timm:vit_small_patch16_224"),
        (lambda: timm.create_model("vit_small_patch16_224", num_classes=7), "timm:vit_small_patch16_224"),
        (lambda: torchvision.models.resnet34(), "torchvision:resnet34"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=2), "torchvision:mobilenet_v3_small"),
        (lambda: timm.create_model("tf_efficientnet_lite0"), "timm:tf_efficientnet_lite0"),
        (lambda: nn.Linear(3, 4), None),
    ],
)
def test_networks_are_recognised_by_their_shapes(make: Callable[[], nn.Module], name: str | None) -> None:
    with torch.device("meta"):
        state = make().state_dict()
    modules = {module: f"any.m{i}" for i, module in enumerate(dict.fromkeys(key.rpartition(".")[0] for key in state))}
    renamed = {f"{modules[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": tensor for key, tensor in state.items()}
    assert name in recognise(renamed) if name else not recognise(renamed)
