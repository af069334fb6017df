"""`tltrain export`: writes a run's network in the format of another tool, and verifies it.

Verification loads the export with that tool and compares its logits with the run's on real images. Only a verified export gets its
final folder name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tltrain.core import files, registry
from tltrain.core.errors import UserError
from tltrain.data import open_images
from tltrain.data.decode import decode
from tltrain.evaluation.exporters.base import Exporter, NotThere
from tltrain.evaluation.exporters.model_card import model_card
from tltrain.evaluation.predict import evaluation_view
from tltrain.evaluation.trained import TrainedModel, load_trained

TOLERANCE = 1e-4
"""Largest allowed difference of a logit, relative to the largest logit or to 1. Covers fp32 sums in another order."""
NUM_IMAGES = 16


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    folder: Path
    difference: float
    """Largest absolute difference between a logit of the export and the run's own, on real images."""
    num_images: int
    notes: tuple[str, ...]
    """Lines for the user on further comparisons."""


def export(run: Path, to: str, out: Path | None = None, images: Sequence[Path] = ()) -> Exported:
    """Export a run's best weights to the tool `to`, and verify the export.

    The exported logits are calibrated: the head's weights are divided by the run's temperature.
    out: folder to write, by default RUN/export/TO.
    images: files to verify with. Without any, the run's own test images are used.
    Raises UserError for a network that the tool does not support, and where the export's logits or classes differ from the run's.
    """
    exporter: Exporter = registry.find("exporters", to, f"--to is {to!r}")
    trained = load_trained(run)
    try:
        exporter.check(trained)
    except NotThere as error:
        raise UserError(f"{error}; export it --to {_others(trained, to)}") from error
    folder = _free(out or run / "export" / to, own=out is None)
    pictures, fingerprint = _pictures(trained, images)
    views_BCHW = torch.stack([_view(picture, trained) for picture in pictures])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; give --out a new folder elsewhere") from error
    try:
        exporter.write(trained, temporary, views_BCHW.float() / 255)
        (temporary / "README.md").write_text(exporter.header + model_card(trained, exporter.usage, fingerprint), encoding="utf-8")
        difference = _compare(trained, exporter.read(temporary), views_BCHW, to)
        _check_classes(exporter.classes(temporary), trained, to)
        notes = tuple(exporter.compare(trained, temporary, pictures, views_BCHW))
        if folder.exists():
            files.remove_folder(folder)
        files.commit_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, difference, len(pictures), notes)


def _others(trained: TrainedModel, to: str) -> str:
    """The exports that take the network, for a person to choose from."""
    names = []
    for name in registry.names("exporters"):
        try:
            if name != to:
                registry.find("exporters", name, "--to").check(trained)
                names.append(name)
        except NotThere:
            continue
        except UserError:  # a package is missing: what to install is said when it is chosen
            names.append(name)
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _free(folder: Path, own: bool) -> Path:
    """Check that a folder may be written. Only the run's own export folder may be replaced. Raises UserError."""
    if not own and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; give --out a new folder")
    return folder


def _pictures(trained: TrainedModel, paths: Sequence[Path]) -> tuple[list[Image.Image], str | None]:
    """Returns (images to verify with, the data's fingerprint). The fingerprint is None for images given by path. Raises UserError."""
    if paths:
        return [_decoded(path, trained.recipe.data.white) for path in paths], None
    try:
        images = open_images(trained.recipe.data)
    except UserError as error:
        raise UserError(f"the export is compared on the run's own images: {error}; or give others with --images FILE…") from error
    split = images.test or images.val or images.train
    chosen = np.unique(np.linspace(0, len(split) - 1, NUM_IMAGES).round().astype(int))
    return [split.read(int(i)) for i in chosen], images.fingerprint


def _decoded(path: Path, white: int | None) -> Image.Image:
    try:
        return decode(files.read_bytes(path), white)
    except Exception as error:  # Pillow's errors for broken files have no common base class
        raise UserError(f"--images: {path} cannot be read: {error}") from error


def _view(picture: Image.Image, trained: TrainedModel) -> Tensor:
    view = evaluation_view(picture, trained.preprocess)
    assert isinstance(view, Tensor), "an image that is open is read"
    return view


def _compare(trained: TrainedModel, theirs: Callable[[Tensor], Tensor], views_BCHW: Tensor, to: str) -> float:
    """Largest absolute difference of a logit, over a batch of all images and a batch of one. Raises UserError above the tolerance."""
    with torch.no_grad():
        x_BCHW = views_BCHW.float() / 255
        parts = [(trained.chain(x), theirs(x)) for x in (x_BCHW, x_BCHW[:1])]
    difference = max(float((own - their).abs().max()) for own, their in parts)
    largest = max(1.0, float(parts[0][0].abs().max()))
    if not difference <= TOLERANCE * largest:
        raise UserError(f"logits of the {to} export differ by {difference:.2g}, where they go up to {largest:.3g}; nothing was kept")
    return difference


def _check_classes(classes: Sequence[str], trained: TrainedModel, to: str) -> None:
    if tuple(classes) != trained.classes:
        raise UserError(f"the {to} export says its classes are {', '.join(classes)}, not {', '.join(trained.classes)}; nothing was kept")
