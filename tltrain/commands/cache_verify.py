"""Computes rows of a cache again, from the description of its run in about.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.cache import cost_model, disk_store, image_cache
from tltrain.cache.disk_store import StoreInfo
from tltrain.cache.feature_table import Layout
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.keys import CacheContext, row_key
from tltrain.cache.planner import prefix_of, teacher_of
from tltrain.core.recipe import Data, Recipe, validate
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, Split, open_images
from tltrain.data.mixing import apply_mixup, stage_views
from tltrain.data.rendering import to_device
from tltrain.data.sampler import SampleRef
from tltrain.data.unlabelled.pictures import apart, beside
from tltrain.data.views import Preprocess, Views, base_of
from tltrain.distributed.runtime import Runtime
from tltrain.models.factory import Loaded
from tltrain.models.metadata import read_state
from tltrain.runs import run_dir
from tltrain.training.experiment import Experiment

AT_ONCE = 64  # rows that are computed together


class CannotRecompute(Exception):
    """Rows cannot be computed again here, although the cache itself is intact."""


@dataclass(frozen=True)
class _FrozenOutputs:
    """Computes features of frozen blocks, or logits of a teacher, again."""

    split: Split
    frozen: FrozenModel
    views: Views
    layout: Layout
    device: torch.device

    def where(self, name: str, place: int) -> tuple[int, int]:
        """(position in the split, view) of row `place` of a shard."""
        view, samples = self.layout.rows(name)
        return samples[place], view

    def stored(self, tensors: dict[str, Tensor], place: int) -> Tensor:
        """The stored row. tensors: the shard's."""
        return tensors["rows"][place]

    def compute(self, wanted: list[tuple[int, int]]) -> Iterator[Tensor]:
        """Newly computed rows of these (position, view)."""
        for at in range(0, len(wanted), AT_ONCE):
            batch = to_device(self.views.batch([SampleRef(i, v) for i, v in wanted[at : at + AT_ONCE]]), self.device)
            yield from self.frozen(apply_mixup(batch)["image"]).cpu()


@dataclass(frozen=True)
class _BaseImages:
    """Decodes base images again."""

    split: Split
    preprocess: Preprocess

    def where(self, name: str, place: int) -> tuple[int, int]:
        return int(name) * image_cache.SHARD_IMAGES + place, 0

    def stored(self, tensors: dict[str, Tensor], place: int) -> Tensor:
        size_N2 = tensors["size"].long()
        ends = (3 * size_N2.prod(1)).cumsum(0)
        height, width = size_N2[place].tolist()
        return tensors["pixels"][int(ends[place]) - 3 * height * width : int(ends[place])].view(height, width, 3)

    def compute(self, wanted: list[tuple[int, int]]) -> Iterator[Tensor]:
        for i, _ in wanted:
            yield torch.tensor(base_of(self.split, self.preprocess, i))


RowSource = _FrozenOutputs | _BaseImages


class Maker:
    """Opens the row sources of several caches in turn. Caches of the same data set share its images."""

    def __init__(self) -> None:
        self._opened: tuple[tuple[Data, str | None], DataSplits] | None = None

    def source(self, info: StoreInfo, tensors: dict[str, Tensor]) -> RowSource:
        """The source of a cache's rows. tensors: of any of its shards. Raises CannotRecompute, UserError, OSError, SafetensorError."""
        recipe = validate(info.made_by["recipe"], str(info.path / disk_store.ABOUT), kept=True)
        wanted = recipe.data, None if recipe.distill is None else recipe.distill.unlabelled
        if self._opened is None or self._opened[0] != wanted:
            drawn = open_images(recipe.data)
            self._opened = wanted, apart(drawn, beside(drawn, recipe).unlabelled, recipe.data.source)
        images, name = self._opened[1], info.made_by["split"]
        among = (images.train, images.val, images.test, images.pool, None if images.shared is None else images.shared.split)
        split = next((s for s in among if s is not None and s.name == name), None)
        if split is None:
            raise CannotRecompute(f"{recipe.data.source} has no {name} split any more")
        if info.kind == image_cache.KIND:
            preprocess = Preprocess(info.key["resize"], info.key["resize"], info.key["interpolation"])
            _check(info, image_cache.key(images.fingerprint_of(split), split.name, preprocess))
            return _BaseImages(split, preprocess)
        return _frozen_outputs(info, recipe, images, split, tensors["rows"])


def _frozen_outputs(info: StoreInfo, recipe: Recipe, images: DataSplits, split: Split, some: Tensor) -> _FrozenOutputs:
    runtime = Runtime(recipe.deterministic)
    experiment = Experiment.open(recipe, images)
    student, teacher, planned = experiment.student, experiment.teacher, experiment.plan
    stage, training = planned[info.made_by["stage"]], split.name in ("train", "all", "pool")
    autocast, gone, chunk = runtime.accelerator.autocast, None, info.key.get("chunk")
    if info.kind == "features":
        gone = _begin(student, recipe, Path(info.made_by["run"]), planned, stage)
        frozen, loaded = (
            prefix_of(student.chain.to(runtime.device).eval(), stage.first_trainable_block, runtime.precision, True, autocast, chunk),
            student,
        )
    else:
        assert teacher is not None
        frozen = teacher_of(teacher.chain.to(runtime.device), recipe, len(images.classes), True, autocast, chunk)
        loaded = teacher
    views = stage_views(recipe, stage if training else None, split, student.preprocess)
    num_views = cost_model.num_views(recipe, stage) if training else 1
    context = CacheContext.of(recipe, images, student.preprocess, runtime.device, runtime.precision)
    context = replace(context, fingerprint=images.fingerprint_of(split))
    _check(info, row_key(context, info.kind, frozen, loaded, split, views.augment, num_views, views.erase, views.mixing), gone)
    layout = Layout.of(len(split), num_views, some[0].numel() * some.element_size(), frozen.chunk or 1)
    if info.key.get("shard_rows", layout.shard_rows) != layout.shard_rows:
        raise CannotRecompute(f"it was made with {info.key['shard_rows']} rows in a shard, and here are {layout.shard_rows}")
    return _FrozenOutputs(split, frozen, views, layout, runtime.device)


def _begin(student: Loaded, recipe: Recipe, run: Path, planned: Sequence[StagePlan], stage: StagePlan) -> str | None:
    """Load the weights that a stage began with. Returns None, or the reason why they are gone.

    Without them, the run's first weights may do: they are often equal in the frozen blocks.
    """
    if stage.index == 0:
        return None
    file = run_dir.stage_weights_file(run, planned[stage.index - 1].name)
    if not file.is_file():
        return f"{file}, with the weights that stage {stage.spec.name} began with, is gone"
    if recipe.differences(run_dir.read_recipe(run)):
        return f"{run} holds another run now"
    student.chain.net.load_state_dict(read_state(file))  # with its checksum
    return None


def _check(info: StoreInfo, key: dict[str, Any], gone: str | None = None) -> None:
    """Raises CannotRecompute where the key computed now differs from the cache's."""
    for name in ("device", "versions", *key):
        here, there = key.get(name), info.key.get(name)
        if here == there:
            continue
        if name == "weights":
            raise CannotRecompute(gone or "the weights of its frozen blocks are others now")
        if name == "data":
            raise CannotRecompute("the images, their labels or their splits have changed")
        if isinstance(here, dict) and isinstance(there, dict):
            here, there = ({k: v for k, v in a.items() if b.get(k) != v} for a, b in ((here, there), (there, here)))
        remedy = ""
        if name == "device" and key[name][:2] == info.key[name][:2] and key[name][2] != info.key[name][2]:
            remedy = f"; set ACCELERATE_MIXED_PRECISION={info.key[name][2]}, as it was then"
        raise CannotRecompute(f"it was made with {name} {there}, and here is {here}{remedy}")
