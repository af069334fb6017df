"""Our own weights files and run folders, files of others, and weights that are not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from backbone_files import CLASSES, assert_head_is_zero, images, load, ours
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, Recipe
from tltrain.models import factory, metadata, weights
from tltrain.training.run import train


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.safetensors"
    written = ours(path, name)
    assert factory.read_card(path) == written.card
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    for given in (path, tmp_path):
        kept = load(None, given, head="keep")
        assert kept.card == written.card
        assert torch.equal(kept.chain(images()), written.chain(images()))
        assert kept.origin == str(path)
    fresh = load(name, path, classes=("x", "y"))
    assert_head_is_zero(fresh, 2)
    last = len(fresh.chain.blocks) - 1
    assert torch.equal(fresh.chain(images(), stop=last), written.chain(images(), stop=last))
    assert fresh.card.classes == ("x", "y")


@pytest.mark.parametrize("classes", [CLASSES, ('"quoted"', "tab\t", "Käfer", "虫\U0001f41d", "\x1f\x7f\\")])
def test_equal_weights_are_equal_files(tmp_path: Path, classes: tuple[str, ...]) -> None:
    loaded = ours(tmp_path / "0.safetensors", classes=classes)
    for i in range(1, 12):
        factory.write_weights(tmp_path / f"{i}.safetensors", loaded.chain.net.state_dict(), loaded.card)
    card = factory.read_card(tmp_path / "0.safetensors")
    assert card is not None
    assert card.classes == classes
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_file_may_be_replaced_while_its_weights_are_in_use(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    written = ours(path)
    loaded = load(None, path, head="keep")
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.chain(images()), written.chain(images()))


def test_weights_go_into_torchvision_as_they_are(tmp_path: Path) -> None:
    ours(tmp_path / "w.safetensors", "resnet18")
    net = torchvision.models.resnet18(num_classes=3)
    net.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)


def test_weights_go_into_transformers_as_they_are(tmp_path: Path) -> None:
    """By load_state_dict, and by from_pretrained from a folder with the card's configuration."""
    path = tmp_path / "model.safetensors"
    written = ours(path, "vit-tiny")
    card = factory.read_card(path)
    assert card is not None
    net = ViTForImageClassification(ViTConfig.from_dict(card.config)).eval()
    net.load_state_dict(load_file(path), strict=True)
    (tmp_path / "config.json").write_text(json.dumps(card.config))
    loaded: Any = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert not any(info.values()), info
    assert again.config.id2label == dict(enumerate(CLASSES))
    pixels = written.chain.normalise(images())
    assert torch.equal(net(pixels).logits, written.chain(images()))
    assert torch.equal(again.eval()(pixels).logits, written.chain(images()))


def test_a_head_must_know_the_same_classes(tmp_path: Path) -> None:
    ours(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"know 3 classes, and the data has 2; the data lacks \(1\): cat\. They must be the same"):
        load(None, tmp_path / "w.safetensors", head="keep", classes=CLASSES[:2])


def test_a_card_whose_head_has_another_size_is_refused(tmp_path: Path) -> None:
    written = ours(tmp_path / "w.safetensors")
    state = {**written.chain.net.state_dict(), "fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(7)}
    factory.write_weights(tmp_path / "w.safetensors", state, written.card)
    with pytest.raises(UserError, match=r"fc\.bias is \(7,\), not \(3,\), fc\.weight is \(7, 64\), not \(3, 64\)"):
        load(None, tmp_path / "w.safetensors", head="keep")


def test_a_file_that_does_not_fit_is_refused_by_names(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"do not fit resnet34: missing \(96\): layer1\.2\.bn1\.bias"):
        load("resnet34", path)
    with pytest.raises(UserError, match=r"unexpected \(\d+\): bn1\.bias"):
        load("vit-tiny", path)
    with pytest.raises(UserError, match=r"backbone\.name is null, and .* cannot say which network it is"):
        load(None, path)
    with pytest.raises(UserError, match="do not say which classes their head knows"):
        load("resnet18", path, head="keep")
    loaded = load("resnet18", path)
    assert "size, mean and std are assumed from the name resnet18; their head for 1000 classes left out" in loaded.origin
    state = {**loaded.chain.net.state_dict(), "bn1.weight": torch.zeros(3)}
    factory.write_weights(path, state, loaded.card)
    with pytest.raises(UserError, match=r"of another shape \(1\): bn1\.weight is \(3,\), not \(64,\)"):
        load(None, path)


def test_a_vit_file_without_a_card_may_have_any_names_of_transformers(tmp_path: Path) -> None:
    written = ours(tmp_path / "ours.safetensors", "vit-tiny")
    written.chain.net.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    old = load_file(tmp_path / "hf" / "model.safetensors")
    assert not set(old) & {"vit.layers.0.attention.q_proj.weight"}
    save_file(old, tmp_path / "old.safetensors")
    last = len(written.chain.blocks) - 1
    assert torch.equal(load("vit-tiny", tmp_path / "old.safetensors").chain(images(), stop=last), written.chain(images(), stop=last))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "IMAGENET1K_V3", "no weights name of resnet18"),
        ("resnet18", "google/vit", "no weights name of resnet18"),
        ("resnet-tiny", "IMAGENET1K_V1", "no such file or folder exists"),
        (None, "runs/a/b", "no such file or folder exists"),
        ("vit-b16", "IMAGENET1K_V1", "no such file or folder exists"),
        (None, "some.safetensors", "there is no such file"),
        (None, "shipped:nothing", "no such weights come with tltrain"),
    ],
)
def test_weights_that_are_not_there_are_refused(name: str | None, weights: str, message: str) -> None:
    for make in (lambda: load(name, weights), lambda: factory.skeleton(Backbone(name=name, weights=weights), 3, None, None)):
        with pytest.raises(UserError, match=message):
            make()


def test_folders_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither weights\.safetensors"):
        load(None, tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"run folder .* let that run finish first"):
        load(None, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(None, tmp_path)
    ours(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"backbone\.name is resnet-tiny, and the weights .* are a resnet-micro"):
        load("resnet-tiny", tmp_path)


def test_random_weights_have_no_head_to_keep() -> None:
    with pytest.raises(UserError, match="random weights have no head to keep"):
        factory.load(Backbone(name="resnet-micro"), classes=CLASSES, size=None, resize=None, head="keep", seed=0)


SHIPPED = "af10101056bb20d0c202a1b29c8f3270"
"""The fingerprint of shipped:resnet-tiny-printed that versions before 0.3 took."""


def test_a_fingerprint_is_the_one_that_older_versions_took(tmp_path: Path) -> None:
    """A run that they began is resumed by this one, which compares them."""
    written = ours(tmp_path / "w.safetensors")
    of_old = repr(written.card).replace(", thresholds=None", "")  # what they did not know of
    old = hashlib.blake2b(of_old.encode(), digest_size=16)
    for name, tensor in sorted(load_file(tmp_path / "w.safetensors").items()):
        old.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        old.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert weights.fingerprint(weights.open_once(Backbone(weights=str(tmp_path / "w.safetensors")))) == old.hexdigest()
    shipped = Backbone(weights="shipped:resnet-tiny-printed")
    assert weights.fingerprint(weights.open_once(shipped)) == SHIPPED
    assert weights.fingerprint(weights.open_once(Backbone(name="resnet18"))) is None


def test_a_start_reads_its_weights_once(tmp_path: Path, made_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hashed, and then loaded."""
    read, paths = metadata.read_state, []

    def counted(path: str | Path) -> dict[str, torch.Tensor]:
        paths.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(weights, "read_state", counted)
    train(made_recipe().smoke(), RunFlags(folder=tmp_path / "run"))
    assert paths.count("resnet-tiny-printed.safetensors") == 1
