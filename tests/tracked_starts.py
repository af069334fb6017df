"""Starts of a run as training makes them, told to one tracker: rows go to metrics-*.jsonl and to the tracker."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from tltrain.core import files
from tltrain.core.flags import RunFlags
from tltrain.runs.metrics_log import MetricsLog, read_rows
from tltrain.runs.trackers import TrackedRun, Trackers, chosen

RECIPE = {"name": "digits", "batch": 64, "stages": [{"name": "head", "lr": 0.01}, {"name": "all", "lr": None}]}
Row = dict[str, Any]
CLASSES = ["cat", "d*g", "=cow"]


def train_row(step: int) -> Row:
    return {"kind": "train", "stage": "head", "stage_index": 0, "step": step, "run_step": step, "epoch": step / 4, "loss": 1 / step}


def val_row(step: int) -> Row:
    return {**train_row(step), "kind": "val", "top1": 0.5, "best": True}


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Start:
    """One start of a run. `finished` makes all calls of one that comes to its end."""

    def __init__(self, run: Path, tracker: str, generation: int, origin: list[Any] | None = None, **flags: Any) -> None:
        run.mkdir(exist_ok=True)
        files.write_atomic(run / "recipe.yaml", "name: digits\n")
        self.run, self.said = run, list[str]()
        self.log = MetricsLog(run, generation, {"from": origin})
        start = RunFlags(**{"trackers": (tracker,), "wandb": "offline" if tracker == "wandb" else "disabled", **flags})
        self.trackers = Trackers(chosen(start), self.said.append)
        self.trackers.open(TrackedRun(run, run.name, RECIPE, (10, 20), start, self.said.append))

    def rows(self, rows: Iterable[Row], told: bool = True) -> Start:
        """told: whether the tracker is told of them. A killed start's last rows are in metrics-*.jsonl alone."""
        for row in rows:
            self.log.log(row)
            if told:
                self.trackers.log(row)
        return self

    def close(self) -> list[str]:
        """End the start. Returns what was said."""
        self.log.close()
        self.trackers.close()
        return self.said

    def finished(self) -> list[str]:
        Image.new("RGB", (20, 10), "blue").save(self.run / "preview.png")
        (self.run / "report.html").write_text("<!doctype html><p>The page</p>")
        self.trackers.plan("head  <0.01>")
        self.trackers.preview(self.run / "preview.png")
        self.trackers.confusion([[5, 1, 0], [3, 4, 0], [0, 2, 6]], CLASSES)
        self.trackers.mistakes([{"id": "x/1.png", "png": png(), "label": "cat", "predicted": "d*g", "confidence": 0.9}])
        self.trackers.summary({"test/top1": 0.65})
        self.trackers.report(self.run / "report.html")
        return self.close()


def resumed(run: Path, tracker: str, **flags: Any) -> list[str]:
    """Three starts: the second from an earlier checkpoint than the first came to; the end of the second never reaches the tracker."""
    said = Start(run, tracker, 1, **flags).rows([*map(train_row, range(1, 6)), val_row(5)]).close()
    second = (
        Start(run, tracker, 2, [0, 3, False], **flags)
        .rows([*map(train_row, (4, 5)), val_row(5), train_row(6)])
        .rows([train_row(7), val_row(7)], told=False)
    )
    said += second.close()
    return said + Start(run, tracker, 3, [0, 7, True], **flags).rows([train_row(8), val_row(8)]).close()


def values(run: Path, *names: str) -> Counter[tuple[str, int, float]]:
    """(metric, step, value) of the rows that stand, as a tracker has to show them."""
    cells = [(f"{row['kind']}/{name}", row["run_step"], row[name]) for row in read_rows(run) for name in names if name in row]
    return Counter(cells)
