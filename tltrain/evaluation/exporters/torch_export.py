"""Exports with torch.export: a program with a dynamic batch size that runs without tltrain, in Python or compiled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tltrain.evaluation.exporters.base import Exporter
from tltrain.evaluation.trained import TrainedModel
from tltrain.models.chain import Chain

FILE, CLASSES = "model.pt2", "classes.json"
USAGE = f"""```python
import json, torch

extra = {{"{CLASSES}": ""}}
program = torch.export.load("{FILE}", extra_files=extra)
classes = json.loads(extra["{CLASSES}"])
logits = program.module()(images)  # (B, 3, size, size), floats in [0, 1], any B
```"""


class Images(nn.Module):
    """A module with the chain's forward pass as a function of images alone, without start and stop."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, images: Tensor) -> Tensor:
        return self.chain(images)


def traced(trained: TrainedModel, example_BCHW: Tensor) -> torch.export.ExportedProgram:
    """Trace the network for images (B, 3, size, size) in [0, 1], with a dynamic batch size B."""
    batch = torch.export.Dim("batch", min=1)
    example = example_BCHW[:2].expand(2, -1, -1, -1)  # torch.export would make a batch size of 1 a constant
    return torch.export.export(Images(trained.chain).eval(), (example.clone(),), dynamic_shapes=({0: batch},))


def write(trained: TrainedModel, folder: Path, example_BCHW: Tensor) -> None:
    torch.export.save(traced(trained, example_BCHW), folder / FILE, extra_files={CLASSES: json.dumps(trained.classes)})


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    return _load(folder).module()


def classes(folder: Path) -> list[str]:
    extra = {CLASSES: ""}
    _load(folder, extra)
    return list(json.loads(extra[CLASSES]))


def _load(folder: Path, extra_files: dict[str, str] | None = None) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():  # torch 2.11 warns about a buffer of its own
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.export.load(folder / FILE, extra_files=extra_files)


EXPORTER = Exporter(USAGE, write, read, classes)
