"""Console output of a run: progress on a terminal and in a log, and one line for each evaluation."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from tltrain.core.output import escape, notebook, progress, wrapping

LOG_S = 60.0
"""Seconds between two lines about progress in a log."""
_WIDEST = len("    head   / loss 1.234 4,686 img/s 10:22:30 left, run 12:22:30 ")
"""Columns of a progress bar beside the bar itself and the numbers of steps."""
METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "map": "mAP", "f1_macro": "F1", "loss": "loss"}


class Terminal(RichConsole):
    """Rich's console with control characters in text escaped. Only rich's own control codes reach the terminal.

    In a notebook too it writes text to its file: rich would show each line as HTML of its own, tables several times, and nothing in files.
    """

    def __init__(self, **arguments: Any) -> None:
        plain = {"force_terminal": False, "color_system": None} if notebook.in_notebook() else {}
        super().__init__(force_jupyter=False, **{**arguments, **plain})

    def print(self, *objects: Any, **arguments: Any) -> None:
        """As rich does. A text alone is broken by `wrapping`: at spaces, on a terminal, and nowhere else."""
        if len(objects) == 1 and isinstance(objects[0], str):
            width = wrapping.width_of(self.file)
            objects = (objects[0] if width is None else wrapping.fitted(objects[0], width),)
            arguments = {**arguments, "soft_wrap": True}
        super().print(*objects, **arguments)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape.terminal(segment.text), segment.style)


class Console:
    """Prints on the main process. On the other processes every method does nothing.

    On a terminal a status line and a progress bar move, in a notebook a line of the cell. In a log, lines with the time stand in their
    place: one as a long work begins, and one a minute while it goes on.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.notebook = notebook.Line() if notebook.in_notebook() else None
        self.rich = Terminal(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.status: Status | None = None
        self.stage = _Stage()
        self.said_at = clock()  # when the last line about progress was printed
        self.later: Mapping[str, float] = {}
        self.hidden: frozenset[str] = frozenset()

    @property
    def moves(self) -> bool:
        """Whether something is shown that changes in place. In a log nothing does."""
        return self.rich.is_terminal or self.notebook is not None

    def expect(self, later: Mapping[str, float], hide_top5: bool) -> None:
        """later: seconds that are expected behind each stage, by name, for the ETA of the run."""
        self.later, self.hidden = later, frozenset({"top5"} if hide_top5 else ())

    @contextlib.contextmanager
    def doing(self, text: str, log: bool = True) -> Iterator[None]:
        """Say what a step before training does, and how far it is. log: in a log too, as it begins; there it is heard of once a minute."""
        if log and self.enabled and not self.moves:
            self._log(text)
        self.busy(text)
        try:
            with progress.heard_by(lambda how_far: self.busy(f"{text}: {how_far}" if how_far else text)):
                yield
        finally:
            self.busy(None)

    def busy(self, text: str | None) -> None:
        """Show a temporary status line, for slow steps. None removes it. In a log it is a line a minute."""
        if not self.enabled:
            return
        if self.notebook is not None:
            self.notebook.clear() if text is None else self.notebook.show(escape.line(text))
            return
        if not self.rich.is_terminal:
            if text is None or clock() - self.said_at >= LOG_S:
                self._log(text)
            return
        line = Text(escape.line(text or ""), no_wrap=True, overflow="ellipsis")
        if text is None and self.status is not None:
            self.status.stop()
        elif text is not None and self.status is not None:
            self.status.update(line)
        elif text is not None:
            self.status = self.rich.status(line)
            self.status.start()
        self.status = self.status if text is not None else None

    def _log(self, text: str | None) -> None:
        """A line with the time, and the next in a minute. None: only the latter."""
        self.said_at = clock()
        if text is not None:
            self.say(f"{time.strftime('%H:%M:%S')}  {escape.line(text)}")

    def say(self, text: str, style: str | None = None) -> None:
        """Print text. Markup in it is not interpreted."""
        if self.enabled:
            self.rich.print(text, style=style, markup=False)

    def show(self, renderable: Any) -> None:
        """Print one of rich's renderables, such as a table, wrapped to the width of the terminal."""
        if self.enabled:
            self.rich.print(renderable, soft_wrap=False, crop=False)  # a path that is wider than the terminal stays whole

    def show_plan(self, table: Any) -> None:
        """Print the plan of a run. Within `one_plan` only that of the first."""
        shown = _plans.get()
        if not shown:
            self.show(table)
        if shown is not None:
            shown.append(True)

    def open_stage(self, name: str, step: int, num_steps: int) -> None:
        """Start the progress of a stage at `step`: a bar on a terminal."""
        self.stage, self.said_at = _Stage(name, step, step, num_steps, clock()), clock()
        if self.enabled and self.rich.is_terminal:
            room = max(4, min(28, self.rich.width - _WIDEST - 2 * len(str(num_steps))))
            columns = (
                TextColumn("{task.description:>8}"), BarColumn(bar_width=room), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TextColumn("{task.fields[left]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.rich, transient=True)
            self.task = self.bar.add_task(name, completed=step, total=num_steps, figures="", left="")
            self.bar.start()

    def step(self) -> None:
        """Advance the progress by one step."""
        self.stage.step += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, left=self.stage.left(self.later))
        elif self.enabled and (self.notebook is not None or clock() - self.said_at >= LOG_S):
            s = self.stage
            text = "  ".join(filter(None, (f"{s.name:>8}", f"step {s.step:,}/{s.num_steps:,}", s.figures, s.left(self.later))))
            self._log(text) if self.notebook is None else self.notebook.show(text.strip(), s.step / s.num_steps)

    def figures(self, loss: float, images_per_s: float) -> None:
        """Show the loss and the throughput beside the progress."""
        self.stage.figures = f"loss {loss:.3f} {images_per_s:,.0f} img/s"
        if self.bar is not None:
            self.bar.update(self.task, figures=self.stage.figures)

    def evaluation(self, row: dict[str, Any], num_epochs: float) -> None:
        """Print one line: stage, epoch, metrics, and whether they are the best so far."""
        parts = []
        for key, name in METRIC_NAMES.items():
            value = row.get(key)
            if value is not None and key not in self.hidden:
                parts.append(f"{name} {value:.4f}" if key == "loss" or math.isnan(value) else f"{name} {100 * value:.1f} %")
        parts += ["best"] if row.get("best") else []
        digits = 1 if num_epochs >= 1 else 2  # of --smoke it is a part of one
        begin = f"{row['stage']:>8}  epoch {row['epoch']:5.{digits}f}/{f'{num_epochs:.{digits}f}'.removesuffix('.0')}"
        wide = "  ".join((begin, *parts))
        line = wide if len(wide) <= self.rich.width else " ".join((begin, *parts))
        self.say(line) if self.moves else self._log(line)

    def close_stage(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.notebook is not None:
            self.notebook.clear()


@contextlib.contextmanager
def one_plan() -> Iterator[None]:
    """Inside, runs that differ in their images alone, such as folds, print one plan: that of the first."""
    if _plans.get():
        yield  # folds of which each begins with a race: all of that was shown with the first
        return
    before = _plans.set([])
    try:
        yield
    finally:
        _plans.reset(before)


_plans: ContextVar[list[bool] | None] = ContextVar("_plans", default=None)
"""One for each plan that was asked for within `one_plan`."""


@dataclass
class _Stage:
    """How far the stage has come that trains now."""

    name: str = ""
    first: int = 0
    """The step that this start began with."""
    step: int = 0
    num_steps: int = 0
    began: float = 0.0
    figures: str = ""

    def left(self, later: Mapping[str, float]) -> str:
        """How long the stage will take, at the speed of this start, and the run with what is expected behind it."""
        if self.step <= self.first:
            return ""
        seconds = (clock() - self.began) / (self.step - self.first) * (self.num_steps - self.step)
        return f"{brief(seconds)} left" + (f", run {brief(seconds + later[self.name])}" if later.get(self.name) else "")


def brief(seconds: float) -> str:
    """A duration in few characters: 48 s, 3:20, 2:05:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def duration(seconds: float) -> str:
    """A duration for a person: 12 s, 3 min 04 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """A size in bytes for a person: 512 B, 1.5 KB, 3.2 GB. Decimal units, three digits."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def clock() -> float:
    """Seconds of a monotonic clock."""
    return time.monotonic()
