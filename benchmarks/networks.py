"""Networks of torchvision, timm and transformers as chains, with random weights: how many blocks and cuts, and whether every cut is exact.

    python -m benchmarks.networks                 # all of them, as the table of docs/backbones.md
    python -m benchmarks.networks timm:xcit_nano_12_p16_224 torchvision:swin_t

Cut at every place at once, each tensor copied on its way, a chain must give its head bit for bit what the network itself gives it.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1",
    "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip
TIMM = (
    "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convnext_atto", "convnextv2_atto",
    "cspresnet50", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "edgenext_xx_small", "efficientnet_b0",
    "eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050", "hgnetv2_b0", "hiera_tiny_224",
    "hrnet_w18_small", "inception_next_atto", "lcnet_050", "maxvit_rmlp_pico_rw_256", "mixer_s32_224", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mobilevitv2_050", "nest_tiny", "poolformer_s12", "pvt_v2_b0", "regnety_002",
    "res2net50_26w_4s", "resnet18", "rexnet_100", "starnet_s1", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224",
    "tf_efficientnet_lite0", "tiny_vit_5m_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip
TRANSFORMERS = ("convnext", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "poolformer", "pvt_v2", "resnet", "segformer", "swin")
"""Types, each as its own default configuration has it."""
CLASSES = ("a", "b", "c")


def main(argv: Sequence[str] | None = None) -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks, such as torchvision:swin_t; default: all of the table")
    names = parser.parse_args(argv).names
    warnings.simplefilter("ignore")
    chosen = names or [*(f"torchvision:{n}" for n in TORCHVISION), *(f"timm:{n}" for n in TIMM), *(f"hf:{n}" for n in TRANSFORMERS)]
    print("| network | blocks | cuts | parameters | every cut exact |\n|--|--:|--:|--:|--|")
    for name in chosen:
        print(row(name), flush=True)


def row(name: str) -> str:
    """A line of the table. Cuts are the places between blocks; a network that runs whole has none, and the line says why."""
    try:
        loaded = _load(name)
    except UserError as error:
        return f"| `{name}` | | | | refused: {error} |"
    chain = loaded.chain
    parameters = f"{sum(p.numel() for p in chain.net.parameters()) / 1e6:.1f} M"
    if chain.runs_whole:
        return f"| `{name}` | {len(chain.blocks)} | 0 | {parameters} | runs whole: {chain.why_whole} |"
    images_BCHW = torch.rand((2, 3, loaded.card.size, loaded.card.size), generator=torch.Generator().manual_seed(1))
    want = factory.head_input(chain, loaded.family.head_of(loaded.card), images_BCHW)
    exact = "yes" if torch.equal(factory.cut_everywhere(chain, images_BCHW), want) else "no"
    return f"| `{name}` | {len(chain.blocks)} | {len(chain.blocks) - 1} | {parameters} | {exact} |"


def _load(name: str) -> factory.Loaded:
    library, _, kind = name.partition(":")
    if library != "hf":
        return factory.load(Backbone(name=name), classes=CLASSES, size=None, resize=None, head="new", seed=0)
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(kind)
    model: Any = AutoModelForImageClassification._model_mapping[type(config)]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        (model[0] if isinstance(model, tuple) else model)(config).save_pretrained(folder)  # LeViT has two: with and without a teacher
        return factory.load(Backbone(weights=folder), classes=CLASSES, size=None, resize=None, head="new", seed=0)


if __name__ == "__main__":
    main()
