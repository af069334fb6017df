"""Small real runs for tests: scikit-learn's digits, a ResNet with 60,000 parameters, a few steps."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tltrain.recipe import Recipe, validate

# One thread a process: small tensors gain nothing from more, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside the test's own folders is read or written, and no key is ever used."""
    root = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("TLTRAIN_CACHE", str(root / "cache"))
    monkeypatch.setenv("TLTRAIN_DATA", str(root / "data"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


@contextlib.contextmanager
def small_disk(tmp_path: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, which is soon full. Skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


HEAD = {"name": "head", "unfreeze": "head", "steps": 4, "lr": 0.01, "carry": "last"}
ALL = {"name": "all", "unfreeze": "all", "steps": 5, "lr": 0.002, "layer_decay": 0.8, "augment": "light"}


def made_recipe(**changes: Any) -> Recipe:
    """A run of two stages in a few seconds. `changes` replace top-level keys; `data` and `backbone` are merged."""
    raw: dict[str, Any] = {
        "name": "micro",
        "batch": 16,
        "data": {"source": "digits", "size": 32, "resize": 32, "per_class": 6, "flip": False, "eval_limit": 40},
        "backbone": {"name": "resnet-micro"},
        "stages": [HEAD, ALL],
    }
    for key, value in changes.items():
        raw[key] = raw[key] | value if key in ("data", "backbone") else value
    return validate(raw, "test")


@pytest.fixture(name="made_recipe")
def _made_recipe() -> Callable[..., Recipe]:
    return made_recipe


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `tltrain train` leaves it."""
    from tltrain.options import Start
    from tltrain.run import train

    path = tmp_path_factory.mktemp("runs") / "micro"
    assert train(made_recipe(), Start(folder=path, workers=0))["outcome"] == "finished"
    return path
