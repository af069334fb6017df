"""Weights & Biases tracker: logs rows, plan, images and weights of a run."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import netrc
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from tltrain.core import files
from tltrain.runs.metrics_log import KIND_ORDER, read_rows
from tltrain.runs.trackers.base import RunTracker, TrackedRun
from tltrain.runs.trackers.values import confusion_title, confusions, kept_id


class WandbTracker(RunTracker):
    """A Weights & Biases run.

    The client writes all its files into the run folder, so a killed run leaves nothing elsewhere. `open` imports the client, since the
    import alone creates temporary folders.
    """

    def __init__(self) -> None:
        self.run: Any = None
        self.client: Any = None
        self.online = False
        self.uploads_weights = False
        self.stage_steps: Sequence[int] = ()
        self.folder = Path()
        self.at_end: Callable[[], None] = lambda: None
        """Prints where an offline run lies, and how it is uploaded."""
        self.variables: dict[str, str] = {}
        """Environment variables that this tracker has set."""

    def open(self, run: TrackedRun) -> None:
        """Start or resume the W&B run whose id is in the run folder. Without a key, online mode becomes offline and prints a line."""
        flags = run.flags
        mode = "online" if flags.wandb == "disabled" else flags.wandb  # disabled, and yet here: `--trackers wandb`
        if mode == "online" and not has_key():
            run.say("W&B: no key found (WANDB_API_KEY or `wandb login`), so this run is kept offline; `wandb sync` uploads it later")
            mode = "offline"
        self.online, self.uploads_weights, self.stage_steps = mode == "online", flags.wandb_weights, run.stage_steps
        self.folder = run.path.resolve() / "wandb"
        identity = kept_id(run.path, "wandb")
        folders = {"WANDB_DATA_DIR": self.folder / "data", "WANDB_CACHE_DIR": self.folder / "cache"}  # else in the home folder
        self.variables = {name: str(path) for name, path in folders.items() if name not in os.environ}
        self.folder.mkdir(exist_ok=True)
        os.environ.update(self.variables)
        self._set_aside(identity)
        with self._temporary():
            self.client = importlib.import_module("wandb")
        settings = self.client.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True)
        self.run = self.client.init(
            settings=settings, dir=str(run.path), project=flags.wandb_project, group=flags.wandb_group or run.recipe["name"],
            name=run.name, id=identity, resume="allow", mode=mode, config=dict(run.recipe),
        )  # fmt: skip
        self.run.define_metric("stages")
        for kind in KIND_ORDER:
            self.run.define_metric(f"{kind}/*", step_metric="stages")
        self._go_on(run)

    def _set_aside(self, identity: str) -> None:
        """Move the offline folders of earlier starts to RUN/wandb/replaced: the folder of this start gets their rows.

        W&B uploads every folder from line 0 of the run on, so that of two folders the second overwrites the first. They go before W&B makes
        its folder, whose name it takes from the second.
        """
        aside = self.folder / "replaced"
        for earlier in sorted(self.folder.glob(f"offline-run-*-{identity}")):
            aside.mkdir(exist_ok=True)
            earlier.rename(aside / f"{len(list(aside.iterdir()))}-{earlier.name}")

    def _go_on(self, run: TrackedRun) -> None:
        """Send the rows of earlier starts that W&B does not have. Online, it has those before its step."""
        first, kept = self.run.step, Path(self.run.dir).parent
        for row in read_rows(run.path):
            if row.get("run_step", -1) >= first:
                self.log(row)
        if not self.online:
            folder = run.path / "wandb"
            command = f"wandb sync {shlex.quote(str(folder / kept.name))}"
            self.at_end = lambda: run.say(f"W&B     kept offline in {folder}; this uploads it:\n{command}")

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[None]:
        """Inside the block, temporary files are created in the run folder."""
        before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        try:
            yield
        finally:
            tempfile.tempdir = before

    def log(self, row: dict[str, Any]) -> None:
        """Log a row under its kind (train/loss, val/top1) at its run_step. The best val row also goes to the summary."""
        if "run_step" in row:
            own = {"kind", "run_step", "stage", "time"}
            numbers = {k: v for k, v in row.items() if k not in own and isinstance(v, int | float)}
            values: dict[str, Any] = {f"{row['kind']}/{k}": v for k, v in numbers.items()}
            values |= {"stage": row.get("stage_index"), "epoch": row.get("epoch"), "stages": self._stages(row)}
            self.run.log(values, step=row["run_step"])
            if row.get("best"):
                self.summary({f"best/{k}": v for k, v in numbers.items() if k != "best"})

    def _stages(self, row: dict[str, Any]) -> float:
        """The value on the axis `stages`, where each stage is one unit long: 1.5 is half-way through the second."""
        index, step = int(row.get("stage_index", 0)), int(row.get("step", 0))
        return index + (step / self.stage_steps[index] if index < len(self.stage_steps) else 0.0)

    def plan(self, text: str) -> None:
        """Sent with the first row."""
        with self._temporary():
            self.run.log({"plan": self.client.Html(f"<pre>{escape(text)}</pre>", inject=False)}, commit=False)

    def preview(self, path: Path) -> None:
        """Sent with the first row."""
        with self._temporary():
            self.run.log({"preview": self.client.Image(str(path))}, commit=False)

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """Log the matrix as a W&B confusion-matrix chart: the cells above zero, the worst confusions first."""
        cells = confusions(matrix, classes)
        columns = ["Actual", "Predicted", "nPredictions"]
        with self._temporary():
            table = self.client.Table(columns=columns, data=[list(cell) for cell in cells])
            fields, texts = {name: name for name in columns}, {"title": confusion_title(matrix, len(cells))}
            self.run.log({"test/confusion": self.client.plot_table("wandb/confusion_matrix/v1", table, fields, texts)})

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Log a table with thumbnails of the images as the network saw them."""
        with self._temporary():
            rows = [[m["id"], self._image(m["png"]), m["label"], m["predicted"], m["confidence"]] for m in items]
            table = self.client.Table(columns=["id", "seen", "label", "predicted", "confidence"], data=rows)
            self.run.log({"test/mistakes": table})

    def summary(self, values: dict[str, Any]) -> None:
        with self._temporary():
            self.run.summary.update(values)

    def report(self, page: Path) -> None:
        """Log the page. It is one file with its pictures."""
        with self._temporary(), page.open(encoding="utf-8") as text:
            self.run.log({"report": self.client.Html(text, inject=False)})

    def weights(self, weights: Path, name: str, teacher: tuple[Path, str] | None = None) -> None:
        """With --wandb-weights, log the weights as an output artifact, and a teacher's weights as an input artifact.

        An artifact's name holds the hash of its file. So the teacher's own run and all its students share one artifact, and W&B links them.
        Offline, W&B allows no input artifacts, so the student's metadata names the teacher instead.
        """
        if not self.uploads_weights:
            return
        metadata = {} if teacher is None else {"teacher": _artifact_name(*teacher)}
        if teacher is not None and self.online:
            self.run.use_artifact(self._artifact(*teacher, {}))
        with self._temporary():
            self.run.log_artifact(self._artifact(weights, name, metadata), aliases=["best"])

    def close(self) -> None:
        for name in self.variables:  # first, since finish() may never return
            os.environ.pop(name, None)
        if self.run is not None:
            self.run.finish()
            self.at_end()

    def _artifact(self, weights: Path, name: str, metadata: dict[str, Any]) -> Any:
        artifact = self.client.Artifact(_artifact_name(weights, name), type="model", metadata=metadata)
        # Not copied. The path is absolute, since `wandb sync` may run in another folder.
        artifact.add_file(str(weights.resolve()), name="weights.safetensors", skip_cache=True, policy="immutable")
        return artifact

    def _image(self, png: str) -> Any:
        """A thumbnail from base64."""
        return self.client.Image(Image.open(io.BytesIO(base64.b64decode(png))))


def _artifact_name(weights: Path, name: str) -> str:
    return f"{name}-{files.sha256(weights)[:12]}"


def has_key() -> bool:
    """Whether the environment or the netrc file holds a W&B key. The key itself is never written anywhere."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
