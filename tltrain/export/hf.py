"""A folder that transformers opens: AutoModelForImageClassification, AutoImageProcessor and pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from tltrain.backbones.hub import quiet
from tltrain.errors import UserError
from tltrain.trained import Trained

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
USAGE = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH OF THIS FOLDER")
print(classify("x.jpg"))
```"""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_NAMES = (  # torchvision's names of a ResNet's tensors, to transformers'
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^fc\.", "classifier.1."),
    (r"^layer(\d)\.(\d+)\.conv(\d)\.", r"resnet.encoder.stages.<\1>.layers.\2.layer.<\3>.convolution."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.", r"resnet.encoder.stages.<\1>.layers.\2.layer.<\3>.normalization."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", r"resnet.encoder.stages.<\1>.layers.\2.shortcut.convolution."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", r"resnet.encoder.stages.<\1>.layers.\2.shortcut.normalization."),
)


def check(trained: Trained) -> None:
    """Raises UserError for a network that transformers has no class for."""
    name = trained.card.name
    if not isinstance(trained.chain.net, ViTForImageClassification) and name not in RESNETS:
        raise UserError(
            f"transformers has no class for {name}; it has ViT and {', '.join(RESNETS)}. Export {name} --to onnx or torch-export"
        )


def write(trained: Trained, folder: Path, example_BCHW: Tensor) -> None:
    net = trained.chain.net
    model = net if isinstance(net, ViTForImageClassification) else _resnet(net)
    model.config.id2label = dict(enumerate(trained.classes))
    model.config.label2id = {name: i for i, name in enumerate(trained.classes)}
    with quiet():
        model.save_pretrained(folder)
    card = trained.card
    processor = ViTImageProcessor(
        do_convert_rgb=True, do_resize=True, size={"shortest_edge": card.resize}, resample=_RESAMPLE[card.interpolation],
        do_center_crop=True, crop_size={"height": card.size, "width": card.size},
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(card.mean), image_std=list(card.std),
    )  # fmt: skip
    processor.save_pretrained(folder)


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [0, 1] to logits, by transformers: normalised with what the processor's file says."""
    with quiet():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return lambda x_BCHW: model(pixel_values=(x_BCHW - mean) / std).logits


def classes(folder: Path) -> list[str]:
    names = AutoConfig.from_pretrained(folder).id2label
    return [names[i] for i in range(len(names))]


def compare_processor(trained: Trained, folder: Path, pictures: Sequence[Image.Image], views_BCHW: Tensor) -> Iterator[str]:
    """Lines on the way from an image to its class, by transformers alone. The processor resizes with another library than Pillow."""
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    theirs = torch.cat([processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    std = torch.tensor(trained.card.std).view(1, 3, 1, 1)
    off = float(((theirs - trained.chain.normalise(views_BCHW)) * std * 255).abs().max())
    why = "; it rounds the crop's corner otherwise" if off > 2 else ""
    yield f"processor: pixels differ by {off:.2f}/255 at most{why}"
    with torch.no_grad():
        own = trained.chain(views_BCHW).argmax(1).tolist()
    with quiet():
        classify = pipeline("image-classification", model=str(folder))
    said = [classify(picture, top_k=1)[0]["label"] for picture in pictures]
    changed = sum(trained.classes[k] != name for k, name in zip(own, said, strict=True))
    yield f"pipeline: {changed} of {len(pictures)} images get another class than from tltrain"


def _resnet(net: ResNet) -> ResNetForImageClassification:
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
            return re.sub(r"<(\d)>", lambda match: str(int(match[1]) - 1), renamed)  # they count from 0
    raise AssertionError(f"a ResNet has no tensor {name}")
