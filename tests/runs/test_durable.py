"""What is said to be on the disk is there: bytes are forced to it before a name shows them, and the name before anybody goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_files import rows

from tltrain.cache.disk_store import Store
from tltrain.core import files
from tltrain.models.factory import WeightsMetadata, write_weights
from tltrain.runs import checkpoint
from tltrain.runs.checkpoint import Best, Progress, State

Content = bytes | frozenset[str]


@dataclass(frozen=True)
class Event:
    """A path that was forced to the disk with what it held at that moment, or a path that was renamed to another."""

    what: str
    path: Path
    content: Content = b""
    target: Path | None = None


def _content(path: Path) -> Content:
    """The bytes of a file, or the names in a folder."""
    return frozenset(os.listdir(path)) if path.is_dir() else path.read_bytes()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every fsync and every rename of this process, in order; they are done, too."""
    seen: list[Event] = []
    fsync = os.fsync

    def synced(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)
        seen.append(Event("sync", path, _content(path)))

    def renamed(rename: Callable[..., None]) -> Callable[..., None]:
        def record(source: Any, target: Any) -> None:
            rename(source, target)
            seen.append(Event("rename", Path(source), target=Path(target)))

        return record

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed(getattr(os, name)))
    return seen


def _checkpoint(folder: Path) -> Path:
    weights = {"w": torch.arange(4.0)}
    optimizer = {"w": {"exp_avg": torch.ones(4)}}
    return checkpoint.save(folder, State(Progress(0, 3, True, Best(0.5, 0, 2)), weights, {"w": torch.ones(4)}, optimizer), 1, keep=2)


def _text(folder: Path) -> Path:
    files.write_json(folder / "a.json", {"a": 1})
    return folder / "a.json"


def _text_over_another(folder: Path) -> Path:
    (folder / "a.txt").write_text("before")
    files.write_atomic(folder / "a.txt", "after")
    return folder / "a.txt"


def _shard(folder: Path) -> Path:
    with Store(folder, "test", {"number": 1}, {}) as store:
        return store.write("000000", rows(7))


def _weights(folder: Path) -> Path:
    card = WeightsMetadata("resnet-tiny", {}, (0.5,) * 3, (0.5,) * 3, 32, 32, "bilinear", ("a", "b"))
    write_weights(folder / "weights.safetensors", {"w": torch.ones(4)}, card)
    return folder / "weights.safetensors"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file is forced to the disk is read from Linux's /proc")
@pytest.mark.parametrize("write", [_checkpoint, _text, _text_over_another, _shard, _weights])
def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_call_ends(
    write: Callable[[Path], Path], events: list[Event], tmp_path: Path
) -> None:
    final = write(tmp_path)
    at = max(n for n, event in enumerate(events) if event.target == final)
    temporary, before, after = events[at].path, events[:at], events[at + 1 :]
    synced = {event.path: event.content for event in before if event.what == "sync"}
    inside = [path for path in (final, *final.rglob("*"))] if final.is_dir() else [final]
    assert len(inside) == (6 if write is _checkpoint else 1)
    for path in inside:  # with the very bytes, or names, that it has now
        assert synced.get(temporary / path.relative_to(final)) == _content(path), f"{path.name} was not forced to the disk before its name"
    folders = [event.content for event in after if event.what == "sync" and event.path == final.parent]
    assert folders, f"{final.parent} was not forced to the disk after the name was in it"
    assert all(isinstance(content, frozenset) and final.name in content for content in folders)
    assert not any(event.what == "rename" for event in after)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_is_as_readable_as_any_new_file(umask: int, tmp_path: Path) -> None:
    """safetensors makes its files readable for their owner alone, whatever the umask: a colleague could not load the weights."""
    before = os.umask(umask)
    try:
        checkpoint_, weights = _checkpoint(tmp_path), _weights(tmp_path)
        (tmp_path / "any").touch()
    finally:
        os.umask(before)
    want = (tmp_path / "any").stat().st_mode
    assert {path.name: path.stat().st_mode for path in (weights, *checkpoint_.iterdir())} == {
        path.name: want for path in (weights, *checkpoint_.iterdir())
    }
