"""TensorBoard tracker: event files in the run folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tltrain.core.output import escape
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.trackers.base import RunTracker, TrackedRun
from tltrain.runs.trackers.values import confusion_title, confusions, figures

FLUSH_S = 10
"""Seconds after which a row is in the file, and TensorBoard shows it."""
MOST_ROWS = 100
"""Rows of the table of confusions, which is a text here."""


class TensorBoardTracker(RunTracker):
    """Events in RUN/tensorboard. `tensorboard --logdir runs` shows all runs of a folder."""

    packages: ClassVar[Sequence[str]] = ("tensorboard",)

    def __init__(self) -> None:
        self.writer: Any = None
        self.step = 0

    def open(self, run: TrackedRun) -> None:
        """Write the rows that stand into a new file and then delete those of earlier starts.

        So a row after the checkpoint that a start resumed from stands once, and a row that a killed start had not written yet is not lost.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        folder = run.path / "tensorboard"
        earlier = list(folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_S)  # a TensorBoard that is open drops what it had read
        for row in read_rows(run.path):
            self.log(row)
        self.writer.flush()
        for path in earlier:
            path.unlink(missing_ok=True)

    def log(self, row: dict[str, Any]) -> None:
        if "run_step" in row:
            self.step = row["run_step"]
            for name, value in figures(row).items():
                self.writer.add_scalar(name, value, self.step, walltime=row.get("time"))

    def plan(self, text: str) -> None:
        self.writer.add_text("plan", escape.markdown_block(text, ""), 0)

    def preview(self, path: Path) -> None:
        self._image("preview", Image.open(path), 0)

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """The worst confusions as a table, and the whole matrix as an image: a row for each actual class, darker for more images."""
        cells = confusions(matrix, classes, MOST_ROWS)
        rows = [f"{escape.markdown(actual)} | {escape.markdown(predicted)} | {n}" for actual, predicted, n in cells]
        text = "\n".join([confusion_title(matrix, len(cells)), "", "actual | predicted | images", "--|--|--", *rows])
        self.writer.add_text("test/confusion", text, self.step)
        counts = np.asarray(matrix, dtype=float)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        pixels = np.kron((255 * (1 - shares)).astype(np.uint8), np.ones([max(1, 512 // len(classes))] * 2, dtype=np.uint8))
        self._image("test/confusion", Image.fromarray(pixels), self.step)

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        for number, item in enumerate(items, start=1):
            said = f"{item['label']} taken for {item['predicted']}, {item['confidence']:.0%}"
            self._image(f"test/mistakes/{number:02} {escape.line(said)}", Image.open(io.BytesIO(base64.b64decode(item["png"]))), self.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _image(self, name: str, image: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
