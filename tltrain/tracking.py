"""metrics.jsonl always, Weights & Biases when asked.

The lines on disk are the truth: they are flushed one by one, and readable after any crash. W&B mirrors them and can
never stop a run.
"""

from __future__ import annotations

import json
import netrc
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from tltrain import files

KIND_ORDER = {"teacher": -1, "train": 0, "val": 1, "stage_end": 2, "test": 3}


class Tracker:
    """Writes the rows of one start of a run."""

    def __init__(self, run: Path, generation: int, start: dict[str, Any]) -> None:
        """start: {"from": [stage, step, evaluated] or None} and whatever else describes this start."""
        self.file = (run / f"metrics-{generation:06d}.jsonl").open("a", encoding="utf-8")
        self.mirror: Mirror | None = None
        self.log({"kind": "start", "generation": generation, **start})

    def log(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({**row, "time": time.time()}) + "\n")
        self.file.flush()
        if self.mirror is not None:
            self.mirror.log(row)

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        if self.mirror is not None:
            self.mirror.close()


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run over all its starts, each position once.

    A start that went on from a checkpoint repeats what an earlier one did after that checkpoint; those rows of the earlier one
    are left out. A last line cut short by a crash is left out too.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(run.glob("metrics-*.jsonl")):
        new = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := _parse(line)) is not None]
        origin = next((row.get("from") for row in new if row["kind"] == "start"), None)
        begin = tuple(origin) if origin else (-1, 0, 0)
        rows = [row for row in rows if row["kind"] == "start" or _position(row) <= begin] + new
    return [row for row in rows if row["kind"] != "start"]


def _position(row: dict[str, Any]) -> tuple[int, int, int]:
    if row["kind"] == "teacher":
        return (0, 0, -1)
    return (row["stage_index"], row["step"], KIND_ORDER[row["kind"]])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


class Mirror:
    """A Weights & Biases run. Whatever goes wrong there is said once, and then it is silent."""

    def __init__(self, run: Path, mode: str, project: str, name: str, config: dict[str, Any], say: Callable[[str], None]) -> None:
        self.say = say
        self.run: Any = None
        if mode == "online" and not has_key():
            say("W&B: no key found (WANDB_API_KEY or `wandb login`), so this run is kept offline; `wandb sync` uploads it later")
            mode = "offline"
        id_file = run / "wandb_id"
        if not id_file.exists():
            files.write_atomic(id_file, uuid.uuid4().hex[:10])
        settings = wandb.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True)
        arguments: dict[str, Any] = {"project": project, "name": name, "id": id_file.read_text(), "resume": "allow", "mode": mode}
        self.run = self._try(lambda: wandb.init(**arguments, dir=str(run), config=config, settings=settings))

    def log(self, row: dict[str, Any]) -> None:
        """A row under its kind: train/loss, val/top1. Rows carry run_step, which W&B shows them over."""
        if self.run is not None and "run_step" in row:
            own = {"kind", "run_step", "stage"}
            values: dict[str, Any] = {f"{row['kind']}/{k}": v for k, v in row.items() if k not in own and isinstance(v, int | float)}
            values |= {"stage": row.get("stage_index"), "epoch": row.get("epoch")}
            self._try(lambda: self.run.log(values, step=row["run_step"]))

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """The test's confusion matrix, as a table of (true, predicted, count)."""
        if self.run is not None:
            cells = [[t, p, n] for t, line in zip(classes, matrix, strict=True) for p, n in zip(classes, line, strict=True)]
            self._try(lambda: self.run.log({"test/confusion": wandb.Table(columns=["true", "predicted", "count"], data=cells)}))

    def summary(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            self._try(lambda: self.run.summary.update(values))

    def close(self) -> None:
        if self.run is not None:
            self._try(lambda: self.run.finish())

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # its client raises many kinds, and none of them is worth a run
            self.say(f"W&B: {type(error).__name__}: {str(error)[:200]}; this run goes on without it, metrics-*.jsonl has everything")
            self.run = None
            return None


def has_key() -> bool:
    """Whether W&B could log in: a key in the environment or in the netrc file. The key itself is not read into anything we write."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
