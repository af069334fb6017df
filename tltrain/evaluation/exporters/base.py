"""What an exporter is: how a network is written for the tools of others, and read back with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from tltrain.evaluation.trained import TrainedModel


def _takes_all(trained: TrainedModel) -> None:
    """Every network can be written."""


def _nothing_more(trained: TrainedModel, folder: Path, pictures: Sequence[Image.Image], views_BCHW: Tensor) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Exporter:
    """The functions of one form of export; tltrain.evaluation.exporters calls them in this order: check, write, read, classes, compare."""

    usage: str
    """Markdown: how to use the export from its folder."""
    write: Callable[[TrainedModel, Path, Tensor], None]
    """(run, folder, example_BCHW): writes the network; the example is real images, floats in [0, 1]."""
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    """(folder): a function of images (B, 3, size, size) in [0, 1] to logits (B, classes), by the other side's own tool."""
    classes: Callable[[Path], list[str]]
    """(folder): the class names, as the other side reads them."""
    check: Callable[[TrainedModel], None] = _takes_all
    """(run): raises UserError for a network that the other side has no class for, and where a package is missing."""
    compare: Callable[[TrainedModel, Path, Sequence[Image.Image], Tensor], Iterable[str]] = _nothing_more
    """(run, folder, pictures, views_BCHW): lines on what else was compared, beside the logits; the views are uint8."""
    header: str = ""
    """What stands above the model card in README.md."""
