"""Augmented views of images. A view is a pure function of (data.seed, the sample's number in its source, view number)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tltrain.core.errors import UserError
from tltrain.core.recipe import Augment
from tltrain.data.augmentation import affine, erasing
from tltrain.data.augmentation.policies import RandomOperations
from tltrain.data.dataset import Split
from tltrain.data.rendering import DRAWN, PIXELS, Drawn, pack, to_device
from tltrain.data.sampler import FiniteMixing, SampleRef, derive_seed

Batch = dict[str, Tensor]

PIXELS_VERSION: dict[Augment, int] = {"strong": 2}
"""Increase it when a change of the code changes the pixels of an augmentation's views (1 where it is not named). Rows that were stored of
them are then made anew, and a run that has begun with them is not resumed. 2: turns are filled from the image; they had black corners.
"""
_ONE_AT_A_TIME = threading.Lock()
MEMORY_BYTES = 128 * 2**20
"""Size of each process's cache of base images, bytes. Nothing is evicted: each epoch has another order, so LRU would not help."""


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of a network: resize the shorter side, then crop a square."""

    size: int
    """Side of the square input, pixels."""
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
    """Cached base images by position in the split."""

    def __getitem__(self, i: int) -> np.ndarray:
        """The base image, uint8 (h, w, 3)."""
        ...


class Views(Dataset[Batch]):
    """The views of one split. view(i, v) is the same in every process and does not depend on earlier calls.

    Pillow computes the views: its results do not depend on the number of threads or on the processor, as torch's would.
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
        erase: float = 0.0,
        mixing: FiniteMixing | None = None,
    ) -> None:
        """bases: cached base images of this split at this size. None: they are decoded on the fly.

        on_device: batches hold the inputs of `rendering.to_device`, which renders strong views on the device with the same pixels.
        It applies to strong views only: other views are cheaper to make than to move. erase: probability of random erasing.
        mixing: `batch` gives each view its partner. None: samples have the partners that they come with.
        """
        self.split, self.preprocess, self.augment, self.flip, self.seed, self.bases = split, preprocess, augment, flip, seed, bases
        self.erase, self.mixing = erase, mixing
        self.renders = on_device and augment == "strong"
        self._transform = _transform(augment, flip, preprocess)
        self._cached: dict[int, np.ndarray] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: SampleRef) -> Batch:
        """One sample of `batch`, without the batch dimension."""
        return {name: tensor[0] for name, tensor in to_device(self.batch([item]), torch.device("cpu")).items()}

    def __getitems__(self, items: Sequence[SampleRef]) -> Batch:
        """The DataLoader's hook to fetch a whole batch. Use `workers.shared_batch` as its collate_fn."""
        return self.batch(items)

    def batch(self, items: Sequence[SampleRef]) -> Batch:
        """image uint8 (B, 3, S, S), label int64 (B,), weight float32, position int64 (in the split), view int64.

        With mixing also partner_image, partner_label, lam float32, and box int64 (B, 4): top, left, bottom, right; zeros for mixup.
        With strong views made on the device, image.pixels and image.drawn replace image. The same holds for partner_image.
        """
        items = items if self.mixing is None else self.mixing.mixed(items)
        position_B = np.array([item.position for item in items])
        batch = {
            **self._images("image", [(item.position, item.view) for item in items]),
            "label": torch.from_numpy(self.split.labels[position_B]),
            "weight": torch.tensor([item.weight for item in items]),
            "position": torch.from_numpy(position_B),
            "view": torch.tensor([item.view for item in items]),
        }
        if items[0].partner >= 0:
            batch |= self._images("partner_image", [(item.partner, item.partner_view) for item in items])
            batch["partner_label"] = torch.from_numpy(self.split.labels[[item.partner for item in items]])
            batch["lam"] = torch.tensor([item.lam for item in items])
            batch["box"] = torch.tensor([item.box or (0, 0, 0, 0) for item in items])
        return batch

    def base(self, i: int) -> Tensor:
        """The base image, uint8 (3, h, w): decoded, its shorter side resized to `resize`, antialiased. All views are made from it."""
        return _to_tensor(self._base(i))

    def view(self, i: int, v: int) -> Tensor:
        """View v of sample i, uint8 (3, size, size). View 0 is the evaluation view, the centre crop. Other views are augmented.

        Unmixed: `batch` names the partner of a mixed view.
        """
        return _to_tensor(self._view(i, v))

    def _images(self, name: str, samples: Sequence[tuple[int, int]]) -> Batch:
        if not self.renders:
            return {name: self._stack(samples)}
        boxes, drawn = zip(*(self._crop_and_draw(i, v) for i, v in samples), strict=True)
        pixels_P3, drawn_BN = pack(boxes, drawn, self.preprocess.size, self.preprocess.interpolation == "bicubic")
        return {name + PIXELS: pixels_P3, name + DRAWN: drawn_BN}

    def _stack(self, samples: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 (B, 3, size, size)."""
        side = self.preprocess.size
        out_BCHW = np.empty((len(samples), 3, side, side), dtype=np.uint8)
        for n, (i, v) in enumerate(samples):
            out_BCHW[n] = self._view(i, v).transpose(2, 0, 1)
        return torch.from_numpy(out_BCHW)

    def _view(self, i: int, v: int) -> np.ndarray:
        """uint8 (size, size, 3)."""
        base, side = self._base(i), self.preprocess.size
        top, left = _centre(base, side)
        centre = base[top : top + side, left : left + side]
        if v == 0 or (self._transform is None and self.erase == 0):
            return centre
        with self._seeded(i, v):
            view = centre if self._transform is None else np.asarray(self._transform(Image.fromarray(base)))
            return erasing.erase(view, erasing.draw(self.erase, side))

    def _crop_and_draw(self, i: int, v: int) -> tuple[np.ndarray, Drawn]:
        """The crop box of a strong view, uint8 (h, w, 3), and its drawn parameters."""
        base, side = self._base(i), self.preprocess.size
        if v == 0:
            drawn = Drawn(*_centre(base, side), side, side)
        else:
            assert self._transform is not None
            with self._seeded(i, v):
                drawn = _draw(self._transform.transforms, base.shape[0], base.shape[1], self.flip)
                drawn = replace(drawn, erased=erasing.draw(self.erase, side))
        return base[drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width], drawn

    @contextmanager
    def _seeded(self, i: int, v: int) -> Iterator[None]:
        """Inside, torch's CPU generator is seeded for this view. It is restored afterwards. It is the process's: one thread at a time."""
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed CUDA too, which fork_rng does not restore here: dropout would change
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", int(self.split.source_index[i]), v))
            yield

    def _base(self, i: int) -> np.ndarray:
        """uint8 (h, w, 3)."""
        if self.bases is not None:
            return self.bases[i]
        base = self._cached.get(i)
        if base is None:
            base = base_of(self.split, self.preprocess, i)
            if self._cached_bytes + base.nbytes <= MEMORY_BYTES:
                self._cached[i] = base
                self._cached_bytes += base.nbytes
        return base

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": {}, "_cached_bytes": 0}


def base_of(split: Split, preprocess: Preprocess, i: int) -> np.ndarray:
    """Read, decode and resize a base image: uint8 (h, w, 3). Raises UserError where it cannot be read."""
    return np.asarray(_resized(split.read(i), preprocess))


def _transform(augment: Augment, flip: bool, preprocess: Preprocess) -> v2.Compose | None:
    """The augmentation from a PIL image to a PIL image (size, size). None for no augmentation."""
    size, interpolation = preprocess.size, F.InterpolationMode(preprocess.interpolation)
    flips: list[v2.Transform] = [v2.RandomHorizontalFlip()] if flip else []
    if augment == "none":
        return None
    if augment == "light":
        return v2.Compose([v2.RandomCrop(size, padding=size // 8), *flips])
    crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), interpolation=interpolation)
    if augment != "strong":
        return v2.Compose([crop, *flips, RandomOperations(augment, mirror=flip)])
    return v2.Compose([crop, *flips, _Turn(10, flip), v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)])


@dataclass(frozen=True)
class _Turn:
    """v2.RandomRotation, but for the corners, which are filled from the image."""

    most: float
    """Degrees."""
    mirror: bool
    """As in `affine.warped`."""

    def draw(self) -> float:
        return float(v2.RandomRotation(self.most).make_params([])["angle"])

    def __call__(self, image: Image.Image) -> Image.Image:
        return affine.warped(image, affine.rotation(self.draw(), image.width), self.mirror)


def _draw(transforms: Sequence[v2.Transform], height: int, width: int, mirror: bool) -> Drawn:
    """Draw the parameters of a strong view for a base image of this size, by the transforms' own methods and in their order."""
    crop, *flips, rotation, jitter = transforms
    box = crop.make_params([torch.empty((3, height, width), device="meta")])
    flip = any(float(torch.rand(1)) < transform.p for transform in flips)
    angle = rotation.draw()
    colour = jitter.make_params([])
    factors = [colour[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
    ops = [op for op in colour["fn_idx"].tolist() if factors[op] is not None]
    return Drawn(box["top"], box["left"], box["height"], box["width"], flip, angle, mirror, tuple((op, factors[op]) for op in ops))


def _centre(base: np.ndarray, side: int) -> tuple[int, int]:
    """(top, left) of the centre crop, rounded as torchvision's center_crop."""
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
