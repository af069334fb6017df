"""One line for each run: recipe, data, state, accuracies, time. A damaged run is a line too, and hides no other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, Stage
from tltrain.runs import heartbeat, run_dir
from tltrain.runs.listing import folders
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import Row, number
from tltrain.runs.report.stats import ends_of

STALE_S = 60.0
"""A run without a sign of life for this long has been killed; as `--stale-seconds`."""
SORTS = ("when", "run", "recipe", "data", "state", "val", "test", "time")


@dataclass(frozen=True)
class RunLine:
    """One run's row of the table. NaN and "": unknown, or not yet known."""

    run: str
    """Its folder."""
    recipe: str
    data: str
    state: str
    """finished, stopped, failed, running, killed (it left no outcome), new (never started) or damaged."""
    done: float
    """Share of the planned steps that are behind it."""
    stage: str
    step: int
    val: float
    """Accuracy on val of the weights that the last stage hands on."""
    test: float
    time: float
    """Seconds of training."""
    when: float
    """Last change, seconds since the epoch."""
    problem: str = ""
    """Why it failed, or what is damaged."""
    test_interval: tuple[float, float] | None = None
    """The 95 % interval of `test`, as report and compare show it."""

    def plain(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        values = asdict(self).items()
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}


def lines(root: Path, sort: str = "when") -> list[RunLine]:
    """All runs at and below a folder, sorted by one of SORTS: times and accuracies descending, names ascending. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one that holds run folders, such as runs")
    found = [line_of(path) if why is None else _damaged(path, why) for path, why in folders.find(root)]
    if sort in ("run", "recipe", "data", "state"):
        return sorted(found, key=lambda line: getattr(line, sort))
    return sorted(found, key=lambda line: _descending(getattr(line, sort)))


def _descending(value: float) -> tuple[bool, float]:
    return math.isnan(value), -value


def line_of(path: Path) -> RunLine:
    """The line of one run folder, whatever is wrong with it."""
    try:
        return _read(path)
    except UserError as error:
        return _damaged(path, str(error).splitlines()[0])
    except Exception as error:  # whatever a stranger's folder holds, the others are listed
        return _damaged(path, f"{type(error).__name__}: {error}")


def _damaged(path: Path, why: str) -> RunLine:
    nan = math.nan
    try:
        when = path.stat().st_mtime
    except OSError:
        when = nan
    return RunLine(str(path), "", "", "damaged", nan, "", 0, nan, nan, nan, when, why)


def _read(path: Path) -> RunLine:
    recipe, rows = run_dir.read_recipe(path), read_rows(path)
    test, outcome = run_dir.test_metrics(path), run_dir.outcome(path)
    state, last = _state(path, outcome), rows[-1] if rows else {}
    val, right = val_row(recipe, rows), "subset_accuracy" if recipe.data.multilabel else "top1"
    when = float(last["time"]) if "time" in last else run_dir.recipe_file(path).stat().st_mtime
    error = str(outcome.get("error") or "") if state == "failed" else ""
    done = 1.0 if state == "finished" else share_done(recipe, rows, run_dir.environment(path))
    tested = number(test or {}, right)
    interval = None if test is None or math.isnan(tested) else ends_of(test, tested, int(test["n"]))
    return RunLine(
        str(path), recipe.name, recipe.data.source, state, done, str(last.get("stage", "")), int(last.get("step", 0)),
        number(val or {}, right), tested, _seconds(test, outcome, rows), when, error, interval,
    )  # fmt: skip


def _state(path: Path, outcome: Mapping[str, Any]) -> str:
    signed = run_dir.generations(path)
    newest = heartbeat.newest_generation(signed)
    if newest == 0 or outcome.get("generation") == newest:
        return str(outcome.get("outcome", "new"))
    if heartbeat.failed_file(signed, newest).exists():
        return str(run_dir.failure(path, newest).get("outcome", "failed"))
    try:
        run_dir.check_owner(path, take_over=False, stale_s=STALE_S)
    except UserError:
        return "running"
    return "killed"


def _seconds(test: Mapping[str, Any] | None, outcome: Mapping[str, Any], rows: Sequence[Row]) -> float:
    """Seconds of training over all starts, as last recorded; NaN if none is recorded."""
    known = [number(source, "seconds") for source in (test or {}, outcome)]
    known.append(max((number(row, "seconds") for row in rows if row["kind"] == "stage_end"), default=math.nan))
    return next((seconds for seconds in known if math.isfinite(seconds)), math.nan)


def share_done(recipe: Recipe, rows: Sequence[Row], env: Mapping[str, Any]) -> float:
    """The share of the planned steps that are behind a run; NaN where its data was never opened."""
    num_train = (env.get("data") or {}).get("train")
    if not num_train or not rows:
        return math.nan
    planned = [_num_steps(stage, int(num_train), recipe.batch) for stage in recipe.stages]
    last = rows[-1]
    done = sum(planned[: last["stage_index"]]) + min(int(last["step"]), planned[last["stage_index"]])
    return done / max(1, sum(planned))


def _num_steps(stage: Stage, num_train: int, batch: int) -> int:
    return 1 if stage.solve else stage.steps or math.ceil((stage.epochs or 0) * num_train / batch - 1e-9)


def val_row(recipe: Recipe, rows: Sequence[Row]) -> Row | None:
    """The row of val that tells how good a run's weights are: of the best, or of the last where the last stage hands on those."""
    index = len(recipe.stages) - 1
    mine = [row for row in rows if row["kind"] in ("val", "blend") and row["stage_index"] == index]
    if recipe.stages[index].carry in ("last", "ema"):
        return mine[-1] if mine else None
    return next((row for row in reversed(rows) if row["kind"] in ("val", "blend") and row.get("best")), None)
