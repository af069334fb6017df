"""Small real runs for tests: scikit-learn's digits, a pretrained ResNet with 310,000 parameters, a few steps."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.mark import ParameterSet

from tltrain.core.output import progress
from tltrain.core.recipe import Recipe, validate

if TYPE_CHECKING:
    from benchmarks.trials import References
    from tltrain.data import DataSplits

# One thread a process: small tensors gain nothing from more, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported stays: at the end of each stage the collector would go through all of it."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Triton 3.9 prints a page about leaks, behind the summary of the tests, where its objects are not collected at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside the test's own folders is read or written, and no key is ever used."""
    root = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("TLTRAIN_CACHE", str(root / "cache"))
    monkeypatch.setenv("TLTRAIN_DATA", str(root / "data"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setitem(progress._last, "line", time.monotonic())  # no test inherits the minute of the tests before it


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in the formats, sizes and orientations that people have."""
    from photo_files import photo_folder

    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def photo_images(photos: Path) -> DataSplits:
    """The images of `photos`, all of them in train."""
    from tltrain.core.recipe import Data
    from tltrain.data import open_images

    return open_images(Data(source=f"folder:{photos}", val_fraction=0, test_fraction=0))


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of the module's DISK_MB, which is soon full. Skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.module.DISK_MB}m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def slow(*values: Any) -> ParameterSet:
    """Parameters whose kind is tested by others of the quick round."""
    return pytest.param(*values, marks=pytest.mark.slow)


HEAD = {"name": "head", "unfreeze": "head", "steps": 4, "lr": 0.01, "carry": "last"}
ALL = {"name": "all", "unfreeze": "all", "steps": 5, "lr": 0.002, "layer_decay": 0.8, "augment": "light"}


def made_recipe(**changes: Any) -> Recipe:
    """A run of two stages in a few seconds. `changes` replace top-level keys; `data` is merged."""
    raw: dict[str, Any] = {
        "name": "micro",
        "batch": 16,
        "data": {"source": "digits", "size": 32, "resize": 32, "per_class": 6, "flip": False, "eval_limit": 40},
        "backbone": {"weights": "shipped:resnet-tiny-printed"},
        "stages": [HEAD, ALL],
    }
    for key, value in changes.items():
        raw[key] = raw[key] | value if key == "data" else value
    return validate(raw, "test")


@pytest.fixture(name="made_recipe")
def _made_recipe() -> Callable[..., Recipe]:
    return made_recipe


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `tltrain train` leaves it, of a network that has learned its task."""
    from safetensors.torch import load_file

    from tltrain.core.flags import RunFlags
    from tltrain.training.run import train

    path = tmp_path_factory.mktemp("runs") / "micro"
    assert train(made_recipe(), RunFlags(folder=path, workers=0))["outcome"] == "finished"
    assert load_file(path / "weights.safetensors")["fc.weight"].abs().max() > 0, "the head that a run begins with"
    test = json.loads((path / "test_metrics.json").read_text())
    assert test["top1"] > 0.7
    assert sum(any(column) for column in zip(*test["confusion"], strict=True)) > 5, "most classes are predicted"
    return path


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The run of `trials.recipe` that nobody disturbs, for each number of processes, with all its checkpoints."""
    from benchmarks.trials import EVERY_STEP, References

    return References(tmp_path_factory.mktemp("references"), EVERY_STEP)
