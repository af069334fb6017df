"""Exports to timm: a state dict and timm's own configuration, which `timm.create_model` loads strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tltrain.evaluation.exporters.base import Exporter, NotThere
from tltrain.evaluation.trained import TrainedModel
from tltrain.models.timm import networks

WEIGHTS, CONFIG = "model.safetensors", "config.json"
USAGE = """```python
import json, timm

said = json.load(open("PATH OF THIS FOLDER/config.json"))
file = "PATH OF THIS FOLDER/model.safetensors"
model = timm.create_model(said["architecture"], num_classes=said["num_classes"], checkpoint_path=file, **said["model_args"])
```

The same with the preprocessing of this folder: `timm.create_model("local-dir:PATH OF THIS FOLDER", pretrained=True)`, then
`timm.data.create_transform(**timm.data.resolve_model_data_config(model))`."""


def check(trained: TrainedModel) -> None:
    """Check that this is a network of timm, and that timm is installed. Raises UserError."""
    if not trained.card.name.startswith(networks.PREFIX):
        raise NotThere(f"{trained.card.name} is no network of timm")
    networks.library()


def write(trained: TrainedModel, folder: Path, example_BCHW: Tensor) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in trained.chain.net.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(networks.export_config(trained.card), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """Load with timm, strictly: images (B, 3, H, W) in [0, 1] to logits (B, classes)."""
    said = _read_config(folder)
    name, arguments = said["architecture"], said["model_args"]
    model = networks.library().create_model(name, num_classes=said["num_classes"], checkpoint_path=str(folder / WEIGHTS), **arguments)
    return _from_unit(model, said["pretrained_cfg"])


def classes(folder: Path) -> list[str]:
    return list(_read_config(folder)["label_names"])


def compare(trained: TrainedModel, folder: Path, pictures: Sequence[Image.Image], views_BCHW: Tensor) -> Iterator[str]:
    """Compare with timm alone, which reads network, weights and preprocessing from the folder. Raises UserError where logits differ."""
    timm = networks.library()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    theirs = torch.stack([timm.data.create_transform(**config, is_training=False)(picture.convert("RGB")) for picture in pictures])
    std = torch.tensor(trained.card.std).view(1, 3, 1, 1)
    with torch.no_grad():
        off = float(((theirs - trained.chain.normalise(views_BCHW)) * std * 255).abs().max())
        own, said = trained.chain(views_BCHW).argmax(1), model.eval()(theirs).argmax(1)
    yield f"timm's transforms: pixels differ by {off:.2f}/255 at most"
    yield f"timm alone: {int((own != said).sum())} of {len(pictures)} images get another class than from tltrain"


def _read_config(folder: Path) -> dict[str, Any]:
    """The export's config.json."""
    return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def _from_unit(model: nn.Module, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    model.eval()
    return lambda x_BCHW: model((x_BCHW - mean) / std)


EXPORTER = Exporter(USAGE, write, read, classes, check, compare)
