"""What a trained network says of images: each is a row, also a file that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tltrain.core.errors import UserError
from tltrain.core.files import read_bytes
from tltrain.data import Split
from tltrain.data.decode import as_seen, decode, describe
from tltrain.data.sources.tree import all_above, identity_of, unreadable
from tltrain.data.views import Preprocess, Views
from tltrain.distributed.out_of_memory import fitting
from tltrain.evaluation.trained import TrainedModel, probabilities

Picture = str | Path | Image.Image | Tensor
"""A file; or an image of PIL; or one as a tensor (3, H, W), uint8 or floats in [0, 1]."""
BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """What the network says of one image."""

    id: str
    """The file's path as it was given, or the image's place in the list."""
    top: tuple[tuple[str, float], ...]
    """(class, calibrated probability), the most probable first; empty where the image cannot be read."""
    problem: str | None = None
    """Why the image cannot be read."""

    @property
    def label(self) -> str | None:
        """The most probable class."""
        return self.top[0][0] if self.top else None

    @property
    def confidence(self) -> float | None:
        """Its calibrated probability."""
        return self.top[0][1] if self.top else None


def predict(trained: TrainedModel, pictures: Sequence[Picture], top: int = 5, batch: int = BATCH) -> Iterator[Prediction]:
    """One prediction for each picture, in order, on the device there is; each names the `top` most probable classes.

    Raises UserError for a tensor that is no image, and for numbers below 1.
    """
    for name, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    parts = [range(start, min(start + batch, len(pictures))) for start in range(0, len(pictures), batch)]

    def views_of(part: range) -> Iterator[Tensor | str]:
        return pool.map(lambda i: evaluation_view(pictures[i], trained.preprocess), part)

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        ahead = views_of(parts[0]) if parts else iter(())
        for number, part in enumerate(parts, start=1):
            views = list(ahead)
            ahead = views_of(parts[number]) if number < len(parts) else iter(())  # read while the network computes
            names = [str(p) if isinstance(p := pictures[i], str | Path) else str(i) for i in part]
            seen = [view for view in views if isinstance(view, Tensor)]
            share_BK = torch.zeros(0, len(trained.classes))
            if seen:
                share_BK, batch = _probabilities(trained, torch.stack(seen), batch)
            yield from _predictions(trained, names, views, share_BK, top)


def _probabilities(trained: TrainedModel, x_BCHW: Tensor, at_a_time: int) -> tuple[Tensor, int]:
    """(B, K), and how many images at a time the device had room for."""
    return fitting(lambda size: torch.cat([probabilities(trained, part) for part in x_BCHW.split(size)]), at_a_time)


def _predictions(
    trained: TrainedModel, names: Sequence[str], views: Sequence[Tensor | str], share_BK: Tensor, top: int
) -> Iterator[Prediction]:
    """Predictions of one batch. A view that is text is the reason why there is none; share_BK: of the others."""
    best = share_BK.sort(dim=1, descending=True, stable=True)  # of equals the first class wins
    rows = zip(best.values[:, :top].tolist(), best.indices[:, :top].tolist(), strict=True)
    for name, view in zip(names, views, strict=True):
        if isinstance(view, str):
            yield Prediction(name, (), view)
        else:
            yield Prediction(name, tuple((trained.classes[k], p) for p, k in zip(*next(rows), strict=True)))


def evaluation_view(picture: Picture, preprocess: Preprocess) -> Tensor | str:
    """uint8 (3, size, size), by the code that evaluates a run; or for a file that cannot be read the reason. Raises UserError."""
    try:
        image = _image(picture)
    except UserError:
        raise
    except Exception as error:  # Pillow has no common base for what a broken file makes it raise
        return describe(error)
    split = Split("picture", np.zeros(1, np.int64), ("",), np.zeros(1, np.int64), lambda position: image)
    return Views(split, preprocess, "none", flip=False, seed=0).view(0, 0)


def _image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return as_seen(picture)
    if not isinstance(picture, Tensor):
        return decode(read_bytes(Path(picture)))
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise UserError(f"a tensor of shape {tuple(picture.shape)} is no image; give (3, H, W), uint8 or floats in [0, 1]")
    if picture.dtype == torch.uint8:
        return F.to_pil_image(picture)
    if not picture.is_floating_point() or picture.min() < 0 or picture.max() > 1:
        low, high = picture.min().item(), picture.max().item()
        raise UserError(f"a tensor of {picture.dtype} from {low:g} to {high:g} is no image; give uint8, or floats in [0, 1]")
    return F.to_pil_image((picture * 255).round().to(torch.uint8))


def find_files(words: Sequence[str], listed: Iterator[str]) -> list[str]:
    """The files that a command's words mean: files as they are, of folders every file that is not hidden, sorted, and for `-` the
    lines of `listed`. Raises UserError where that is none, and for a folder that cannot be listed."""
    found: list[str] = []
    for word in words:
        if word == "-":
            found += [line.rstrip("\r\n") for line in listed if line.strip()]
        elif os.path.isdir(word):
            found += _below(word)
        else:
            found.append(word)
    if not found:
        raise UserError(f"there is no file in {', '.join(words)}; give image files, folders of them, or - for paths from standard input")
    return found


def _below(root: str) -> Iterator[str]:
    """Every file that is not hidden, each folder once, however its links go. Raises UserError for a folder that cannot be listed."""

    def closed(error: OSError) -> None:
        raise unreadable(Path(error.filename or root), error)

    entered = all_above(Path(root)) - {identity_of(Path(root))}
    for here, folders, names in os.walk(root, onerror=closed, followlinks=True):
        identity = identity_of(Path(here))
        if identity in entered:
            folders.clear()
            continue
        entered.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))
