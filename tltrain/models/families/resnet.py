"""The ResNet family: torchvision's ResNets, Wide ResNets and ResNeXts, and small ResNets for a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tltrain.models import torchvision_hub
from tltrain.models.chain import Block, LastMap
from tltrain.models.families.common import head_block, run_module
from tltrain.models.family import Family, WeightsSource
from tltrain.models.metadata import WeightsMetadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
)  # fmt: skip
IN_TRANSFORMERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SMALL = {"resnet-micro": 8, "resnet-tiny": 16, "resnet-small": 32}
"""Maps each name to the channels of its first stage. Each later stage doubles them."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet for 32 px images: a 3x3 stem of stride 1, and four stages of one BasicBlock with width to 8 * width channels."""

    def __init__(self, width: int, num_classes: int) -> None:
        self._width = width
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first stage
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)


class ResnetFamily(Family):
    """torchvision's ResNet, Wide ResNet and ResNeXt, and `SmallResNet`."""

    blocks_are_tested = True
    weights_are = "for a torchvision ResNet a weights name"

    def matches(self, name: str) -> bool:
        return _short(name) in TORCHVISION or name in SMALL

    def describe(self) -> dict[str, str]:
        lines = {}
        for name in TORCHVISION:
            weights = get_model_weights(name)
            millions = next(iter(weights)).meta["num_params"] / 1e6
            lines[name] = f"torchvision's {name}, {millions:.1f} M parameters, 224 px; weights: {', '.join(weights.__members__)}"
        for name, width in SMALL.items():
            widths = ", ".join(str(width << i) for i in range(4))
            lines[name] = f"a ResNet of 4 blocks ({widths} channels) for 32 px and a CPU; weights: none but your own and shipped ones"
        return lines

    def default_card(self, name: str) -> WeightsMetadata:
        if name in SMALL:
            return WeightsMetadata(name, {}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, 32, "bilinear", None)
        return WeightsMetadata(_short(name), {}, IMAGENET_MEAN, IMAGENET_STD, 224, 256, "bilinear", None)

    def head_of(self, card: WeightsMetadata) -> str:
        return "fc"

    def build(self, card: WeightsMetadata, num_classes: int) -> ResNet:
        if card.name in SMALL:
            return SmallResNet(SMALL[card.name], num_classes)
        return cast(ResNet, get_model(card.name, weights=None, num_classes=num_classes))

    def blocks(self, net: nn.Module, card: WeightsMetadata, dropout: float) -> list[Block]:
        """stem, layer1.0, ..., layer4.N (with the pooling), head."""
        paths = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in range(len(cast(nn.Sequential, net.get_submodule(f"layer{stage}"))))]
        wide_basic = isinstance(net.get_submodule("layer1.0"), BasicBlock) and not isinstance(net, SmallResNet)
        faster = ("cuda",) if wide_basic else ("cpu", "cuda")  # ResNet-18 on a CPU: 0.94 times the speed at 64 px; ResNet-50: 1.40
        stem = Block("stem", ("conv1", "bn1", "relu", "maxpool"), _stem, channels_last=faster)
        body = [Block(path, (path,), partial(run_module, path)) for path in paths[:-1]]
        last = Block(paths[-1], (paths[-1], "avgpool"), partial(_last, paths[-1]), last_map=LastMap(partial(run_module, paths[-1])))
        return [stem, *body, last, head_block(self.head_of(card), dropout)]

    def default_weights(self, name: str) -> str | None:
        return "shipped:resnet-tiny-printed" if name == "resnet-tiny" else None

    def mismatch(self, name: str, card: WeightsMetadata) -> str | None:
        return super().mismatch(_short(name), card)

    def find_weights(self, name: str | None, weights: str, network: bool) -> WeightsSource | None:
        """Find weights by their torchvision name, such as IMAGENET1K_V2. Raises UserError."""
        if name is None or _short(name) not in TORCHVISION:
            return None
        entry = torchvision_hub.find(_short(name), weights)
        card = torchvision_hub.card_of(self.default_card(name), entry)
        return WeightsSource(self, card, f"torchvision's {entry}", partial(torchvision_hub.read_state, entry))

    def read_folder(self, folder: Path) -> WeightsSource | None:
        """Find a ResNet in a folder written by transformers, such as an export of ours. Raises UserError."""
        if not (folder / "config.json").is_file():
            return None
        from tltrain.models.families import resnet_hf

        name = resnet_hf.name_of(folder)
        if name is None:
            return None
        card, notes = resnet_hf.read_card(folder, self.default_card(name))
        with torch.device("meta"):
            body = self.build(card, 1).state_dict()
        return WeightsSource(self, card, str(folder), partial(resnet_hf.read_state, folder, body), notes)

    def to_transformers(self, net: nn.Module, card: WeightsMetadata) -> PreTrainedModel | None:
        if card.name not in IN_TRANSFORMERS:
            return None
        from tltrain.models.families import resnet_hf  # transformers is slow to import and needed for an export only

        return resnet_hf.converted(cast(ResNet, net))

    def torchvision_name(self, card: WeightsMetadata) -> str | None:
        return card.name if card.name in TORCHVISION else None


FAMILY = ResnetFamily()


def _short(name: str) -> str:
    """resnet50 for torchvision:resnet50."""
    return name.removeprefix("torchvision:")


def _stem(net: nn.Module, x_BCHW: Tensor) -> Tensor:
    resnet = cast(ResNet, net)
    return resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x_BCHW))))


def _last(path: str, net: nn.Module, x_BCHW: Tensor) -> Tensor:
    resnet = cast(ResNet, net)
    return torch.flatten(resnet.avgpool(net.get_submodule(path)(x_BCHW)), 1)
