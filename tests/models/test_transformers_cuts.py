"""Networks of transformers as chains: every cut is bit-equal to the network itself, and what cannot be cut says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import slow
from hf_nets import BACKBONES, CLASSES, CONFIGS, config_of, images, net_of, saved, side_of
from torch import Tensor

from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.chain import Chain

QUICK = ("dinov2", "swin", "convnext")


def load(weights: Path, head: str = "keep", **settings: object) -> factory.Loaded:
    defaults = {"classes": CLASSES, "size": None, "resize": None, "seed": 0}
    return factory.load(Backbone(weights=str(weights)), **{**defaults, "head": head, **settings})  # type: ignore[arg-type]


def logits_of(net: Any, chain: Chain, x: Tensor) -> Tensor:
    """The network's own, from the images that the chain gives its first block."""
    net.to(memory_format=chain.layout)
    with torch.no_grad():
        logits: Tensor = net(chain.normalise(x)).logits
        return logits


def assert_cut_everywhere(chain: Chain, x: Tensor, want: Tensor) -> None:
    assert not chain.runs_whole, chain.why_whole
    with torch.no_grad():
        assert torch.equal(chain(x), want)
        for cut in range(1, len(chain.blocks)):
            assert torch.equal(chain(chain(x, stop=cut), start=cut), want), chain.blocks[cut].name


@pytest.mark.parametrize("name", [*QUICK, *(slow(name) for name in CONFIGS if name not in QUICK)])
def test_every_cut_is_the_network_itself(name: str, tmp_path: Path) -> None:
    net = net_of(config_of(name))
    loaded = load(saved(net, tmp_path))
    x = images(side_of(net.config))
    assert_cut_everywhere(loaded.chain, x, logits_of(net, loaded.chain, x))
    state = net.state_dict()
    own = loaded.chain.net.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    named = loaded.chain.blocks
    assert len(named) >= 4
    assert (named[0].name, named[-1].name) == ("stem", "head")
    assert not any(block.name.startswith(net.base_model_prefix) for block in named), "names begin where they differ"


@pytest.mark.parametrize("name", [slow(name) for name in BACKBONES])
def test_a_backbone_without_a_classifier_gets_one_on_its_pooled_output(name: str, tmp_path: Path) -> None:
    net: Any = net_of(config_of(name))
    loaded = load(saved(net, tmp_path), head="new")
    x = images(32)
    head: Any = loaded.chain.net.get_submodule("classifier")
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        net.to(memory_format=loaded.chain.layout)
        pooled = net(loaded.chain.normalise(x)).pooler_output
        assert_cut_everywhere(loaded.chain, x, head(pooled))
    assert "they have no head" in loaded.origin


def test_every_parameter_learns(tmp_path: Path) -> None:
    """What the network never reads is no parameter: DINOv2's mask token. Data-parallel training would wait for its gradient."""
    chain = load(saved(net_of(config_of("dinov2")), tmp_path)).chain.train()
    chain(images(32)).sum().backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    assert "dinov2.embeddings.mask_token" in dict(chain.net.named_buffers())


def test_drop_path_and_dropout_are_the_networks_own(tmp_path: Path) -> None:
    net: Any = net_of(config_of("convnext", drop_path_rate=0.5))
    chain = load(saved(net, tmp_path)).chain
    x = images(32, num=8)
    for first in (0, 3):
        chain.freeze(first, norm_stats=False).train()
        net.eval()
        for path in {path for block in chain.blocks[first:] for path in block.owns}:
            net.get_submodule(path).train()
        net.to(memory_format=chain.layout)
        torch.manual_seed(1)
        got = chain(x)
        torch.manual_seed(1)
        assert torch.equal(got, net(chain.normalise(x)).logits)
        torch.manual_seed(2)
        assert not torch.equal(got, chain(x))


def test_what_cannot_be_traced_runs_whole_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2ForImageClassification

    net = net_of(config_of("dinov2"))
    forward = Dinov2ForImageClassification.forward

    def odd(self: Dinov2ForImageClassification, pixel_values: Tensor, **kwargs: object) -> object:
        return forward(self, pixel_values * (2.0 if pixel_values.sum() > 1e9 else 1.0), **kwargs)

    monkeypatch.setattr(Dinov2ForImageClassification, "forward", odd)
    loaded = load(saved(net, tmp_path))
    assert loaded.chain.runs_whole
    assert "it decides by what a tensor holds" in loaded.chain.why_whole
    x = images(32)
    assert torch.equal(loaded.chain(x), logits_of(net, loaded.chain, x))
    assert [block.name for block in loaded.chain.blocks] == ["stem", "layer.0", "layer.1", "layer.2", "head"]
