"""Runs mirrored to W&B, and its offline files read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as _pb

from tltrain.core.flags import RunFlags
from tltrain.runs.trackers import TrackedRun, Trackers
from tltrain.runs.trackers.wandb import WandbTracker

wandb_internal_pb2: Any = _pb  # generated code without types


def row(kind: str, stage_index: int, step: int, **more: object) -> dict[str, object]:
    return {"kind": kind, "stage": f"s{stage_index}", "stage_index": stage_index, "step": step, "run_step": step, "epoch": 0.0, **more}


def mirrored(run: Path, said: list[str], **flags: Any) -> tuple[Trackers, WandbTracker]:
    """W&B as a run tells it, and the tracker itself."""
    wandb_ = WandbTracker()
    trackers = Trackers({"wandb": lambda: wandb_}, said.append)
    start = RunFlags(**{"wandb": "offline", "wandb_project": "p", "wandb_weights": True, **flags})
    trackers.open(TrackedRun(run, "n", {"name": "digits", "seed": 3}, (10, 20), start, said.append))
    return trackers, wandb_


def offline_records(run: Path) -> Iterator[Any]:
    """The records of W&B's offline files: a 7-byte header, then LevelDB log blocks of 32 KiB."""
    wandb.teardown()  # its service writes a little after finish() returns; a process that ends waits for it
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        data, offset, parts = path.read_bytes(), 7, b""
        while offset + 7 <= len(data):
            left = 32768 - offset % 32768
            if left < 7:
                offset += left
                continue
            _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
            parts += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # a full record, or the last part of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def history(run: Path) -> list[dict[str, object]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in offline_records(run)
        if record.HasField("history")
    ]
