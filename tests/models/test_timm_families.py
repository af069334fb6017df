"""timm's families, one small network of each: every cut is the network itself, bit for bit, and its layers are timm's own."""

from __future__ import annotations

import pytest
import torch
from timm_layers import ours, timms

from tltrain.core.recipe import Backbone
from tltrain.models import factory

CUT = {
    "tf_efficientnet_lite0": 64, "test_resnet": 64, "resnetv2_18": 64, "test_convnext": 64, "convnextv2_atto": 64, "test_vit": 64,
    "vit_small_patch14_dinov2": 56, "test_vit_relpos": 160, "beit_base_patch16_224": 32, "swin_tiny_patch4_window7_224": 56,
    "mobilenetv3_small_050": 64, "mobilenetv4_conv_small": 64, "regnetx_002": 64, "densenetblur121d": 64,
    "caformer_s18": 64, "poolformer_s12": 64, "xcit_nano_12_p16_224": 64, "hiera_tiny_224": 64, "mixer_s32_224": 64, "test_maxvit": 64,
    "fastvit_t8": 64, "test_nfnet": 64, "test_mambaout": 64, "test_byobnet": 64, "inception_next_atto": 96, "dpn68": 64, "dla34": 64,
    "hrnet_w18_small": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "cspresnet50": 64, "rexnet_100": 64, "skresnet18": 64,
    "ese_vovnet19b_slim": 64, "tiny_vit_5m_224": 64, "vit_small_patch16_dinov3": 64, "eva02_tiny_patch14_224": 56, "ghostnet_050": 64,
}  # fmt: skip
"""Image size of each, pixels, as small as it takes."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CUT.items())
@torch.no_grad()
def test_every_cut_is_the_network_itself(name: str, size: int) -> None:
    loaded = factory.load(Backbone(name=f"timm:{name}"), classes=("a", "b"), size=size, resize=None, head="new", seed=0)
    chain, generator = loaded.chain, torch.Generator().manual_seed(0)
    for parameter in chain.parameters_of(len(chain.blocks) - 1):
        torch.nn.init.normal_(parameter[1], generator=generator)  # a new head is zero, and hides everything
    assert not chain.runs_whole, chain.why_whole
    assert len(chain.blocks) >= 4
    x = torch.rand((2, 3, size, size), generator=generator)
    whole = chain.net(chain.normalise(x))
    assert whole.std() > 0
    assert torch.equal(chain(x), whole)
    for k in range(1, len(chain.blocks)):
        stored = x = chain(x, start=k - 1, stop=k).contiguous().clone()
        assert torch.equal(chain(stored, start=k), whole), chain.blocks[k].name
    assert ours(chain) == pytest.approx(timms(chain.net))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("efficientformer_l1", 224), ("crossvit_9_240", 240)])
@torch.no_grad()
def test_what_cannot_be_cut_has_timms_layers_as_blocks(name: str, size: int) -> None:
    """Networks of two classifiers."""
    loaded = factory.load(Backbone(name=f"timm:{name}"), classes=("a", "b"), size=size, resize=None, head="new", seed=0)
    chain, x = loaded.chain, torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    assert chain.runs_whole
    assert f"it runs whole, no block can be cut off: {chain.why_whole}" in loaded.origin
    assert torch.equal(chain(x), chain.net(chain.normalise(x)))
    assert len(chain.blocks) >= 4
    assert ours(chain) == pytest.approx(timms(chain.net))
