"""Filling the store of base images: killed and gone on with, by two at once, and where a shard is damaged."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photo_files import VIEW, contents, filled, open_store

from tltrain.cache import disk_store
from tltrain.cache.feature_table import fill
from tltrain.cache.image_cache import SHARD_IMAGES
from tltrain.data import DataSplits
from tltrain.data.views import base_of
from tltrain.distributed.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]


FILL = """
import sys
from pathlib import Path
from tltrain.cache import image_cache
from tltrain.cache.image_cache import ImageCache
from tltrain.data import open_images
from tltrain.data.views import Preprocess
from tltrain.core.recipe import Data
from tltrain.distributed.runtime import Runtime
from tltrain.cache.disk_store import Store
from tltrain.cache.feature_table import fill

if __name__ == "__main__":
    images = open_images(Data(source=f"folder:{sys.argv[1]}", val_fraction=0, test_fraction=0))
    view = Preprocess(300, 320)
    with Store(Path(sys.argv[2]), image_cache.KIND, image_cache.key(images.fingerprint, "train", view), {}) as store:
        made = ImageCache(store.path, images.train, view)
        workers = int(sys.argv[3])
        asked = lambda where: bool(print(where, flush=True))
        why = fill(Runtime(True), store, made.names(), lambda names: made.make(names, workers), asked)
        print("filled" if why is None else why, flush=True)
"""


def begin_fill(photos: Path, root: Path, workers: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL, str(photos), str(root), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every shard's file, by its name, of a fill that nobody disturbed."""
    process = begin_fill(photos, root := tmp_path_factory.mktemp("whole"))
    said, _ = process.communicate(timeout=100)
    assert said.endswith("filled\n")
    (store,) = disk_store.stores(root)
    return {path.name: path.read_bytes() for path in disk_store.list_shards(store.path).values()}


@pytest.mark.slow
def test_a_killed_fill_goes_on(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    draw, stood = random.Random(0), dict[str, tuple[int, int]]()
    for line in ("shard 2 of 3", "shard 1 of 2", "shard 1 of 2"):
        process = begin_fill(photos, tmp_path)
        assert process.stdout is not None
        assert any(said == f"{line}\n" for said in process.stdout)
        time.sleep(draw.uniform(0, 0.05))  # of the 0.2 s that a shard takes
        process.kill()
        process.communicate()
        (store,) = disk_store.stores(tmp_path)
        assert all(path.suffix == ".tmp" for path in store.path.glob(".*"))  # which are known to be left over
        standing = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in disk_store.list_shards(store.path).values()}
        assert len(standing) == 1
        assert stood.items() <= standing.items()
        stood = standing
    process = begin_fill(photos, tmp_path)
    assert process.communicate(timeout=100)[0].endswith("filled\n")
    files = disk_store.list_shards(store.path).values()
    assert {path.name: path.read_bytes() for path in files} == whole
    assert stood.items() <= {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}.items()


@pytest.mark.slow
def test_two_fill_at_once(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    processes = [begin_fill(photos, tmp_path, workers) for workers in (0, 1)]
    assert all(process.communicate(timeout=100)[0].endswith("filled\n") for process in processes)
    (store,) = disk_store.stores(tmp_path)
    assert {path.name: path.read_bytes() for path in disk_store.list_shards(store.path).values()} == whole
    assert {path.name for path in store.path.iterdir()} == {*whole, disk_store.ABOUT, disk_store.LOCK}


def test_a_flipped_bit_is_seen_and_only_that_shard_is_made_again(photo_images: DataSplits, tmp_path: Path) -> None:
    with open_store(tmp_path, photo_images) as store:
        made = filled(store, photo_images.train)
        before, inodes = contents(store), {name: path.stat().st_ino for name, path in store.list_shards().items()}
        file = store.list_shards()["000001"]
        spoilt = bytearray(file.read_bytes())
        spoilt[len(spoilt) // 2] ^= 4
        file.write_bytes(spoilt)
        asked: list[list[str]] = []

        def make(names: list[str]) -> Any:
            asked.append(names)
            return made.make(names)

        assert fill(Runtime(True), store, made.names(), make, lambda where: False) is None
        assert asked == [["000001"]]
        assert contents(store) == before
        assert all(path.stat().st_ino == inodes[name] for name, path in store.list_shards().items() if name != "000001")
        assert np.array_equal(made[SHARD_IMAGES], base_of(photo_images.train, VIEW, SHARD_IMAGES))
