"""The store of base images: the same views bit for bit, from files as people have them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_files import NUM, VIEW, contents, filled, open_store, scene
from PIL import Image

from tltrain.cache import disk_store, image_cache
from tltrain.cache.disk_store import Store
from tltrain.cache.image_cache import SHARD_IMAGES, ImageCache
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.loader import eval_loader, train_loader
from tltrain.data.sampler import SampleStream, Shard
from tltrain.data.views import Preprocess, Views, base_of


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_are_equal_with_and_without_the_store(photo_images: DataSplits, tmp_path: Path, interpolation: Any) -> None:
    preprocess, split = Preprocess(32, 36, interpolation), photo_images.train
    with Store(tmp_path, image_cache.KIND, image_cache.key(photo_images.fingerprint, "train", preprocess), {}) as store:
        made = ImageCache(store.path, split, preprocess)
        for name, tensors in made.make(made.names()):
            store.write(name, tensors)
        assert len(store.list_shards()) == -(-NUM // SHARD_IMAGES) == 3
        without, stored = (Views(split, preprocess, "strong", True, 0, b) for b in (None, made))
        for i in range(NUM):
            assert torch.equal(without.base(i), stored.base(i))
            assert all(torch.equal(without.view(i, v), stored.view(i, v)) for v in range(3)), split.ids[i]
        assert len({made[i].shape for i in range(NUM)}) > 7
        assert stored._cached == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_see_the_same_in_workers(photo_images: DataSplits, tmp_path: Path, workers: int) -> None:
    stream = SampleStream(0, 0, NUM, 20, None, 0, mixup=0.3, cutmix=0.3, size=32)
    with open_store(tmp_path, photo_images) as store:
        made = filled(store, photo_images.train, workers)
        seen = []
        for b in (None, made):
            views = Views(photo_images.train, VIEW, "strong", True, 0, b)
            seen.append(
                [*train_loader(views, stream, 0, 8, Shard(), workers, False), *eval_loader(views, Shard(), 32, None, workers, False)]
            )
        for without, stored in zip(*seen, strict=True):
            assert without.keys() == stored.keys()
            assert all(torch.equal(without[name], stored[name]) for name in without)


def test_workers_make_the_same_bytes(photo_images: DataSplits, tmp_path: Path) -> None:
    with open_store(tmp_path / "0", photo_images) as alone, open_store(tmp_path / "2", photo_images) as helped:
        filled(alone, photo_images.train)
        filled(helped, photo_images.train, workers=2)
        assert contents(alone) == contents(helped)


def test_the_source_is_not_read_again(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(scene(50, 40, i + ord(name))).save(tmp_path / "d" / name / f"{i}.png")
    images = open_images(Data(source=f"folder:{tmp_path / 'd'}", val_fraction=0, test_fraction=0))
    with open_store(tmp_path / "stores", images) as store:
        made = filled(store, images.train)
        expected = [base_of(images.train, VIEW, i) for i in range(6)]
        for path in (tmp_path / "d").rglob("*.png"):
            path.unlink()
        views = Views(images.train, VIEW, "none", False, 0, pickle.loads(pickle.dumps(made)))
        assert all(np.array_equal(views._base(i), expected[i]) for i in range(6))


def test_a_base_is_a_read_only_view_of_the_file_and_nothing_of_it_is_pickled(photo_images: DataSplits, tmp_path: Path) -> None:
    with open_store(tmp_path, photo_images) as store:
        made = filled(store, photo_images.train)
        size, first = len(pickle.dumps(made)), made[3]
        assert len(pickle.dumps(made)) == size
        assert first.base is not None  # not a copy
        with pytest.raises(ValueError, match="read-only"):
            first[0, 0, 0] = 1
        Views(photo_images.train, VIEW, "none", False, 0, made).base(3).zero_()
        assert np.array_equal(made[3], base_of(photo_images.train, VIEW, 3))


def test_few_shards_are_mapped_at_a_time(photo_images: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "MAPPED", 1)
    with open_store(tmp_path, photo_images) as store:
        made = filled(store, photo_images.train)
        held = [made[i] for i in range(NUM)]
        assert len(made._mapped) == 1
        assert all(np.array_equal(held[i], base_of(photo_images.train, VIEW, i)) for i in range(NUM))


def test_shards_can_be_made_in_any_order(photo_images: DataSplits, tmp_path: Path) -> None:
    made = ImageCache(tmp_path, photo_images.train, VIEW)
    assert made.names() == ["000000", "000001", "000002"]
    found = dict(made.make(["000002", "000000"]))
    assert list(found) == ["000002", "000000"]
    assert len(found["000002"]["size"]) == NUM - 2 * SHARD_IMAGES
    assert found["000000"]["size"][0].tolist() == list(base_of(photo_images.train, VIEW, 0).shape[:2])
    assert list(made.make([])) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_is_named(tmp_path: Path, workers: int) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), "red" if name == "a" else "blue").save(tmp_path / name / "1.png")
    images = open_images(Data(source=f"folder:{tmp_path}", val_fraction=0, test_fraction=0))
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(UserError) as caught:
        list(ImageCache(tmp_path, images.train, VIEW).make(["000000"], workers))
    assert str(caught.value).startswith(str(tmp_path / "b" / "1.png"))
    assert not [p for p in multiprocessing.active_children() if p.daemon], "its workers ended, and nobody waits for them"


def test_what_decides_the_bytes_decides_the_key() -> None:
    first = image_cache.key("data", "train", Preprocess(32, 36))
    assert json.loads(json.dumps(first)) == first
    assert first["codecs"]["jpg"]
    assert image_cache.key("data", "train", Preprocess(30, 36)) == first  # the crop comes after
    others = [
        image_cache.key("other", "train", Preprocess(32, 36)),
        image_cache.key("data", "val", Preprocess(32, 36)),
        image_cache.key("data", "train", Preprocess(32, 40)),
        image_cache.key("data", "train", Preprocess(32, 36, "bicubic")),
    ]
    assert len({disk_store.digest(key) for key in (first, *others)}) == 5


def test_another_way_of_decoding_needs_another_format(tmp_path: Path) -> None:
    """Lossless files at their own size, so that our own code alone decides the bytes. When this fails, give bases.FORMAT a new number."""
    ramp_HW = np.arange(36 * 48, dtype=np.uint16).reshape(36, 48)
    ramp_HWC = np.stack([ramp_HW % 251, ramp_HW % 241, ramp_HW % 239, ramp_HW % 256], 2).astype(np.uint8)
    palette = Image.fromarray(ramp_HWC[..., 0]).convert("P")
    palette.putpalette([i * 7 % 256 for i in range(768)])
    exif = Image.Exif()
    exif[0x0112] = 6
    saved: list[tuple[Image.Image, dict[str, Any]]] = [
        (Image.fromarray(ramp_HWC[..., :3]), {"exif": exif}),
        (Image.fromarray(ramp_HWC), {}),
        (Image.fromarray(ramp_HW * 37), {"transparency": 370}),
        (Image.fromarray(ramp_HWC[..., 1]), {}),
        (palette, {"transparency": bytes(range(256))}),
    ]
    for number, (image, options) in enumerate(saved):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        image.save(tmp_path / "ab"[number % 2] / f"{number}.png", **options)
    images = open_images(Data(source=f"folder:{tmp_path}", val_fraction=0, test_fraction=0))
    state = hashlib.blake2b(digest_size=8)
    for i in range(len(saved)):
        state.update(base_of(images.train, VIEW, i).tobytes())
    assert (image_cache.FORMAT, state.hexdigest()) == (1, "1b577287992b42a0")


def test_the_estimate(photo_images: DataSplits) -> None:
    whole = sum(base_of(photo_images.train, VIEW, i).nbytes for i in range(NUM))
    exact, sampled = image_cache.estimate(photo_images.train, VIEW, num=NUM), image_cache.estimate(photo_images.train, VIEW, num=40)
    assert exact.bytes == whole
    assert sampled.bytes == pytest.approx(whole, rel=0.4)
    assert min(exact.seconds, sampled.seconds) > 0


@pytest.mark.slow
def test_the_command_that_times_it_in_miniature(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import photos

    (result,) = photos.main(["--smoke"])
    files, stored, _ = result.rows
    assert files.loss == stored.loss
    assert "ms of a core to read, decode and resize a photo" in capsys.readouterr().out
