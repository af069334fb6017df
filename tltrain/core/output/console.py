"""Console output of a run: a progress bar on a terminal, and one line for each evaluation."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.status import Status

from tltrain.core.output import escape

METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "f1_macro": "F1", "loss": "loss"}


class Terminal(RichConsole):
    """Rich's console with control characters in text escaped. Only rich's own control codes reach the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape.terminal(segment.text), segment.style)


class Console:
    """Prints on the main process. On the other processes every method does nothing."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.rich = Terminal(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.status: Status | None = None

    def busy(self, text: str | None) -> None:
        """Show a temporary status line on a terminal, for slow steps before training. None removes it."""
        if self.enabled and self.rich.is_terminal:
            if text is None and self.status is not None:
                self.status.stop()
            elif text is not None and self.status is not None:
                self.status.update(text)
            elif text is not None:
                self.status = self.rich.status(text)
                self.status.start()
            self.status = self.status if text is not None else None

    def say(self, text: str, style: str | None = None) -> None:
        """Print text. Markup in it is not interpreted."""
        if self.enabled:
            self.rich.print(text, style=style, markup=False)

    def show(self, renderable: Any) -> None:
        """Print one of rich's renderables, such as a table."""
        if self.enabled:
            self.rich.print(renderable)

    def open_stage(self, name: str, step: int, num_steps: int) -> None:
        """Start the progress bar of a stage at `step`, on a terminal."""
        if self.enabled and self.rich.is_terminal:
            columns = (
                TextColumn("{task.description:>8}"), BarColumn(bar_width=28), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TextColumn("ETA"), TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.rich, transient=True)
            self.task = self.bar.add_task(name, completed=step, total=num_steps, figures="")
            self.bar.start()

    def step(self) -> None:
        """Advance the progress bar by one step."""
        if self.bar is not None:
            self.bar.advance(self.task)

    def figures(self, loss: float, images_per_s: float) -> None:
        """Show the loss and the throughput beside the progress bar."""
        if self.bar is not None:
            self.bar.update(self.task, figures=f"loss {loss:.4f}  {images_per_s:,.0f} images/s")

    def evaluation(self, row: dict[str, Any], num_epochs: float) -> None:
        """Print one line: stage, epoch, metrics, and whether they are the best so far."""
        parts = [f"{row['stage']:>8}  epoch {row['epoch']:5.1f}/{num_epochs:.3g}"]
        for key, name in METRIC_NAMES.items():
            value = row.get(key)
            if value is not None:
                parts.append(f"{name} {value:.4f}" if key == "loss" or math.isnan(value) else f"{name} {100 * value:5.1f} %")
        self.say("  ".join(parts) + ("  best" if row.get("best") else ""))

    def close_stage(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


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
