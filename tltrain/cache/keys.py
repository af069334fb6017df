"""The key of a cache: all inputs that determine the bytes of its rows. Each key has its own cache."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tltrain.cache import image_cache
from tltrain.cache.frozen import FrozenModel
from tltrain.core.recipe import Augment, Data, Recipe
from tltrain.data import DataSplits, Split
from tltrain.data.sampler import FiniteMixing
from tltrain.data.views import PIXELS_VERSION, Preprocess
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded

FORMAT = 1
"""Increase it when a change of the code changes the rows of an unchanged key. Older caches are then ignored."""
MIXING_VERSION = 1
"""As FORMAT, for the rows of mixed views alone."""
VERSIONS = ("torch", "torchvision", "pillow", "numpy", "transformers")


@dataclass(frozen=True)
class CacheContext:
    """The part that all cache keys of a run share: the device, and the images."""

    device: torch.device
    precision: str
    deterministic: bool
    fingerprint: str
    """Hash of the data set."""
    preprocess: Preprocess
    """That of the student. The teacher sees the same views."""
    data: Data

    @classmethod
    def of(cls, recipe: Recipe, images: DataSplits, preprocess: Preprocess, device: torch.device, precision: str) -> CacheContext:
        return cls(device, precision, recipe.deterministic, images.fingerprint, preprocess, recipe.data)


def row_key(
    context: CacheContext,
    kind: str,
    frozen: FrozenModel,
    loaded: Loaded,
    split: Split,
    augment: Augment,
    num_views: int,
    erasing: float = 0.0,
    mixing: FiniteMixing | None = None,
) -> dict[str, Any]:
    """All inputs that determine the bytes of a row. Augmentation is left out if only the evaluation view is cached.

    Rows of unmixed views, of pooled features and of whole answers keep the keys that they had before there were others.
    """
    chain, preprocess, data = frozen.chain, context.preprocess, context.data
    augmented = num_views > 1 and (augment != "none" or erasing > 0)
    device = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"  # the thread count changes the order of sums
    if context.device.type == "cuda":
        device = torch.cuda.get_device_name(context.device)
    return {
        "kind": kind,
        "format": FORMAT,
        "weights": frozen.fingerprint,
        "blocks": [block.name for block in chain.blocks[: frozen.stop]],
        "config": {k: v for k, v in loaded.card.config.items() if k not in ("id2label", "label2id")},
        "normalise": [list(chain.mean), list(chain.std)],
        "view": [preprocess.size, preprocess.resize, preprocess.interpolation],
        "augment": [augment, data.flip, data.seed, *_added(augment, erasing)] if augmented else None,
        "dtype": str(frozen.dtype or next(chain.parameters()).dtype),
        "chunk": frozen.chunk,
        "data": [context.fingerprint, split.name, len(split)],
        "device": [context.device.type, device, context.precision, context.deterministic],
        "versions": {name: version(name) for name in VERSIONS}
        | _other_libraries(chain)
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "codecs": image_cache.codecs()},
        "products": [torch.get_float32_matmul_precision(), os.environ.get("NVIDIA_TF32_OVERRIDE"), torch.backends.cudnn.allow_tf32],
    } | _where_used(frozen, mixing)


def _added(augment: Augment, erasing: float) -> list[Any]:
    """Later additions to the keys of views: [version of the augmentation, erasing]. Absent for the original values, so old keys stay."""
    version = PIXELS_VERSION.get(augment, 1)
    return [version, erasing] if version > 1 or erasing > 0 else []


def _where_used(frozen: FrozenModel, mixing: FiniteMixing | None) -> dict[str, Any]:
    """What keys of mixed views, of maps on a grid and of answers in short have beside the others."""
    mixed = {} if mixing is None else {"mixed": _mixed(mixing)}
    grids = [block.grid for block in frozen.chain.blocks[: frozen.stop] if block.grid is not None]
    mapped = mixed | {"grid": grids} if grids else mixed
    return mapped if frozen.top_k is None else mapped | {"top_k": list(astuple(frozen.top_k))}


def _mixed(mixing: FiniteMixing) -> list[Any]:
    """The inputs of partners, shares and boxes, beside the images of the split. SciPy computes the Beta distribution."""
    return [MIXING_VERSION, mixing.mixup, mixing.cutmix, mixing.seed, mixing.weight_N is not None, version("scipy")]


def _other_libraries(chain: Chain) -> dict[str, str]:
    """Version by name of each library beside VERSIONS that a module of the network comes from, such as timm."""
    names = {type(module).__module__.partition(".")[0] for module in chain.net.modules()} - {*VERSIONS, "tltrain"}
    versions: dict[str, str] = {}
    for name in sorted(names):
        with suppress(PackageNotFoundError):  # a module of a script, or a package that is installed under another name
            versions[name] = version(name)
    return versions
