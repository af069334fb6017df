"""Converts a torchvision ResNet to a transformers ResNet, for an export."""

from __future__ import annotations

import re

from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ResNetConfig, ResNetForImageClassification

_NAMES = (  # tensor names: torchvision's patterns, and transformers' replacements
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^fc\.", "classifier.1."),
    (r"^layer(\d)\.(\d+)\.conv(\d)\.", r"resnet.encoder.stages.<\1>.layers.\2.layer.<\3>.convolution."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.", r"resnet.encoder.stages.<\1>.layers.\2.layer.<\3>.normalization."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", r"resnet.encoder.stages.<\1>.layers.\2.shortcut.convolution."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", r"resnet.encoder.stages.<\1>.layers.\2.shortcut.normalization."),
)


def converted(net: ResNet) -> ResNetForImageClassification:
    """A transformers model with the weights of a torchvision ResNet-18 to ResNet-152, in eval mode."""
    basic = isinstance(net.layer1[0], BasicBlock)
    config = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512] if basic else [256, 512, 1024, 2048],
        depths=[len(layer) for layer in (net.layer1, net.layer2, net.layer3, net.layer4)],
        layer_type="basic" if basic else "bottleneck",
    )
    config.num_labels = net.fc.out_features
    model = ResNetForImageClassification(config).eval()
    model.load_state_dict({_their_name(name): t for name, t in net.state_dict().items()}, strict=True)
    return model


def _their_name(name: str) -> str:
    for pattern, theirs in _NAMES:
        renamed, hits = re.subn(pattern, theirs, name)
        if hits:
            return re.sub(r"<(\d)>", lambda match: str(int(match[1]) - 1), renamed)  # transformers counts stages from 0, torchvision from 1
    raise AssertionError(f"a ResNet has no tensor {name}")
