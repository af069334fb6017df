"""Exports to torchvision: a state dict that torchvision's model loads with strict=True, and its preprocessing as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model

from tltrain.evaluation.exporters.base import Exporter, NotThere
from tltrain.evaluation.trained import TrainedModel
from tltrain.models import torchvision_hub
from tltrain.models.metadata import plain

WEIGHTS, DESCRIPTION = "model.pth", "model.json"
USAGE = f"""```python
import json, torch, torchvision

description = json.load(open("{DESCRIPTION}"))  # name, options, classes, mean, std, size, resize, interpolation
model = torchvision.models.get_model(description["name"], num_classes=len(description["classes"]), **description["options"]).eval()
model.load_state_dict(torch.load("{WEIGHTS}", weights_only=True))
how = torchvision.transforms.InterpolationMode(description["interpolation"])
see = torchvision.transforms.Compose([
    torchvision.transforms.Resize(description["resize"], how), torchvision.transforms.CenterCrop(description["size"]),
    torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(description["mean"], description["std"]),
])
logits = model(see(image)[None])  # an image of PIL, RGB
```"""


def check(trained: TrainedModel) -> None:
    """Check that torchvision has the network. Raises NotThere."""
    _name(trained)


def write(trained: TrainedModel, folder: Path, example_BCHW: Tensor) -> None:
    torch.save(trained.chain.net.state_dict(), folder / WEIGHTS)
    description = {name: value for name, value in plain(trained.card).items() if name not in ("config", "temperature")}
    description["name"] = _name(trained)
    description["options"] = torchvision_hub.options(description["name"], trained.card.size)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load with torchvision: images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    model = get_model(description["name"], num_classes=len(description["classes"]), **description["options"]).eval()
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True), strict=True)
    mean, std = (torch.tensor(description[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return lambda x_BCHW: model((x_BCHW - mean) / std)


def classes(folder: Path) -> list[str]:
    return list(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["classes"])


def _name(trained: TrainedModel) -> str:
    name = trained.family.torchvision_name(trained.card)
    if name is None:
        raise NotThere(f"torchvision has no class that takes the weights of {trained.card.name}")
    return name


EXPORTER = Exporter(USAGE, write, read, classes, check)
