"""timm's networks: names, preprocessing, sizes, heads, layers, weights of its hub and of files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import slow
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm_layers import ours, timms
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.families.timm import FAMILY
from tltrain.models.timm import layers, networks

CLASSES = ("ant", "bee", "cat")
LAYERS = (
    "test_byobnet", "test_convnext", "test_convnext2", "test_efficientnet", "test_mambaout", "test_maxvit", "test_nfnet", "test_resnet",
    "test_vit", "test_vit_relpos",
    slow("mobilenetv3_small_050"), slow("regnetx_002"), slow("caformer_s18"), slow("xcit_nano_12_p16_224"),
)  # fmt: skip


def load(name: str, weights: str | None = None, size: int | None = None, head: str = "new") -> factory.Loaded:
    spec = Backbone(name=f"timm:{name}", weights=weights)
    return factory.load(spec, classes=CLASSES, size=size, resize=None, head=head, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet5", None, "did you mean timm:resnet50"),
        ("test_vit.nonsense", None, "names no weights of timm's test_vit; it has r160_in1k"),
        ("test_vit.r160_in2k", None, "did you mean r160_in1k"),
        ("vit_tiny_patch16_224_in21k", None, "timm renamed; its name is timm:vit_tiny_patch16_224.augreg_in21k"),
        ("mobilenetv5_300m_enc", None, "has no classifier: timm builds it for features alone"),
        ("vit_tiny_patch16_224", 225, "data.size is 225.*take 224 or 240"),  # timm would leave the last pixels out
        ("test_maxvit", 100, "data.size is 100.*take 96 or 128"),
    ],
)
def test_a_name_or_size_that_timm_does_not_have_is_refused(name: str, size: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        factory.skeleton(Backbone(name=f"timm:{name}"), 3, size, None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TIMM:tf_efficientnet_lite0", r"timm:tf_efficientnet_lite0\?"),
        ("timm:TF_EfficientNet-Lite0", r"timm:tf_efficientnet_lite0\?"),
        ("timm.resnet18.a1_in1k", "timm:resnet18 or"),
        ("timm/resnet50.a1_in1k", r"timm:resnet50.a1_in1k\?"),  # as the hub calls it
        ("hf-hub:timm/resnet50.a1_in1k", r"timm:resnet50.a1_in1k\?"),
        ("tf_efficientnet_lite0", r"timm:tf_efficientnet_lite0\?"),
        ("dinov2-small", "timm:vit_small_patch14_dinov2 or"),
    ],
)
def test_a_name_that_is_spelled_otherwise_leads_to_timm_s(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        factory.skeleton(Backbone(name=name), 3, None, None)


def test_without_timm_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert FAMILY.matches("timm:resnet50")
    assert any("tltrain[timm]" in line for line in FAMILY.describe().values())
    with pytest.raises(UserError, match=r"pip install 'tltrain\[timm\]'"):
        factory.skeleton(Backbone(name="timm:resnet50"), 3, None, None)


def test_preprocessing_is_that_of_the_weights() -> None:
    config = timm.get_pretrained_cfg("convnext_base.fb_in22k_ft_in1k_384")
    source = FAMILY.find_weights("timm:convnext_base", "fb_in22k_ft_in1k_384", network=False)
    assert source is not None
    assert (source.card.size, source.card.resize, source.card.interpolation) == (384, 384, "bicubic")
    assert (source.card.mean, source.card.std) == (config.mean, config.std)
    assert any("crop_mode squash" in note for note in source.notes)
    assert source.card.classes is not None
    assert (len(source.card.classes), source.card.classes[0]) == (1000, "tench, Tinca tinca")
    default = FAMILY.find_weights("timm:tf_efficientnet_lite0", "DEFAULT", network=False)
    assert default is not None
    assert (default.card.size, default.card.resize, default.card.mean) == (224, 256, (0.5, 0.5, 0.5))  # 224 / 0.875
    assert default.notes == ()
    assert default.origin == "hub timm/tf_efficientnet_lite0.in1k"


@pytest.mark.parametrize("name", LAYERS)
def test_layer_decay_is_timms_own(name: str) -> None:
    loaded = factory.skeleton(Backbone(name=f"timm:{name}"), 3, None, None)
    assert ours(loaded.chain) == pytest.approx(timms(loaded.chain.net))
    half = loaded.chain.blocks[len(loaded.chain.blocks) // 2].name
    frozen = ours(loaded.chain, half)
    assert 0 < len(frozen) < len(timms(loaded.chain.net))
    assert frozen == pytest.approx({n: s for n, s in timms(loaded.chain.net).items() if n in frozen})


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "xcit_nano_12_p16_224"])
def test_timms_layers_are_blocks_where_nothing_can_be_cut(name: str) -> None:
    with torch.device("meta"):
        net = networks.build(FAMILY.default_card(f"timm:{name}"), 3)
    head = FAMILY.head_of(FAMILY.default_card(f"timm:{name}"))
    found = layers.groups(net, (head,))
    owner = {n: [key for key, paths in found.items() if any(n == p or n.startswith(p + ".") for p in paths)] for n in net.state_dict()}
    assert all(len(keys) == (0 if n.startswith(f"{head}.") else 1) for n, keys in owner.items())
    away = layers.distances(net)
    for key in found:
        assert len({away[n] for n, keys in owner.items() if keys == [key] and n in away}) <= 1, "a block is one layer"
    assert next(iter(found)) == "stem"


def test_a_new_head_is_zero_and_the_rest_is_not(tmp_path: Path) -> None:
    net = load("test_efficientnet", size=64).chain.net
    assert not net.state_dict()["classifier.weight"].any()
    state = {n: t for n, t in timm.create_model("test_efficientnet", num_classes=7).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load("test_efficientnet", str(tmp_path / "w.safetensors"), 64)
    own = loaded.chain.net.state_dict()
    assert "their head for 7 classes left out" in loaded.origin
    assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("classifier."))
    assert own["classifier.weight"].shape == (3, state["classifier.weight"].shape[1])
    assert not own["classifier.weight"].any()


@pytest.mark.parametrize("name", [slow("levit_128s"), "repvit_m0_9", slow("deit_tiny_distilled_patch16_224")])
def test_a_network_of_two_classifiers_runs_whole_and_begins_with_both_at_zero(name: str, tmp_path: Path) -> None:
    """Their answers are averaged, so neither can be left out."""
    loaded = load(name, size=None if name == "levit_128s" else 64)
    chain, heads = loaded.chain, FAMILY.heads_of(loaded.card)
    assert (chain.runs_whole, chain.why_whole, chain.blocks[-1].owns) == (True, "it has 2 classifiers", heads)
    assert not any(chain.net.get_submodule(head).state_dict()["weight"].any() for head in heads)
    assert ours(chain) == pytest.approx(timms(chain.net))
    state = {n: t + 1 for n, t in timm.create_model(name, num_classes=7).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    again = load(name, str(tmp_path / "w.safetensors")).chain.net.state_dict()
    assert all(not again[n].any() if n.startswith(heads) else torch.equal(again[n], state[n]) for n in state)


def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path: Path) -> None:
    """The weights are those of 160 px: 10 x 10 patches and a class token."""
    state: dict[str, Tensor] = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    loaded = load("test_vit", str(tmp_path / "w.safetensors"), 64)
    want = resample_abs_pos_embed(state["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    own = loaded.chain.net.state_dict()
    assert torch.equal(own["pos_embed"], want)
    assert "timm resampled pos_embed from 160 to 64 px" in loaded.origin
    assert torch.equal(own["blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])


def test_tables_that_no_state_dict_has_are_there(tmp_path: Path) -> None:
    """A relative position index is computed when the net is built, not read."""
    net = timm.create_model("test_vit_relpos", num_classes=7)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    own = load("test_vit_relpos", str(tmp_path / "w.safetensors")).chain.net
    tables = {name: b for name, b in net.named_buffers() if name not in net.state_dict()}
    assert tables
    assert all(torch.equal(dict(own.named_buffers())[name], b) for name, b in tables.items())


@pytest.fixture(name="cache")
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _put(cache: Path, repo: str, state: dict[str, Tensor], config: dict[str, object]) -> None:
    """As huggingface_hub lays it out, with the commit named by refs/main."""
    root, commit = cache / f"models--{repo.replace('/', '--')}", "c0ffee" + "0" * 34
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_tag_is_read_from_the_hubs_cache(cache: Path) -> None:
    state = timm.create_model("test_vit", num_classes=1000).state_dict()
    _put(cache, "timm/test_vit.r160_in1k", state, {"architecture": "test_vit"})
    for name, weights in (
        ("test_vit", "r160_in1k"),
        ("test_vit", "DEFAULT"),
        ("test_vit.r160_in1k", "DEFAULT"),
        ("test_vit.r160_in1k", None),
    ):
        loaded = load(name, weights)
        assert torch.equal(loaded.chain.net.state_dict()["pos_embed"], state["pos_embed"])
        assert loaded.card.name == "timm:test_vit"
        assert loaded.origin.startswith("hub timm/test_vit.r160_in1k; ")


def test_a_hub_id_says_which_network_it_is(cache: Path) -> None:
    state = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    config: dict[str, object] = {"architecture": "test_efficientnet", "num_classes": 3, "label_names": list(CLASSES)}
    _put(cache, "org/mine", state, {**config, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "input_size": [3, 96, 96]}})
    spec = Backbone(weights="hf-hub:org/mine")
    loaded = factory.load(spec, classes=CLASSES, size=None, resize=None, head="keep", seed=0)
    assert (loaded.card.name, loaded.card.mean, loaded.card.size) == ("timm:test_efficientnet", (0.1, 0.2, 0.3), 96)
    assert torch.equal(loaded.chain.net.state_dict()["classifier.weight"], state["classifier.weight"])


@pytest.mark.parametrize("arguments", [{"checkpoint_path": "/etc/passwd"}, {"num_classes": 9}, 7])
def test_a_hubs_configuration_sets_only_what_it_may(cache: Path, arguments: object) -> None:
    state = timm.create_model("test_efficientnet", num_classes=3).state_dict()
    _put(cache, "org/odd", state, {"architecture": "test_efficientnet", "num_classes": 3, "model_args": arguments})
    with pytest.raises(UserError, match="model_args"):
        factory.load(Backbone(weights="hf-hub:org/odd"), classes=CLASSES, size=None, resize=None, head="new", seed=0)


def test_without_a_network_nothing_is_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub would wait half a minute for each file, and then not say why."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(UserError, match=r"hub.invalid has no address here .*is there a network.*`hf download timm/test_vit.r160_in1k`"):
        load("test_vit", "DEFAULT")
    with pytest.raises(UserError, match=r"hub.invalid has no address here .*`hf download org/none`"):
        factory.load(Backbone(weights="org/none"), classes=CLASSES, size=None, resize=None, head="new", seed=0)


def test_what_cannot_be_fetched_is_refused_with_the_way_out(cache: Path) -> None:
    assert factory.skeleton(Backbone(name="timm:test_vit", weights="DEFAULT"), 3, None, None).origin.startswith("hub timm/test_vit")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*`hf download timm/test_vit.r160_in1k`"):
        load("test_vit", "DEFAULT")
    with pytest.raises(UserError, match="'IMAGENET1K_V1' names no weights of timm's test_vit"):
        load("test_vit", "IMAGENET1K_V1")
    with pytest.raises(UserError, match="names no weights of timm's botnet50ts_256; timm has no weights for it"):
        load("botnet50ts_256", "nonsense")
    with pytest.raises(UserError, match="timm has no weights for botnet50ts_256; give a file"):
        load("botnet50ts_256", "DEFAULT")


def test_weights_of_another_architecture_are_refused_with_the_tensors(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="do not fit timm:test_resnet"):
        load("test_resnet", str(tmp_path / "w.safetensors"))


@pytest.mark.slow
def test_weights_with_an_address_of_their_own_are_read_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of timm's weights lie on no hub. torch's cache holds them, and pickled code in them is refused."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"HF_HUB_OFFLINE is set: nothing is downloaded; download https://\S+ elsewhere and put it at"
    ) as said:
        load("gcvit_xxtiny", "in1k")
    path = Path(str(said.value).rpartition("put it at ")[2])
    assert path.parent == tmp_path / "hub" / "checkpoints"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"head.fc.weight": Path("code")}}, path)
    with pytest.raises(UserError, match="pathlib"):
        load("gcvit_xxtiny", "in1k")
    state = timm.create_model("gcvit_xxtiny").state_dict()
    torch.save({"state_dict": state}, path)
    own = load("gcvit_xxtiny", "in1k").chain.net.state_dict()
    assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("head.fc."))
