"""The Exporter type: functions that write a network in the format of another tool, and read it back with that tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.evaluation.trained import TrainedModel


class NotThere(UserError):
    """The tool has no such network. The text says which it lacks, and `export` adds where else to."""


def _takes_all(trained: TrainedModel) -> None:
    """The default check: every network is supported."""


def _nothing_more(trained: TrainedModel, folder: Path, pictures: Sequence[Image.Image], views_BCHW: Tensor) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Exporter:
    """The functions of one export format. `export` calls them in this order: check, write, read, classes, compare."""

    usage: str
    """Markdown for README.md: how to load the export."""
    write: Callable[[TrainedModel, Path, Tensor], None]
    """(run, folder, example_BCHW): writes the network. The example is a batch of real images, floats in [0, 1]."""
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    """(folder): loads the export with its own tool. Returns a function of images (B, 3, size, size) in [0, 1] to logits (B, classes)."""
    classes: Callable[[Path], list[str]]
    """(folder): reads the class names of the export, in order."""
    check: Callable[[TrainedModel], None] = _takes_all
    """(run): raises NotThere for a network that the tool does not have, and UserError where a package is missing."""
    compare: Callable[[TrainedModel, Path, Sequence[Image.Image], Tensor], Iterable[str]] = _nothing_more
    """(run, folder, pictures, views_BCHW): makes further comparisons and yields lines for the user. The views are uint8."""
    header: str = ""
    """Text above the model card in README.md, such as YAML metadata."""
