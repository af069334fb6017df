"""Views of an image as pure functions of (data.seed, the sample's number in its source, view)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tltrain.core.errors import UserError
from tltrain.data.dataset import Split
from tltrain.data.rendering import DRAWN, PIXELS, Drawn, packed, to_device
from tltrain.data.sampler import SampleRef, key

Augment = Literal["none", "light", "strong"]
Batch = dict[str, Tensor]

KEPT_BYTES = 128 * 2**20
"""Base images that one process keeps in memory, bytes. What came first stays: an epoch comes round in another order."""


@dataclass(frozen=True)
class Preprocess:
    """How a network wants to see images."""

    size: int
    """Side of the square that the network sees, pixels."""
    resize: int
    """Shorter side before the crop, pixels; at least `size`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise UserError(
                f"data.resize is {self.resize} and data.size {self.size}; the crop cannot be larger than the image: raise data.resize "
                "or lower data.size"
            )


class BaseImages(Protocol):
    """Base images by position in the split, kept somewhere."""

    def __getitem__(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3)."""
        ...


class Views(Dataset[Batch]):
    """The views of one split. view(i, v) is the same in every process and whatever was asked for before.

    Pillow does the work, not torch: its results depend neither on the number of threads nor on the processor.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        augment: Augment,
        flip: bool,
        seed: int,
        bases: BaseImages | None = None,
        on_device: bool = False,
    ) -> None:
        """bases: the store of this split's base images at this size; without it they are made when they are asked for.

        on_device: batches hold what `rendering.to_device` makes strong views of, the same pixels. Others cost less to make than to move.
        """
        self.split, self.preprocess, self.augment, self.flip, self.seed, self.bases = split, preprocess, augment, flip, seed, bases
        self.renders = on_device and augment == "strong"
        self._transform = _transform(augment, flip, preprocess)
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: SampleRef) -> Batch:
        """As `batch`, without the first dimension."""
        return {name: tensor[0] for name, tensor in to_device(self.batch([item]), torch.device("cpu")).items()}

    def __getitems__(self, items: Sequence[SampleRef]) -> Batch:
        """What a DataLoader asks for where it can have a whole batch; `batches_as_they_are` is the collate_fn beside it."""
        return self.batch(items)

    def batch(self, items: Sequence[SampleRef]) -> Batch:
        """image uint8 (B, 3, S, S), label int64 (B,), weight float32, index int64 (position in the split), view int64.

        If they are mixed, also partner_image, partner_label, lam float32, and box int64 (B, 4): top, left, bottom, right; zeros for mixup.
        Where strong views are made on the device, image.pixels and image.drawn stand in place of image, and so for partner_image.
        """
        index_B = np.array([item.index for item in items])
        batch = {
            **self._images("image", [(item.index, item.view) for item in items]),
            "label": torch.from_numpy(self.split.labels[index_B]),
            "weight": torch.tensor([item.weight for item in items]),
            "index": torch.from_numpy(index_B),
            "view": torch.tensor([item.view for item in items]),
        }
        if items[0].partner >= 0:
            batch |= self._images("partner_image", [(item.partner, item.partner_view) for item in items])
            batch["partner_label"] = torch.from_numpy(self.split.labels[[item.partner for item in items]])
            batch["lam"] = torch.tensor([item.lam for item in items])
            batch["box"] = torch.tensor([item.box or (0, 0, 0, 0) for item in items])
        return batch

    def base(self, i: int) -> Tensor:
        """uint8 (3, h, w), the decoded image with its shorter side `resize` long, antialiased. Every view is taken from it."""
        return _to_tensor(self._base(i))

    def view(self, i: int, v: int) -> Tensor:
        """uint8 (3, size, size). View 0 is the evaluation view, the centre of the base; others are augmented, if anything is."""
        return _to_tensor(self._view(i, v))

    def _images(self, name: str, asked: Sequence[tuple[int, int]]) -> Batch:
        if not self.renders:
            return {name: self._stack(asked)}
        boxes, drawn = zip(*(self._drawn(i, v) for i, v in asked), strict=True)
        pixels_P3, drawn_BN = packed(boxes, drawn, self.preprocess.size, self.preprocess.interpolation == "bicubic")
        return {name + PIXELS: pixels_P3, name + DRAWN: drawn_BN}

    def _stack(self, asked: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 (B, 3, size, size)."""
        side = self.preprocess.size
        out_BCHW = np.empty((len(asked), 3, side, side), dtype=np.uint8)
        for n, (i, v) in enumerate(asked):
            out_BCHW[n] = self._view(i, v).transpose(2, 0, 1)
        return torch.from_numpy(out_BCHW)

    def _view(self, i: int, v: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        base, side = self._base(i), self.preprocess.size
        if v == 0 or self._transform is None:
            top, left = _centre(base, side)
            return base[top : top + side, left : left + side]
        with self._seeded(i, v):
            return np.asarray(self._transform(Image.fromarray(base)))

    def _drawn(self, i: int, v: int) -> tuple[np.ndarray, Drawn]:
        """The box of the base image that a strong view shows, uint8 (h, w, 3), and all that was drawn for it."""
        base, side = self._base(i), self.preprocess.size
        if v == 0:
            drawn = Drawn(*_centre(base, side), side, side)
        else:
            assert self._transform is not None
            with self._seeded(i, v):
                drawn = _draw(self._transform.transforms, base.shape[0], base.shape[1])
        return base[drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width], drawn

    @contextmanager
    def _seeded(self, i: int, v: int) -> Iterator[None]:
        """Inside, torch draws what belongs to a view."""
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that seeds CUDA too, which fork_rng leaves alone here, and dropout would notice
            torch.default_generator.manual_seed(key(self.seed, "view", int(self.split.index[i]), v))
            yield

    def _base(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3)."""
        if self.bases is not None:
            return self.bases[i]
        base = self._kept.get(i)
        if base is None:
            base = base_of(self.split, self.preprocess, i)
            if self._kept_bytes + base.nbytes <= KEPT_BYTES:
                self._kept[i] = base
                self._kept_bytes += base.nbytes
        return base

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_kept_bytes": 0}


def batches_as_they_are(batch: Any) -> Any:
    """collate_fn for `Views.__getitems__`."""
    return batch


def base_of(split: Split, preprocess: Preprocess, i: int) -> np.ndarray:
    """uint8 (h, w, 3), read, decoded and resized now. Raises UserError where it cannot be read."""
    return np.asarray(_resized(split.read(i), preprocess))


def _transform(augment: Augment, flip: bool, preprocess: Preprocess) -> v2.Compose | None:
    """PIL image to PIL image (size, size). light is the tutorial's, strong what it advises for small data."""
    size, interpolation = preprocess.size, F.InterpolationMode(preprocess.interpolation)
    flips: list[v2.Transform] = [v2.RandomHorizontalFlip()] if flip else []
    if augment == "none":
        return None
    if augment == "light":
        return v2.Compose([v2.RandomCrop(size, padding=size // 8), *flips])
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.8, 1.0), interpolation=interpolation),
        *flips,
        v2.RandomRotation(10, interpolation=F.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    ])  # fmt: skip


def _draw(transforms: Sequence[v2.Transform], height: int, width: int) -> Drawn:
    """What the transforms of a strong view would draw for a base image of this size, by their own hands and in their order."""
    crop, *flips, rotation, jitter = transforms
    box = crop.make_params([torch.empty((3, height, width), device="meta")])
    flip = any(float(torch.rand(1)) < one.p for one in flips)
    angle = rotation.make_params([])["angle"]
    drawn = jitter.make_params([])
    factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
    ops = [op for op in drawn["fn_idx"].tolist() if factors[op] is not None]
    return Drawn(box["top"], box["left"], box["height"], box["width"], flip, angle, tuple((op, factors[op]) for op in ops))


def _centre(base: np.ndarray, side: int) -> tuple[int, int]:
    """(top, left) of the middle, as torchvision's center_crop."""
    height, width = base.shape[:2]
    return round((height - side) / 2), round((width - side) / 2)


def _resized(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Shorter side to `resize`; the longer side is rounded down, as torchvision does."""
    short = min(image.size)
    width, height = (preprocess.resize if side == short else int(preprocess.resize * side / short) for side in image.size)
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[preprocess.interpolation]
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def _to_tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))
