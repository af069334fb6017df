"""Networks become chains by tracing: every cut is the network itself, bit for bit, or it is no cut."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.chain import Block, Chain, unit_classes
from tltrain.models.families.torchvision import FAMILY, PREFIX
from tltrain.models.tracing import CannotCut, grouped_blocks, traced_blocks

SIZES = {"inception_v3": 96, "googlenet": 64, "alexnet": 64, "vit_b_16": 32, "maxvit_t": 224}
QUICK = ("mobilenet_v3_small", "squeezenet1_1")
SLOW = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5",
    "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
)  # fmt: skip
"""One of each kind that torchvision has."""


def _net(name: str) -> tuple[nn.Module, list[Block], int]:
    size = SIZES.get(name, 64)
    family = FAMILY if FAMILY.matches(PREFIX + name) else None
    torch.manual_seed(0)
    if family is None:  # a ResNet, which has a family with blocks of its own
        net = factory.load(Backbone(name=name), classes=("a", "b", "c"), size=size, resize=size, head="new", seed=0).chain.net
        blocks = traced_blocks(net, "fc", 0.0, size)
    else:
        card = family.fitted(family.default_card(PREFIX + name), size, ("a", "b", "c"))
        net = family.build(card, 3)
        blocks = family.blocks(net, card, 0.0)
    for path in blocks[-1].owns:  # a head of zeros answers the same whatever stands below it
        for parameter in net.get_submodule(path).parameters():
            nn.init.normal_(parameter, std=0.1)
    return net, blocks, size


def _chain(net: nn.Module, blocks: list[Block]) -> Chain:
    return Chain(net, blocks, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_cut_is_the_network(name: str) -> None:
    """Whole, from every cut on, as a copy and out of a pickle; what a block is given it leaves as it is."""
    net, blocks, size = _net(name)
    chain = _chain(net, blocks)
    assert [block.name for block in blocks][-1] == "head"
    assert len({block.name for block in blocks}) == len(blocks) > 4
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        want = net(chain.normalise(images))
        assert torch.equal(chain(images), want)
        x = images
        for k in range(1, len(blocks)):
            x = chain(x, start=k - 1, stop=k)
            kept = x.clone(memory_format=torch.contiguous_format)
            assert torch.equal(chain(kept, start=k), want), blocks[k].name
            assert torch.equal(kept, x), blocks[k].name
        copied: Chain = pickle.loads(pickle.dumps(deepcopy(chain)))
        for parameter in copied.net.parameters():
            parameter.zero_()
        assert not torch.equal(copied(images), want)
        assert torch.equal(chain(images), want)


@pytest.mark.parametrize("name", [*QUICK[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_step_of_training_is_the_networks_own(name: str) -> None:
    """In training mode, with dropout and statistics of batches: the same loss, gradients and buffers as the network's own forward."""
    net, blocks, size = _net(name)
    native, chain = deepcopy(net).train(), _chain(net, blocks).train()
    images = torch.rand(4, 3, size, size)
    for run in (lambda: native(chain.normalise(images)), lambda: chain(images)):
        torch.manual_seed(1)
        F.cross_entropy(run(), torch.tensor([0, 1, 2, 0])).backward()
    for (path, ours), theirs in zip(net.named_parameters(), native.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad), path  # type: ignore[arg-type]
    for (path, buffer), other in zip(net.named_buffers(), native.buffers(), strict=True):
        assert torch.equal(buffer, other), path


@pytest.mark.parametrize("name", QUICK[:1])
def test_recomputing_and_freezing_by_block(name: str) -> None:
    net, blocks, size = _net(name)
    chain = _chain(net, blocks).freeze(len(blocks) - 4, norm_stats=False).train()
    images = torch.rand(2, 3, size, size)
    grads = []
    for chain.recompute in (False, True):
        net.zero_grad()
        torch.manual_seed(1)
        chain(images).sum().backward()
        grads.append({path: p.grad.clone() for path, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][path], grads[1][path]) for path in grads[0])
    assert {path.rpartition(".block")[0] for path in grads[0] if ".block" in path} == {"features.9", "features.10", "features.11"}
    assert unit_classes(chain) == ["InvertedResidual"]
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_plan_and_the_run_have_the_same_blocks() -> None:
    """A skeleton on the meta device is cut as the network with its weights is."""
    spec = Backbone(name="torchvision:mobilenet_v3_small")
    planned = factory.skeleton(spec, 2, 64, 64).chain
    loaded = factory.load(spec, classes=("a", "b"), size=64, resize=64, head="new", seed=0)
    assert [(b.name, b.owns, b.input_order) for b in planned.blocks] == [(b.name, b.owns, b.input_order) for b in loaded.chain.blocks]
    assert [b.step for b in planned.blocks[:-1]] == [b.step for b in loaded.chain.blocks[:-1]]
    assert not loaded.chain.runs_whole
    assert "runs whole" not in loaded.origin


def test_walking_the_graph_costs_next_to_nothing() -> None:
    """ResNet-18 as traced, against its own forward: calls of Python, which unlike its seconds are the same each time."""
    net, blocks, _ = _net("resnet18")
    chain, x = _chain(net, blocks).to("meta"), torch.empty((1, 3, 64, 64), device="meta")
    with torch.no_grad():
        ours, theirs = (_calls(run) for run in (lambda: _steps(chain, x), lambda: net(x)))
    assert ours - theirs < 50 * len(blocks), f"{ours} calls, and {theirs} of the network itself"


def _steps(chain: Chain, x: Tensor) -> Tensor:
    for block in chain.blocks:
        assert block.step is not None
        x = block.step(chain.net, x)
    return x


def _calls(run: Callable[[], Any]) -> int:
    """How many functions of Python and of C are called by the second call."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    run()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


class Toy(nn.Module):
    """Patches of 8 pixels, four layers, their mean, a classifier. The networks below change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layers, self.classifier = nn.Conv2d(3, 8, 8, 8), nn.ModuleList(self.layer() for _ in range(4)), nn.Linear(8, 3)

    def layer(self) -> nn.Module:
        return Layer()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(self.patches(images).flatten(2).transpose(1, 2)).mean(1))

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class WithTable(Toy):
    """A table of parameters alone is made once, and added in every layer; the batch's size and the number of patches are used late."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(16, 8))

    def body(self, x: Tensor) -> Tensor:
        batch, patches, _ = x.shape
        table = (self.places.sin() * 2)[:patches]
        for layer in self.layers:
            x = layer(x) + table
        return x.reshape(batch * patches, 8).reshape(batch, patches, 8)


class WithSkip(Toy):
    """Something of the first layer lives until the third."""

    def body(self, x: Tensor) -> Tensor:
        one = self.layers[0](x)
        two = self.layers[1](one)
        return self.layers[3](self.layers[2](two) + one)


class WithWrite(Toy):
    """What the second layer returns is written to in place before the third reads it."""

    def body(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        x.add_(1)
        return self.layers[3](self.layers[2](x))


class Stubborn(Layer):
    """A layer with a decision by the shape of what it is given, and another one by its mode, neither of which can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 3:
            x = x * 2
        return F.dropout(super().forward(x), 0.5, self.training)


class WithStubborn(Toy):
    def layer(self) -> nn.Module:
        return Stubborn()


class WithMode(Toy):
    """The net's own forward is another one in training."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + 1 if self.training else super().body(x)


class WithDropout(Toy):
    """It drops by a function, as GhostNet does before its classifier."""

    def body(self, x: Tensor) -> Tensor:
        return F.dropout(super().body(x), 0.5, self.training)


class WithShared(Toy):
    """The first and the third layer share a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].one.weight = self.layers[0].one.weight  # type: ignore[union-attr]


def _toy(kind: type[Toy]) -> tuple[Chain, list[str]]:
    torch.manual_seed(0)
    net = kind()
    blocks = traced_blocks(net, "classifier", 0.0, 32)
    return _chain(net, blocks), [block.name for block in blocks]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Toy, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
        (WithTable, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
        (WithStubborn, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
        (WithSkip, ["stem", "layers.0", "layers.1", "layers.3", "head"]),
        (WithWrite, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
        (WithShared, ["stem", "layers.0", "layers.3", "head"]),
        (WithDropout, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
    ],
)
def test_what_stands_in_the_way_of_a_cut(kind: type[Toy], names: list[str]) -> None:
    chain, found = _toy(kind)
    assert found == names
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        want = chain.net(chain.normalise(images))
        for k in range(1, len(names)):
            middle = chain(images, stop=k)
            kept = middle.clone()
            assert torch.equal(chain(middle, start=k), want), names[k]
            assert torch.equal(middle, kept), names[k]


@pytest.mark.parametrize(("first", "drops"), [("layers.3", True), ("head", False)])
def test_a_dropout_in_the_networks_own_forward_is_off_while_its_block_is_frozen(first: str, drops: bool) -> None:
    chain, _ = _toy(WithDropout)
    chain.train().freeze(chain.index(first), norm_stats=False)
    images = torch.rand(3, 3, 32, 32)
    one, other = (chain(images, stop=5) for _ in range(2))
    assert torch.equal(one, other) is not drops
    assert torch.equal(chain.eval()(images, stop=5), chain(images, stop=5))


def test_a_network_whose_own_forward_depends_on_its_mode_is_not_cut() -> None:
    with pytest.raises(CannotCut, match=r"WithMode\.forward is another one in training"):
        _toy(WithMode)
    blocks = grouped_blocks(WithMode(), "classifier", "why")
    assert [block.name for block in blocks] == ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]
    assert Chain(WithMode(), blocks, (0.5,) * 3, (0.5,) * 3).why_whole == "why"


def test_numbers_that_depend_on_the_size_hold_for_one_size() -> None:
    chain, _ = _toy(WithTable)
    with pytest.raises(ValueError, match="cut for images of 32 x 32 pixels, and these are"):
        chain(torch.rand(2, 3, 24, 24))


def test_a_network_that_its_blocks_do_not_equal_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> list[Block]:
        blocks = real(*args)
        return [*blocks[:3], Block(blocks[3].name, blocks[3].owns, _off), *blocks[4:]]

    real = FAMILY.blocks
    monkeypatch.setattr(FAMILY, "blocks", wrong)
    spec = Backbone(name="torchvision:mobilenet_v3_small", dropout=0.5)
    loaded = factory.load(spec, classes=("a", "b"), size=64, resize=64, head="new", seed=0)
    assert loaded.chain.runs_whole
    assert "it runs whole, no block can be cut off: its blocks" in loaded.origin
    assert len(loaded.chain.net.get_submodule("classifier.3")._forward_pre_hooks) == 1, "dropout is where a net that runs whole has it"


def _off(net: nn.Module, x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("torchvision:inception_v3", 32, "data.size is 32, and torchvision:inception_v3 cannot take such images"),
        ("torchvision:vit_b_16", 100, "data.size is 100, and torchvision:vit_b_16 cannot take such images"),
        ("torchvision:efficientnet_b9", 32, "backbone.name is 'torchvision:efficientnet_b9'; did you mean"),
    ],
)
def test_a_mistake_is_said_before_anything_is_built(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        factory.skeleton(Backbone(name=name), 2, size, size)


def test_a_resnet_has_one_name_with_the_library_and_one_without() -> None:
    loaded = factory.skeleton(Backbone(name="torchvision:resnet18"), 2, None, None)
    assert loaded.card.name == "resnet18"
    assert loaded.family is factory.skeleton(Backbone(name="resnet18"), 2, None, None).family


def test_a_mnasnet_takes_the_weights_of_the_stage_before() -> None:
    """Plain weights say no version, and torchvision's MNASNet refuses those."""
    net = factory.load(Backbone(name="torchvision:mnasnet0_75"), classes=("a", "b"), size=64, resize=64, head="new", seed=0).chain.net
    deepcopy(net).load_state_dict(dict(net.state_dict()))


def test_a_new_convolution_for_a_head_learns() -> None:
    """SqueezeNet's classifier is a convolution with a ReLU behind it, which would hold a head of zeros at zero."""
    loaded = factory.load(Backbone(name="torchvision:squeezenet1_1"), classes=("a", "b"), size=64, resize=64, head="new", seed=0)
    logits = loaded.chain(torch.rand(4, 3, 64, 64))
    assert logits.shape == (4, 2)
    logits.sum().backward()
    assert loaded.chain.net.get_submodule("classifier.1").weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("index", [1, -2])
def test_a_block_that_is_wrong_at_any_cut_is_found_at_the_start(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It spoils what it is given, which nobody sees while the network runs in one go."""
    blocks_of = type(FAMILY).blocks

    def spoiled(self: object, *args: Any) -> list[Block]:
        blocks = blocks_of(FAMILY, *args)
        step = blocks[index].step
        assert step is not None

        def overwriting(net: nn.Module, x: Tensor) -> Tensor:
            out = step(net, x)
            x.zero_()
            return out

        blocks[index] = replace(blocks[index], step=overwriting)
        return blocks

    monkeypatch.setattr(type(FAMILY), "blocks", spoiled)
    backbone = Backbone(name="torchvision:mobilenet_v3_small")
    loaded = factory.load(backbone, classes=("a", "b"), size=64, resize=64, head="new", seed=0)
    names = [block.name for block in factory.skeleton(backbone, 2, 64, 64).chain.blocks]
    assert not loaded.chain.runs_whole
    at = index % len(names)
    assert f"merged, since a cut between them changes the last bits: {names[at - 1]} with {names[at]}" in loaded.origin
    assert [block.name for block in loaded.chain.blocks] == [*names[:at], *names[at + 1 :]]
    assert loaded.chain.index(names[at]) == at - 1
    chain, x = loaded.chain, torch.rand(2, 3, 64, 64)
    assert torch.equal(factory.cut_everywhere(chain, x), factory.head_input(chain, loaded.family.head_of(loaded.card), x))
