"""Every family as a chain: slices equal the net bit for bit, every tensor has one owner, frozen blocks stay as they are."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.factory import Loaded, WeightsMetadata
from tltrain.models.families import resnet, vit

CLASSES = ("a", "b", "c", "d", "e")
QUICK = [("resnet-micro", 32), ("resnet-tiny", 32), ("resnet-small", 32), ("resnet18", 40), ("vit-tiny", 32), ("vit-tiny", 24)]
REAL = [("resnet50", 64), ("resnext50_32x4d", 64), ("wide_resnet50_2", 64), ("vit-s16", 32), ("vit-b16", 32)]
NETS = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REAL)]


def _load(name: str, size: int, dropout: float = 0.0) -> Loaded:
    """Random weights, the head's too: a head of zeros would hide what is in front of it."""
    loaded = factory.load(Backbone(name=name, dropout=dropout), classes=CLASSES, size=size, resize=None, head="new", seed=0)
    for parameter in loaded.chain.parameters_of(len(loaded.chain.blocks) - 1):
        nn.init.normal_(parameter[1], generator=torch.Generator().manual_seed(0))
    return loaded


def _images(size: int) -> Tensor:
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def _assert_slices_equal_net(loaded: Loaded, size: int) -> None:
    chain, images = loaded.chain, _images(size)
    if chain.training:  # in training mode a forward moves BatchNorm's statistics: give each its own copy
        want = _logits(deepcopy(chain.net), chain.normalise(images))
        for k in range(len(chain.blocks) + 1):
            own = deepcopy(chain)
            assert torch.equal(own(own(images, stop=k), start=k) if k else own(images), want), k
        return
    want = _logits(chain.net, chain.normalise(images))
    assert want.shape == (4, len(CLASSES))
    assert want.std() > 1e-3
    for k in range(1, len(chain.blocks)):
        assert torch.equal(chain(chain(images, stop=k), start=k), want), chain.blocks[k].name
    assert torch.equal(chain(images), want)
    assert torch.equal(chain(images.float() / 255), want)


@pytest.mark.parametrize(("name", "size"), NETS)
def test_slices_equal_the_net_at_every_cut(name: str, size: int) -> None:
    loaded = _load(name, size)
    assert not loaded.chain.training
    _assert_slices_equal_net(loaded, size)


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_slices_equal_the_net_in_training_mode(name: str) -> None:
    loaded = _load(name, 32)
    loaded.chain.train()
    _assert_slices_equal_net(loaded, 32)


@pytest.mark.parametrize("name", [*resnet.TORCHVISION, *resnet.SMALL, *vit.SIZES])
def test_every_tensor_and_module_has_one_owner(name: str) -> None:
    """On the meta device, for every backbone there is."""
    chain = factory.skeleton(Backbone(name=name), 5, None, None).chain
    count = range(len(chain.blocks))
    owned = [name for i in count for name, _ in chain.parameters_of(i)]
    assert sorted(owned) == sorted(name for name, _ in chain.net.named_parameters())
    leaves = [name for name, module in chain.net.named_modules() if not list(module.children())]
    assert sorted(name for i in count for name, m in chain.modules_of(i) if not list(m.children())) == sorted(leaves)


@pytest.mark.parametrize("name", ["resnet152", "resnext101_64x4d", "vit-l16"])
def test_a_skeleton_reads_and_holds_nothing(name: str) -> None:
    class Made(TorchDispatchMode):
        """Where every tensor is that any operation makes on the way: one that holds values would cost their time."""

        def __init__(self) -> None:
            super().__init__()
            self.devices: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel() > 10_000}
            return out

    with Made() as made:
        loaded = factory.skeleton(Backbone(name=name), 10, None, None)
    assert made.devices == {"meta"}
    assert {t.device.type for t in (*loaded.chain.parameters(), *loaded.chain.buffers())} == {"meta"}
    assert (loaded.card.size, loaded.card.classes) == (224, None)


def test_the_names_of_blocks() -> None:
    def names(name: str) -> list[str]:
        return [b.name for b in factory.skeleton(Backbone(name=name), 5, None, None).chain.blocks]

    assert names("resnet-tiny") == ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "head"]
    assert names("vit-tiny") == ["embed", *(f"block.{i}" for i in range(4)), "head"]
    assert len(names("resnet50")) == 1 + 16 + 1


@pytest.mark.parametrize(("name", "width"), [("resnet-tiny", 128), ("vit-tiny", 96)])
def test_the_cut_before_the_head_is_the_pooled_vector(name: str, width: int) -> None:
    chain = _load(name, 32).chain
    assert chain(_images(32), stop=len(chain.blocks) - 1).shape == (4, width)


@pytest.mark.parametrize(("name", "first"), [("resnet-micro", "layer3"), ("resnet-micro", "head"), ("vit-tiny", "block.2")])
def test_frozen_blocks_stay_under_adamw_with_weight_decay(name: str, first: str) -> None:
    chain = _load(name, 32).chain
    start = chain.index(first)
    chain.freeze(start, norm_stats=True).train()
    before = deepcopy(chain.net.state_dict())
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(chain(_images(32)), torch.arange(4)).backward()
        optimizer.step()
    after = chain.net.state_dict()
    for path, tensor in after.items():
        owner = next(i for i, b in enumerate(chain.blocks) if any(path == p or path.startswith(p + ".") for p in b.owns))
        assert torch.equal(tensor, before[path]) == (owner < start), path


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_a_copy_runs_its_own_weights(name: str) -> None:
    chain = _load(name, 32).chain
    before = chain(_images(32))
    for other in (deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert torch.equal(other(_images(32)), before)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(other(_images(32)), torch.zeros(4, 5))
        assert torch.equal(chain(_images(32)), before)


@pytest.mark.parametrize("name", ["resnet-micro", "vit-tiny"])
def test_dropout_acts_on_the_pooled_vector_while_the_head_trains(name: str) -> None:
    plain, dropped = _load(name, 32).chain, _load(name, 32, dropout=0.5).chain
    images, last = _images(32), len(plain.blocks) - 1
    assert torch.equal(dropped(images), plain(images))
    dropped.freeze(last, norm_stats=False).train()
    pooled = dropped(images, stop=last)
    assert torch.equal(pooled, plain(images, stop=last))  # nothing drops in front of the pooled vector
    torch.manual_seed(3)
    out = dropped(images)
    torch.manual_seed(3)
    want = plain(nn.functional.dropout(pooled, 0.5, training=True), start=last)
    assert torch.equal(out, want)
    assert not torch.equal(out, plain(images))
    assert torch.equal(dropped.eval()(images), plain(images))


def test_random_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        loaded = factory.load(Backbone(name="vit-tiny"), classes=CLASSES, size=None, resize=None, head="new", seed=seed)
        assert loaded.origin == f"random weights, seed {seed}"
        return loaded.chain.net.state_dict()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again, two = weights(1), weights(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one[vit.POSITIONS], two[vit.POSITIONS])
    assert torch.count_nonzero(one["classifier.weight"]) == torch.count_nonzero(one["classifier.bias"]) == 0


def test_size_and_resize() -> None:
    def seen(spec: Backbone, size: int | None, resize: int | None) -> tuple[int, int]:
        preprocess = factory.skeleton(spec, 5, size, resize).preprocess
        return preprocess.size, preprocess.resize

    r50, tiny = Backbone(name="resnet50", weights="IMAGENET1K_V2"), Backbone(name="vit-tiny")
    assert seen(r50, None, None) == (224, 232)
    assert seen(Backbone(name="resnet50"), 32, None) == (32, 37)
    assert seen(r50, 128, 160) == (128, 160)
    assert seen(tiny, 64, None) == (64, 64)
    with pytest.raises(UserError, match=r"data\.resize is 60, and the crop taken from it has 64"):
        seen(tiny, 64, 60)
    with pytest.raises(UserError, match=r"data\.size is 30, which the patch of vit-tiny, 8 pixels, does not divide; take 24 or 32"):
        seen(tiny, 30, None)


def test_mean_and_std_of_the_recipe_go_first() -> None:
    spec = Backbone(name="resnet18", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded = factory.skeleton(spec, 5, None, None)
    assert (loaded.chain.mean, loaded.chain.std) == (loaded.card.mean, loaded.card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert factory.skeleton(Backbone(name="resnet18"), 5, None, None).chain.mean == (0.485, 0.456, 0.406)
    assert factory.skeleton(Backbone(name="vit-tiny"), 5, None, None).chain.std == (0.5, 0.5, 0.5)


def test_a_path_as_a_name_is_told_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that it may be a repository of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pt").touch()
    with pytest.raises(UserError, match=r"is 'weights/net.pt', which is a path here; give it as backbone.weights, with"):
        factory.skeleton(Backbone(name="weights/net.pt"), 3, None, None)


def test_every_backbone_has_a_line() -> None:
    named = {name for name in factory.names() if ":" not in name}  # a library as a whole has one line
    assert named == {*resnet.TORCHVISION, *resnet.SMALL, *vit.SIZES, "vit"}
    assert all(line and "\n" not in line for line in factory.names().values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "did you mean resnet50"),
        ("vitb16", "did you mean vit-b16"),
        ("efficientnet", "did you mean .*efficientnet_.*`tltrain recipes --backbones QUERY` searches"),
        ("ResNet50", "did you mean resnet50 or"),
        ("torchvision:EfficientNet_B0", "did you mean torchvision:efficientnet_b0 or"),
        ("torchvison:vit_b_16", r"did you mean torchvision:vit_b_16\? "),
        ("torchvision.convnext-tiny", "did you mean torchvision:convnext_tiny or"),
        ("facebook/dinov2-small", r"did you mean hf:facebook/dinov2-small\? "),
        ("HF:facebook/dinov2-small", r"did you mean hf:facebook/dinov2-small\? "),
        ("zzzzzzzz", "the backbones: resnet18"),
        (":", "the backbones: resnet18"),
        ("vit", "vit-b16"),
    ],
)
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        factory.skeleton(Backbone(name=name), 5, None, None)


def test_a_network_whose_blocks_share_a_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = resnet.ResnetFamily.build

    def tied(self: resnet.ResnetFamily, card: WeightsMetadata, num_classes: int) -> Any:
        net = build(self, card, num_classes)
        net.layer1[1].conv1.weight = net.layer1[0].conv1.weight
        return net

    monkeypatch.setattr(resnet.ResnetFamily, "build", tied)
    with pytest.raises(UserError, match=r"resnet18 cannot be trained block by block: .*blocks cannot share a weight; name another network"):
        factory.skeleton(Backbone(name="resnet18"), 3, None, None)
