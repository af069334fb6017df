"""Trackio tracker: a run in Trackio's database on this machine."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tltrain.core.output import escape
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.trackers.base import RunTracker, TrackedRun
from tltrain.runs.trackers.values import confusions, figures, kept_id

MOST_ROWS = 100
"""Rows of the table of confusions."""


class TrackioTracker(RunTracker):
    """A Trackio run. Trackio has one place for all projects, TRACKIO_DIR or the cache of Hugging Face, so that one page shows all runs."""

    packages: ClassVar[Sequence[str]] = ("trackio",)

    def __init__(self) -> None:
        self.run: Any = None
        self.client: Any = None
        self.step = 0

    def open(self, run: TrackedRun) -> None:
        """Write the rows that stand, in the place of those of earlier starts of this run."""
        self.client = importlib.import_module("trackio")
        project, identity = run.flags.wandb_project, kept_id(run.path, "trackio")
        self.client.fragments.import_inbox_dir()  # on a network disk, rows of earlier starts may lie beside the database still
        with contextlib.suppress(ValueError):  # the project is new
            for earlier in self.client.Api().runs(project):
                if earlier.id == identity and not earlier.delete():
                    raise RuntimeError(f"the rows of earlier starts in {self.client.TRACKIO_DIR} could not be replaced")
        # Not by trackio.init(), which knows a run by its name alone, and takes two run folders of one name for the same run.
        self.run = self.client.Run(
            url=None, project=project, client=None, name=run.name, run_id=identity, group=run.flags.wandb_group or run.recipe["name"],
            config=dict(run.recipe),
        )  # fmt: skip
        for row in read_rows(run.path):
            self.log(row)
        run.say(f"Trackio kept in {self.client.TRACKIO_DIR}; `trackio show --project {project}` shows it")

    def log(self, row: dict[str, Any]) -> None:
        if "run_step" in row:
            self.step = row["run_step"]
            self.run.log(figures(row), step=self.step)

    def plan(self, text: str) -> None:
        self.run.log({"plan": self.client.Markdown(escape.markdown_block(text, ""))}, step=self.step)

    def preview(self, path: Path) -> None:
        self.run.log({"preview": self.client.Image(path)}, step=self.step)

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        rows = [[escape.markdown(actual), escape.markdown(guess), n] for actual, guess, n in confusions(matrix, classes, MOST_ROWS)]
        self.run.log({"test/confusion": self.client.Table(columns=["actual", "predicted", "images"], data=rows)}, step=self.step)

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        names = ["id", "label", "predicted"]
        rows = [[*(escape.markdown(str(item[name])) for name in names), item["confidence"], self._seen(item)] for item in items]
        table = self.client.Table(columns=[*names, "confidence", "seen"], data=rows)
        self.run.log({"test/mistakes": table}, step=self.step)

    def report(self, page: Path) -> None:
        self.run.log({"report": self.client.Html(str(page))}, step=self.step)

    def close(self) -> None:
        if self.run is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # it waits for its writer for half a minute at most, and says so
                self.run.finish()

    def _seen(self, item: Mapping[str, Any]) -> Any:
        return self.client.Image(Image.open(io.BytesIO(base64.b64decode(item["png"]))))
