"""Exports to transformers: a folder for AutoModelForImageClassification, AutoImageProcessor and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessor,
    pipeline,
)

from tltrain.evaluation.exporters.base import Exporter, NotThere
from tltrain.evaluation.trained import TrainedModel
from tltrain.models.hf_hub import quiet

USAGE = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH OF THIS FOLDER")
print(classify("x.jpg"))
```"""
HEADER = "---\nlibrary_name: transformers\npipeline_tag: image-classification\ntags: [image-classification, tltrain]\n---\n\n"
"""Model card metadata, read by the Hugging Face hub."""
_TIMM = "timm_wrapper"
"""model_type of a network of timm in transformers."""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def check(trained: TrainedModel) -> None:
    """Check that transformers supports the network. Raises UserError."""
    _model(trained)


def write(trained: TrainedModel, folder: Path, example_BCHW: Tensor) -> None:
    model = _model(trained)
    model.config.id2label = dict(enumerate(trained.classes))
    model.config.label2id = {name: i for i, name in enumerate(trained.classes)}
    if trained.card.thresholds is not None:  # then a pipeline gives each class a sigmoid of its own
        model.config.problem_type = "multi_label_classification"
        model.config.thresholds = list(trained.card.thresholds)
    with quiet():
        model.save_pretrained(folder)
    if model.config.model_type == _TIMM:
        return  # its processor reads the preprocessing in config.json
    card = trained.card
    processor = ViTImageProcessor(
        do_convert_rgb=True, do_resize=True, size={"shortest_edge": card.resize}, resample=_RESAMPLE[card.interpolation],
        do_center_crop=True, crop_size={"height": card.size, "width": card.size},
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(card.mean), image_std=list(card.std),
    )  # fmt: skip
    processor.save_pretrained(folder)


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load with transformers: images (B, 3, H, W) in [0, 1] to logits (B, classes). Mean and std come from the exported processor."""
    with quiet():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    said = processor.data_config if model.config.model_type == _TIMM else {"mean": processor.image_mean, "std": processor.image_std}
    mean, std = (torch.tensor(said[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return lambda x_BCHW: model(pixel_values=(x_BCHW - mean) / std).logits


def classes(folder: Path) -> list[str]:
    names = AutoConfig.from_pretrained(folder).id2label
    return [names[i] for i in range(len(names))]


def compare_processor(trained: TrainedModel, folder: Path, pictures: Sequence[Image.Image], views_BCHW: Tensor) -> Iterator[str]:
    """Compare preprocessing and predicted classes with transformers alone, and yield one line each.

    Pixels may differ slightly, because the processor does not resize with Pillow.
    """
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
    their_names = [classify(picture, top_k=1)[0]["label"] for picture in pictures]
    changed = sum(trained.classes[k] != name for k, name in zip(own, their_names, strict=True))
    yield f"pipeline: {changed} of {len(pictures)} images get another class than from tltrain"


def _model(trained: TrainedModel) -> PreTrainedModel:
    model = trained.family.to_transformers(trained.chain.net, trained.card)
    if model is None:
        raise NotThere(f"transformers has no class for {trained.card.name}")
    return model


EXPORTER = Exporter(USAGE, write, read, classes, check, compare_processor, HEADER)
