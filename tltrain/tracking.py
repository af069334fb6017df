"""metrics.jsonl always, Weights & Biases when asked.

The lines on disk are the truth: they are flushed one by one, and readable after any crash. W&B mirrors them and can
never stop a run.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import netrc
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image

from tltrain import files
from tltrain.errors import UserError

UPLOAD_S = 300
"""Longest wait for W&B's server at the end of a run, seconds."""
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
        """Force the rows to the disk, and end the mirror. Raises UserError where the disk refuses; where another error is under way, that
        one is what a person must see, and this one is only printed beside it."""
        under_way = sys.exc_info()[1]
        try:
            with self.file:
                os.fsync(self.file.fileno())
        except OSError as error:
            text = f"the last rows of {self.file.name} may not be on the disk: {error}"
            if under_way is None:
                raise UserError(f"{text}. Make room; everything else of the run stands") from error
            sys.stderr.write(f"tltrain: {text}\n")
        finally:
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
    if row["kind"] == "test":  # it comes after the checkpoint at the end of the last stage
        return (row["stage_index"] + 1, 0, KIND_ORDER["test"])
    return (row["stage_index"], row["step"], KIND_ORDER[row["kind"]])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


class Mirror:
    """A Weights & Biases run. Whatever goes wrong there is said, and never more than that.

    All that its client writes stands in the run folder, so that a run that is killed leaves nothing elsewhere; the client is only
    imported where it is asked for, since the import alone makes temporary folders.
    """

    def __init__(
        self,
        run: Path,
        mode: str,
        project: str,
        name: str,
        config: dict[str, Any],
        say: Callable[[str], None],
        group: str | None = None,
        stage_steps: Sequence[int] = (),
    ) -> None:
        """stage_steps: planned steps of each stage, for the axis `stages`, on which each stage is one unit long."""
        self.say, self.stage_steps, self.folder = say, stage_steps, run.resolve() / "wandb"
        self.run: Any = None
        self.client: Any = None
        if mode == "online" and not has_key():
            say("W&B: no key found (WANDB_API_KEY or `wandb login`), so this run is kept offline; `wandb sync` uploads it later")
            mode = "offline"
        self.online = mode == "online"
        id_file = run / "wandb_id"
        if not id_file.exists():
            files.write_atomic(id_file, uuid.uuid4().hex[:10])
        places = {"WANDB_DATA_DIR": self.folder / "data", "WANDB_CACHE_DIR": self.folder / "cache"}  # else in the home folder
        self.places = {name: str(path) for name, path in places.items() if name not in os.environ}
        arguments: dict[str, Any] = {"project": project, "name": name, "id": id_file.read_text(), "resume": "allow", "mode": mode}
        self.run = self._try(lambda: self._open(dir=str(run), group=group, config=config, **arguments))
        self._do(self._define_axes)

    def _open(self, **arguments: Any) -> Any:
        self.folder.mkdir(exist_ok=True)
        os.environ.update(self.places)
        with self._temporary():
            self.client = importlib.import_module("wandb")
        settings = self.client.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True)
        return self.client.init(settings=settings, **arguments)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[None]:
        """What is temporary inside the block is made in the run folder."""
        before, tempfile.tempdir = tempfile.tempdir, str(self.folder)
        try:
            yield
        finally:
            tempfile.tempdir = before

    def _define_axes(self) -> None:
        self.run.define_metric("stages")
        for kind in KIND_ORDER:
            self.run.define_metric(f"{kind}/*", step_metric="stages")

    def log(self, row: dict[str, Any]) -> None:
        """A row under its kind: train/loss, val/top1. Rows carry run_step, which W&B counts by. The best val row goes to the summary."""
        if self.run is not None and "run_step" in row:
            own = {"kind", "run_step", "stage"}
            numbers = {k: v for k, v in row.items() if k not in own and isinstance(v, int | float)}
            values: dict[str, Any] = {f"{row['kind']}/{k}": v for k, v in numbers.items()}
            values |= {"stage": row.get("stage_index"), "epoch": row.get("epoch"), "stages": self._stages(row)}
            self._try(lambda: self.run.log(values, step=row["run_step"]))
            if row.get("best"):
                self.summary({f"best/{k}": v for k, v in numbers.items() if k != "best"})

    def _stages(self, row: dict[str, Any]) -> float:
        """1.5 is half-way through the second stage."""
        index, step = int(row.get("stage_index", 0)), int(row.get("step", 0))
        return index + (step / self.stage_steps[index] if index < len(self.stage_steps) else 0.0)

    def plan(self, text: str) -> None:
        """plan.txt, as it is printed; it goes out with the first row."""
        self._do(lambda: self.run.log({"plan": self.client.Html(f"<pre>{escape(text)}</pre>", inject=False)}, commit=False))

    def preview(self, path: Path) -> None:
        """The picture of what the network sees; it goes out with the first row."""
        self._do(lambda: self.run.log({"preview": self.client.Image(str(path))}, commit=False))

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        """The test's confusion matrix, as W&B draws one."""
        cells = [[t, p, n] for t, line in zip(classes, matrix, strict=True) for p, n in zip(classes, line, strict=True)]
        columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]

        def chart() -> Any:
            table = self.client.Table(columns=columns, data=cells)
            texts = {"title": "Test confusion"}
            return self.client.plot_table("wandb/confusion_matrix/v1", table, {str(name): name for name in columns}, texts)

        self._do(lambda: self.run.log({"test/confusion": chart()}))

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        """The most confident mistakes with what the network saw; items as in mistakes.json."""

        def table() -> Any:
            rows = [[m["id"], self._image(m["png"]), m["label"], m["predicted"], m["confidence"]] for m in items]
            return self.client.Table(columns=["id", "seen", "label", "predicted", "confidence"], data=rows)

        self._do(lambda: self.run.log({"test/mistakes": table()}))

    def summary(self, values: dict[str, Any]) -> None:
        self._do(lambda: self.run.summary.update(values))

    def weights(self, weights: Path, name: str, teacher: tuple[Path, str] | None = None) -> None:
        """A run's weights as an artifact of this run, after its teacher's as an input, if it has one.

        An artifact is called by its name and the hash of its file: the teacher's own run, or another student's, made the same one,
        and W&B draws them together. Offline, where nothing can be an input, the student's artifact says the teacher's name.
        """
        metadata = {} if teacher is None else {"teacher": _artifact_name(*teacher)}
        if teacher is not None and self.online:
            self._within(UPLOAD_S, lambda: self.run.use_artifact(self._artifact(*teacher, {})))
        self._do(lambda: self.run.log_artifact(self._artifact(weights, name, metadata), aliases=["best"]))

    def close(self) -> None:
        self._within(UPLOAD_S, lambda: self.run.finish())
        for name in self.places:
            os.environ.pop(name, None)

    def _artifact(self, weights: Path, name: str, metadata: dict[str, Any]) -> Any:
        artifact = self.client.Artifact(_artifact_name(weights, name), type="model", metadata=metadata)
        # as it stands, without copies; `wandb sync` may look for it from elsewhere
        artifact.add_file(str(weights.resolve()), name="weights.safetensors", skip_cache=True, policy="immutable")
        return artifact

    def _image(self, png: str) -> Any:
        """A thumbnail from base64."""
        return self.client.Image(Image.open(io.BytesIO(base64.b64decode(png))))

    def _within(self, seconds: float, call: Callable[[], Any]) -> None:
        """As `_do`, for what waits for W&B's server: no longer than so many seconds."""
        if self.run is None:
            return
        thread = threading.Thread(target=self._try, args=(call,), daemon=True, name="wandb")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.say(f"W&B: no answer for {seconds:.0f} s; this run goes on without it")
            self.run = None

    def _do(self, call: Callable[[], Any]) -> None:
        if self.run is not None:
            with self._temporary():
                self._try(call)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # its client raises many kinds, and none of them is worth a run
            self.say(f"W&B: {type(error).__name__}: {str(error)[:200]}; this run goes on without it, metrics-*.jsonl has everything")
            self.run = None
            return None


def _artifact_name(weights: Path, name: str) -> str:
    return f"{name}-{files.sha256(weights)[:12]}"


def has_key() -> bool:
    """Whether W&B could log in: a key in the environment or in the netrc file. The key itself is not read into anything we write."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
