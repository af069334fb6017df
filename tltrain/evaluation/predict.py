"""Predicts classes for single images. A file that cannot be read gives a prediction with a `problem`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tltrain.core.errors import UserError
from tltrain.core.files import in_parallel, read_bytes
from tltrain.core.recipe import Augment
from tltrain.data import Split
from tltrain.data.decode import MEMORY, as_seen, decode, describe
from tltrain.data.pictures.warned import about
from tltrain.data.sources.tree import all_above, identity_of, unreadable
from tltrain.data.views import Preprocess, Views
from tltrain.distributed.out_of_memory import fitting
from tltrain.evaluation.evaluate import PLAIN, Asked, augment_of_views
from tltrain.evaluation.evaluator import mean_over_views
from tltrain.evaluation.trained import TrainedModel, probabilities, probabilities_and_features

Picture = str | Path | Image.Image | Tensor
"""A file, a PIL image, or a tensor (3, H, W) of uint8 or of floats in [0, 1]."""
BATCH = 64
"""Images at a time."""
Decision = Literal["answers", "abstains", "stranger"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    id: str
    """The file's path as it was passed in, or the image's position in the list."""
    top: tuple[tuple[str, float], ...]
    """(class, calibrated probability), the most probable first. Empty if the image cannot be read."""
    problem: str | None = None
    """Why the image cannot be read."""
    shares: np.ndarray | None = field(default=None, compare=False, repr=False)
    """(K,) float64, the calibrated probability of every class, in the order of the run's classes. None if the image cannot be read."""
    set: tuple[str, ...] | None = None
    """The classes of its set, the most probable first. None without sets."""
    strangeness: float | None = None
    """How unlike the training's images it is; a stranger above 1. None where that was not asked for."""
    decision: Decision | None = None
    """Whether the run answers, abstains, or takes the image for a stranger. None where neither --abstain nor --strangers was asked for."""
    labels: tuple[str, ...] | None = None
    """Of several labels: those whose probability reaches their thresholds, the most probable first. None where an image has one class."""

    @property
    def label(self) -> str | None:
        """The most probable class; None if the image cannot be read."""
        return self.top[0][0] if self.top else None

    @property
    def confidence(self) -> float | None:
        """The calibrated probability of `label`."""
        return self.top[0][1] if self.top else None


def predict(
    trained: TrainedModel, pictures: Sequence[Picture], top: int = 5, batch: int = BATCH, asked: Asked = PLAIN
) -> Iterator[Prediction]:
    """One prediction for each picture, in order, computed on the accelerator if there is one, else on the CPU.

    top: how many classes each prediction names. batch: images at a time. asked: views of each image, and rules (the first of each kind).
    Raises UserError for a tensor that is not an image, and for a `top` or `batch` below 1.
    """
    for name, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    step = max(1, batch // asked.num_views)
    parts = [range(start, min(start + step, len(pictures))) for start in range(0, len(pictures), step)]
    augment = augment_of_views(trained.recipe)

    def views_of(part: range) -> Iterator[Tensor | str]:
        def view(picture: Picture) -> Tensor | str:
            if asked.num_views == 1:
                return evaluation_view(picture, trained.preprocess, trained.recipe.data.white)
            return several_views(picture, trained, augment, asked.num_views)

        return in_parallel(view, [pictures[i] for i in part])  # Pillow releases the GIL while it decodes and resizes

    ahead = views_of(parts[0]) if parts else iter(())
    for number, part in enumerate(parts, start=1):
        views = list(ahead)
        ahead = views_of(parts[number]) if number < len(parts) else iter(())  # decoded while the network computes
        names = [str(p) if isinstance(p := pictures[i], str | Path) else str(i) for i in part]
        readable = [view for view in views if isinstance(view, Tensor)]
        rows: Iterator[Prediction] = iter(())
        if readable:
            x_BVCHW = torch.stack([view if view.ndim == 4 else view[None] for view in readable])
            (p_BK, features_BD), batch = _answers(trained, x_BVCHW, batch, asked.strangers is not None)
            rows = _rows(trained, p_BK, features_BD, top, asked)
        for name, view in zip(names, views, strict=True):
            yield Prediction(name, (), view) if isinstance(view, str) else replace(next(rows), id=name)


def _answers(trained: TrainedModel, x_BVCHW: Tensor, at_a_time: int, features: bool) -> tuple[tuple[Tensor, Tensor], int]:
    """((probabilities (B, K), the mean over views; features of view 0 (B, D)), how many images at a time fitted on the device).

    features: whether they are wanted; else D is 0.
    """
    num_views = x_BVCHW.shape[1]

    def answered(size: int) -> tuple[Tensor, Tensor]:
        split = x_BVCHW.flatten(0, 1).split(size)
        if not features:
            p_BK = mean_over_views(torch.cat([probabilities(trained, part) for part in split]), num_views)
            return p_BK, p_BK[:, :0]
        parts = [probabilities_and_features(trained, part) for part in split]
        p_BK, features_BD = (torch.cat(part) for part in zip(*parts, strict=True))
        return mean_over_views(p_BK, num_views), features_BD[::num_views]

    return fitting(answered, at_a_time)


def _rows(trained: TrainedModel, p_BK: Tensor, features_BD: Tensor, top: int, asked: Asked) -> Iterator[Prediction]:
    """Predictions of the readable images of one batch, not yet named."""
    classes, thresholds = trained.classes, trained.card.thresholds
    best = p_BK.sort(dim=1, descending=True, stable=True)  # stable: of equal classes the first wins
    in_BK = asked.sets[0].members(p_BK.numpy()) if asked.sets else None
    strangeness_B = None if asked.strangers is None else asked.strangers.score(features_BD.numpy()).tolist()
    for b, (shares, order) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        named = tuple((classes[k], p) for p, k in zip(shares[:top], order[:top], strict=True))
        members = None if in_BK is None else tuple(classes[k] for k in order if in_BK[b, k])
        strangeness = None if strangeness_B is None else strangeness_B[b]
        decision = _decision(shares[0], strangeness, asked)
        labels = None if thresholds is None else tuple(classes[k] for k, p in zip(order, shares, strict=True) if p >= thresholds[k])
        yield Prediction("", named, None, p_BK[b].numpy(), members, strangeness, decision, labels)


def _decision(confidence: float, strangeness: float | None, asked: Asked) -> Decision | None:
    """A stranger is one however sure the network is of it."""
    if strangeness is None and not asked.abstentions:
        return None
    if strangeness is not None and strangeness > 1:
        return "stranger"
    return "abstains" if asked.abstentions and confidence <= asked.abstentions[0].threshold else "answers"


def evaluation_view(picture: Picture, preprocess: Preprocess, white: int | None = None) -> Tensor | str:
    """The evaluation view, uint8 (3, size, size), made by the code that evaluates a run; or the reason why the file cannot be read.

    white: data.white of the recipe.
    Raises UserError for a tensor that is not an image.
    """
    try:
        image = _image(picture, white)
    except UserError:
        raise
    except Exception as error:  # Pillow has no common base for what a broken file makes it raise
        return describe(error)
    return Views(_alone(image), preprocess, "none", flip=False, seed=0).view(0, 0)


def several_views(picture: Picture, trained: TrainedModel, augment: Augment, num_views: int) -> Tensor | str:
    """The views that an evaluation with several views makes, uint8 (V, 3, size, size), the evaluation view first; otherwise as it."""
    data = trained.recipe.data
    try:
        image = _image(picture, data.white)
    except UserError:
        raise
    except Exception as error:
        return describe(error)
    views = Views(_alone(image), trained.preprocess, augment, data.flip, data.seed)
    return torch.stack([views.view(0, v) for v in range(num_views)])


def _alone(image: Image.Image) -> Split:
    return Split("picture", np.zeros(1, np.int64), ("",), np.zeros(1, np.int64), lambda position: image)


def _image(picture: Picture, white: int | None) -> Image.Image:
    if isinstance(picture, Image.Image):
        return as_seen(picture, white)
    if not isinstance(picture, Tensor):
        content = read_bytes(Path(picture))
        with about(str(picture)), MEMORY.room_for(content):
            return decode(content, white)
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise UserError(f"a tensor of shape {tuple(picture.shape)} is not an image; give (3, H, W), uint8 or floats in [0, 1]")
    if picture.dtype == torch.uint8:
        return F.to_pil_image(picture)
    if not picture.is_floating_point() or picture.min() < 0 or picture.max() > 1:
        low, high = picture.min().item(), picture.max().item()
        raise UserError(f"a tensor of {picture.dtype} from {low:g} to {high:g} is not an image; give uint8, or floats in [0, 1]")
    return F.to_pil_image((picture * 255).round().to(torch.uint8))


def find_files(arguments: Sequence[str], stdin_lines: Iterator[str]) -> list[str]:
    """The files that the command's arguments name.

    A file stands for itself, a folder for all files below it that are not hidden, sorted, and `-` for the paths in `stdin_lines`.
    Raises UserError if there is no file, and for a folder that cannot be listed.
    """
    paths: list[str] = []
    for argument in arguments:
        if argument == "-":
            paths += [line.rstrip("\r\n") for line in stdin_lines if line.strip()]
        elif os.path.isdir(argument):
            paths += _below(argument)
        else:
            paths.append(argument)
    if not paths:
        raise UserError(f"there is no file in {', '.join(arguments)}; give image files, folders, or - for paths from standard input")
    return paths


def _below(root: str) -> Iterator[str]:
    """All files below a folder that are not hidden. Enters each folder once, also with links. Raises UserError if one cannot be listed."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename or root), error)

    entered = all_above(Path(root)) - {identity_of(Path(root))}
    for here, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        identity = identity_of(Path(here))
        if identity in entered:
            folders.clear()
            continue
        entered.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))
