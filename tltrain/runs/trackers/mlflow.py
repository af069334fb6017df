"""MLflow tracker: a run in the store of MLFLOW_TRACKING_URI, or in the run folder."""

from __future__ import annotations

import csv
import importlib
import io
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tltrain.core import files
from tltrain.core.output import escape
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.trackers.base import RunTracker, TrackedRun
from tltrain.runs.trackers.values import confusions, figures

SEND_S = 5.0
"""Seconds between two calls of the store: a server that answers slowly delays the training once in this time."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""Limits of one call to MLflow."""
LONGEST_PARAM = 500
"""Characters of a parameter that every store keeps."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no message to MLflow's makers
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a store of files needs no database, and may lie on a network disk
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # of its own, MLflow tries a server that is gone for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Environment variables for MLflow, where the user has not set them."""


class MlflowTracker(RunTracker):
    """An MLflow run. A store of its own lies in RUN/mlflow."""

    packages: ClassVar[Sequence[str]] = ("mlflow",)

    def __init__(self) -> None:
        self.client: Any = None
        self.module: Any = None
        self.id = ""
        self.there: Counter[tuple[str, int]] = Counter()
        """Values by metric and step that an earlier start has sent, and that this one has not come to yet."""
        self.waiting: list[Any] = []
        self.sent_s = 0.0
        self.finished = False
        self.variables: list[str] = []
        """Environment variables that this tracker has set."""

    def open(self, run: TrackedRun) -> None:
        """Begin the MLflow run, or go on with the one whose id is in the run folder. Rows that it does not have yet are sent."""
        self.variables = [name for name in SETTINGS if name not in os.environ]
        os.environ.update({name: SETTINGS[name] for name in self.variables})
        self.module = importlib.import_module("mlflow")
        store = run.path.resolve() / "mlflow"
        address = os.environ.get("MLFLOW_TRACKING_URI") or store.as_uri()
        self.client = self.module.MlflowClient(address)
        self.id, known = self._run(run)
        if known:
            self.client.update_run(self.id, status="RUNNING")
            self.there = self._sent()
        parameters = [self.module.entities.Param(name, value[:LONGEST_PARAM]) for name, value in _flat("", run.recipe)]
        for first in range(0, len(parameters), MOST_PARAMS):
            self.client.log_batch(self.id, params=parameters[first : first + MOST_PARAMS])
        for row in read_rows(run.path):
            self._take(row)
        self._send()
        if address == store.as_uri():
            run.say(f"MLflow  kept in {run.path / 'mlflow'}; MLFLOW_TRACKING_URI names another store")

    def _run(self, run: TrackedRun) -> tuple[str, bool]:
        """(id of the run, whether the store had it)."""
        file = run.path / "mlflow_id"
        if file.exists():
            try:
                return self.client.get_run(files.read_text(file)).info.run_id, True
            except self.module.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                run.say("MLflow  this store does not know the run yet, so it begins there anew, with all its rows")
        tags = {"folder": str(run.path.resolve()), "group": run.flags.wandb_group or run.recipe["name"]}
        begun = self.client.create_run(self._experiment(run.flags.wandb_project), tags=tags, run_name=run.name)
        files.write_atomic(file, begun.info.run_id)
        return begun.info.run_id, False

    def _experiment(self, project: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self.client.create_experiment(name)
        except self.module.exceptions.MlflowException:  # another run has made it meanwhile
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def _sent(self) -> Counter[tuple[str, int]]:
        names = self.client.get_run(self.id).data.metrics
        return Counter((name, each.step) for name in names for each in self.client.get_metric_history(self.id, name))

    def log(self, row: dict[str, Any]) -> None:
        """Rows that repeat after a resume are skipped: MLflow deletes nothing, so the first value stays."""
        self._take(row)
        if time.monotonic() - self.sent_s >= SEND_S:
            self._send()

    def _take(self, row: Mapping[str, Any]) -> None:
        if "run_step" not in row:
            return
        step, time_ms = int(row["run_step"]), int(1000 * row.get("time", time.time()))
        for name, value in figures(row).items():
            if self.there[name, step] > 0:
                self.there[name, step] -= 1
            else:
                self.waiting.append(self.module.entities.Metric(name, value, time_ms, step))

    def _send(self) -> None:
        while self.waiting:
            self.client.log_batch(self.id, metrics=self.waiting[:MOST_METRICS])
            del self.waiting[:MOST_METRICS]
        self.sent_s = time.monotonic()

    def plan(self, text: str) -> None:
        self.client.log_text(self.id, text, "plan.txt")

    def preview(self, path: Path) -> None:
        self.client.log_artifact(self.id, str(path))

    def confusion(self, matrix: list[list[int]], classes: list[str]) -> None:
        self._table("test_confusion.csv", ["actual", "predicted", "images"], confusions(matrix, classes))

    def mistakes(self, items: Sequence[Mapping[str, Any]]) -> None:
        columns = ["id", "label", "predicted", "confidence"]
        self._table("test_mistakes.csv", columns, [[item[name] for name in columns] for item in items])

    def report(self, page: Path) -> None:
        self.client.log_artifact(self.id, str(page))
        self.client.log_artifact(self.id, str(run_dir.recipe_file(page.parent)))
        self.finished = True

    def close(self) -> None:
        try:
            if self.id:
                self._send()
                self.client.set_terminated(self.id, "FINISHED" if self.finished else "KILLED")
        finally:
            for name in self.variables:
                os.environ.pop(name, None)

    def _table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([columns, *([escape.csv_cell(str(cell)) for cell in row] for row in rows)])
        self.client.log_text(self.id, text.getvalue(), name)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The recipe as MLflow's parameters: stages.0.lr and its value."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    if parts is None:
        yield name, str(value)
        return
    for key, part in parts:
        yield from _flat(f"{name}.{key}" if name else str(key), part)
