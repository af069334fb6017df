"""Weights that other programs wrote: containers, prefixes, order, what they look like, and exports of ours given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from backbone_files import CLASSES, images, load, ours
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory

MICRO = "resnet-micro"


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of a resnet-micro, in the order of the network."""
    loaded = ours(tmp_path / "ours.safetensors", MICRO)
    return dict(loaded.chain.net.state_dict())


def saved(content: Any, path: Path, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def assert_is(name: str, path: Path, state: dict[str, Tensor]) -> str:
    """That a file gives the network these tensors, but for the head. Returns what the user is told."""
    loaded = load(name, path)
    got = loaded.chain.net.state_dict()
    assert all(torch.equal(got[key], tensor) for key, tensor in state.items() if not key.startswith("fc."))
    assert "size, mean and std are assumed from the name" in loaded.origin
    assert load_plan(name, path) in loaded.origin, "a plan says the same"
    return loaded.origin


def load_plan(name: str | None, path: Path) -> str:
    return factory.skeleton(Backbone(name=name, weights=str(path)), 3, None, None).origin


@pytest.mark.parametrize("file", ["w.pth", "w.pt", "w.pth.tar", "w.bin", "w.ckpt", "w"])
def test_a_file_of_torch_has_any_name(tmp_path: Path, state: dict[str, Tensor], file: str) -> None:
    line = assert_is(MICRO, saved(state, tmp_path / file), state)
    assert line.startswith(f"{tmp_path / file}; the file says nothing of itself")
    assert line.endswith("their head for 3 classes left out")


def test_old_files_of_torch_and_misnamed_ones_are_read_by_their_content(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert_is(MICRO, saved(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False), state)
    save_file(state, tmp_path / "really_safetensors.pth")
    assert_is(MICRO, tmp_path / "really_safetensors.pth", state)
    assert_is(MICRO, saved(state, tmp_path / "really_torch.safetensors"), state)


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema", "ema_state_dict", "teacher", "anything"]
)
def test_containers_are_opened(tmp_path: Path, state: dict[str, Tensor], key: str) -> None:
    line = assert_is(MICRO, saved({key: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "c.pth"), state)
    assert f"the weights are its {key}; left out: epoch, optimizer" in line


def test_averaged_weights_are_taken_first_and_it_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """As in checkpoints of timm's and torchvision's training scripts."""
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    timm_s = {"epoch": 1, "arch": "x", "state_dict": other, "optimizer": optimizer, "state_dict_ema": state}
    line = assert_is(MICRO, saved(timm_s, tmp_path / "timm.pth.tar"), state)
    assert "the weights are its state_dict_ema; left out: epoch, arch, state_dict, optimizer" in line
    averaged = {"n_averaged": torch.tensor(9), **{f"module.module.{name}": tensor for name, tensor in state.items()}}
    line = assert_is(MICRO, saved({"model": other, "model_ema": averaged, "epoch": 1}, tmp_path / "references.pth"), state)
    assert "the weights are its model_ema" in line
    assert f"all {len(state)} names stripped of module.module." in line


def test_a_checkpoint_of_lightning(tmp_path: Path, state: dict[str, Tensor]) -> None:
    inner = {**{f"model.net.{name}": tensor for name, tensor in state.items()}, "criterion.weight": torch.ones(3)}
    content = {"state_dict": inner, "pytorch-lightning_version": "2.5", "callbacks": {}, "hyper_parameters": {"lr": 0.1}, "loops": {}}
    line = assert_is(MICRO, saved(content, tmp_path / "last.ckpt"), state)
    assert f"all {len(state)} names stripped of model.net.; left out, as they stand beside it: tensors (1): criterion.weight" in line


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "module._orig_mod.", "my.own."])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_prefix_of_all_names_is_stripped(tmp_path: Path, state: dict[str, Tensor], prefix: str, kind: str) -> None:
    renamed = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / f"w.{kind}"
    save_file(renamed, path) if kind == "safetensors" else torch.save(renamed, path)
    assert f"all {len(state)} names stripped of {prefix}" in assert_is(MICRO, path, state)


def test_a_network_that_is_there_twice_is_not_chosen(tmp_path: Path, state: dict[str, Tensor]) -> None:
    twice = {f"{side}.{name}": tensor for side in ("encoder_q", "encoder_k") for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"hold the network 2 times, under encoder_q\., encoder_k\.; save the one you want"):
        load(MICRO, saved(twice, tmp_path / "moco.pth"))
    with pytest.raises(UserError, match=r"several sets of tensors \(generator, critic\)"):
        load(MICRO, saved({"generator": state, "critic": state}, tmp_path / "gan.pth"))


def test_a_head_of_another_form_is_left_out(tmp_path: Path, state: dict[str, Tensor]) -> None:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    path = saved({**body, "fc.0.weight": torch.ones(8, 64), "fc.2.weight": torch.ones(3, 8)}, tmp_path / "w.pth")
    assert "their head, fc.0.weight, fc.2.weight, is not of the network's form and left out" in assert_is(MICRO, path, state)
    assert "they have no head" in assert_is(MICRO, saved(body, tmp_path / "body.pth"), state)


def test_counts_of_batches_may_be_missing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """As in files of torch before 0.4.1."""
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert "BatchNorm's counts of batches are missing" in load(MICRO, saved(old, tmp_path / "w.pth")).origin


def renamed_in_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = {name: f"_m{i}" for i, name in enumerate(dict.fromkeys(key.rpartition(".")[0] for key in state))}
    return {f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor for name, tensor in state.items()}


def test_tensors_of_other_names_are_taken_in_their_order(tmp_path: Path, state: dict[str, Tensor]) -> None:
    line = assert_is(MICRO, saved(renamed_in_order(state), tmp_path / "w.pth"), state)
    assert "none of their names is the network's; the 62 tensors were taken in their order" in line
    assert "(_m0.weight as conv1.weight, _m24.bias as fc.bias)" in line


def _swapped(names: list[str], first: str, second: str) -> list[str]:
    i, j = names.index(first), names.index(second)
    names[i], names[j] = names[j], names[i]
    return names


@pytest.mark.parametrize(
    "change", ["one more", "one less", "another end", "another order", "modules mixed", "a name of another place", "safetensors"]
)
def test_an_order_that_does_not_say_enough_is_refused(tmp_path: Path, state: dict[str, Tensor], change: str) -> None:
    theirs = renamed_in_order(state)
    names = list(theirs)
    if change == "one more":
        theirs["_m99.weight"] = torch.ones(3)
    elif change == "one less":
        theirs.pop(names[3])
    elif change == "another end":
        theirs = {("_m1.scale" if name == "_m1.weight" else name): tensor for name, tensor in theirs.items()}
    elif change == "another order":
        theirs = {name: theirs[name] for name in _swapped(names, "_m1.weight", "_m1.bias")}
    elif change == "modules mixed":  # each module keeps its place but for one tensor, of equal shape and end
        theirs = {{"_m1.bias": "_m3.bias", "_m3.bias": "_m1.bias"}.get(name, name): tensor for name, tensor in theirs.items()}
    elif change == "a name of another place":
        theirs = {name.replace("_m3.", "layer1.0.bn2."): tensor for name, tensor in theirs.items()}
    path = tmp_path / ("w.safetensors" if change == "safetensors" else "w.pth")
    save_file(theirs, path) if change == "safetensors" else torch.save(theirs, path)
    with pytest.raises(UserError, match="do not fit resnet-micro"):
        load(MICRO, path)


def test_a_misfit_says_what_the_file_looks_like(tmp_path: Path) -> None:
    path = saved({f"module.{k}": t for k, t in torchvision.models.resnet18().state_dict().items()}, tmp_path / "w.pth")
    like = r"looks like torchvision's resnet18 or .*: set backbone\.name to resnet18"
    for make in (load, load_plan):
        with pytest.raises(UserError, match=r"do not fit resnet34: missing \(96\).*the prefix module\. was left out.*" + like):
            make("resnet34", path)
        with pytest.raises(UserError, match=r"backbone\.name is null.*" + like):
            make(None, path)
    with torch.device("meta"):
        net = torchvision.models.efficientnet_b0(num_classes=7)
    path = saved({name: torch.zeros(t.shape) for name, t in net.state_dict().items()}, tmp_path / "e.pth")
    with pytest.raises(UserError, match=r"looks like torchvision's efficientnet_b0"):
        load("resnet18", path)


def test_another_width_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"another width: bn1\.weight has 8 values, and 16 in resnet-tiny"):
        load("resnet-tiny", saved(state, tmp_path / "w.pth"))


def test_a_folder_names_the_files_in_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("a.pth", "b.ckpt"):
        saved(state, folder / file)
    with pytest.raises(UserError, match=r"in which lie a\.pth, b\.ckpt; give the path of one of them"):
        load(MICRO, folder)
    with pytest.raises(UserError, match=r"there is no such file; in .* there are a\.pth, b\.ckpt"):
        load(MICRO, folder / "c.pth")


def test_mean_std_and_size_can_be_given(tmp_path: Path, state: dict[str, Tensor]) -> None:
    spec = Backbone(name=MICRO, weights=str(saved(state, tmp_path / "w.pth")), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded = factory.load(spec, classes=CLASSES, size=64, resize=72, head="new", seed=0)
    assert (loaded.chain.mean, loaded.chain.std, loaded.card.size, loaded.card.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64, 72)


def exported_to_torchvision(folder: Path, name: str = "resnet18") -> factory.Loaded:
    """As `tltrain export --to torchvision` writes it."""
    folder.mkdir()
    loaded = ours(folder.parent / "w.safetensors", name)
    torch.save(loaded.chain.net.state_dict(), folder / "model.pth")
    said = {"name": name, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 64, "resize": 72, "interpolation": "bicubic"}
    (folder / "model.json").write_text(json.dumps(said | {"classes": list(CLASSES)}))
    return loaded


def test_an_export_to_torchvision_is_given_back_with_its_description(tmp_path: Path) -> None:
    written = exported_to_torchvision(tmp_path / "export")
    for path in (tmp_path / "export", tmp_path / "export" / "model.pth"):
        kept = load(None, path, head="keep")
        state, want = kept.chain.net.state_dict(), written.chain.net.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
        assert (kept.card.classes, kept.card.mean, kept.card.size, kept.card.interpolation) == (CLASSES, (0.1, 0.2, 0.3), 64, "bicubic")
        assert "are those in model.json beside it" in kept.origin
    with pytest.raises(UserError, match=r"backbone\.name is resnet34, and the weights .* are a resnet18"):
        load("resnet34", tmp_path / "export")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", 10**9, "size is 1000000000"),
        ("name", "nonesuch", "'nonesuch', which no package here provides"),
        ("std", [0, 1, 1], "std is"),
    ],
)
def test_a_forged_description_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    exported_to_torchvision(tmp_path / "export")
    file = tmp_path / "export" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        load(None, tmp_path / "export")


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
def test_programs_are_refused_with_words(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"\x08\x07 anything")
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(UserError, match=r"a program.*[Gg]ive the run folder"):
            load(MICRO, path)


@pytest.mark.parametrize("name", ["resnet-tiny", "vit-tiny"])
def test_default_weights_of_small_networks_are_the_shipped_ones(name: str) -> None:
    assert load(name, "DEFAULT").origin.startswith(f"shipped:{name}-printed")


def test_default_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match="DEFAULT, and vit-s16 has no weights that come with it"):
        load("vit-s16", "DEFAULT")
    with pytest.raises(UserError, match="name is null; name the network whose weights are meant"):
        load(None, "DEFAULT")
    assert "google/vit-base-patch16-224-in21k" in factory.skeleton(Backbone(name="vit-b16", weights="DEFAULT"), 3, None, None).origin
    assert "IMAGENET1K_V2" in factory.skeleton(Backbone(name="resnet50", weights="DEFAULT"), 3, None, None).origin


@pytest.mark.parametrize("word", ["none", "None", "null", "NULL", "random", "Random", None])
def test_words_for_random_weights(word: str | None) -> None:
    assert Backbone(name="resnet18", weights=word).weights is None
    if word is not None and word.lower() != "random":
        assert Backbone(name=word, weights="runs/a").name is None


@pytest.mark.parametrize("name", ["shipped:", "shipped:nothing", "shipped:../shipped/resnet-tiny-printed"])
def test_shipped_weights_are_listed(name: str) -> None:
    with pytest.raises(UserError, match=r"no such weights come with tltrain; there are: resnet-tiny-printed, vit-tiny-printed"):
        load(None, name)


def test_a_file_of_half_precision(tmp_path: Path, state: dict[str, Tensor]) -> None:
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    loaded = load(MICRO, saved(half, tmp_path / "w.pth"))
    assert {p.dtype for p in loaded.chain.parameters()} == {torch.float32}
    parameter = nn.Parameter(state["conv1.weight"])
    assert_is(MICRO, saved({**state, "conv1.weight": parameter}, tmp_path / "p.pth"), state)


def test_the_network_may_have_a_prefix_that_the_file_lacks(tmp_path: Path) -> None:
    written = ours(tmp_path / "v.safetensors", "vit-tiny")
    state = load_file(tmp_path / "v.safetensors")
    bare = {name.removeprefix("vit."): tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    loaded = load("vit-tiny", saved(bare, tmp_path / "w.bin"))
    assert "their names lack the network's vit., which was put in front" in loaded.origin
    last = len(written.chain.blocks) - 1
    assert torch.equal(loaded.chain(images(), stop=last), written.chain(images(), stop=last))
