"""The output of a probe: on the terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tltrain.analysis.at_hand import AtHand
from tltrain.analysis.probe.judge import NEIGHBOURS, Probed, ProbeRow
from tltrain.core.output import escape, wrapping
from tltrain.core.output.console import Console, duration, size

HEADS = {"ridge": "ridge regression", "logistic": "logistic regression", "nearest_mean": "the nearest class mean"}


@dataclass(frozen=True)
class _Name:
    """A backbone's name, which may be NAME=FILE: broken behind its words where its column is too narrow."""

    name: str

    def __rich_measure__(self, console: RichConsole, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(cell_len, wrapping.name_parts(self.name)), default=0), cell_len(self.name))

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(wrapping.fitted_name(self.name, options.max_width)), overflow="fold")


def table(probed: Probed) -> Table:
    """The rows, the best first, in 80 columns."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    shown.add_column("backbone", overflow="fold", min_width=14)
    for name in ("mAP %" if probed.ask.several else "right %", "95 %", "to best", "95 %", f"{NEIGHBOURS} NN", "ms", "param.", "store"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in probed.rows:
        shown.add_row(_Name(escape.line(row.name)), *figures(row), style=None if row.as_good else "dim")
    return shown


def figures(row: ProbeRow) -> list[str]:
    """The figures of a row as text: accuracy and its interval, difference and its interval, neighbours, ms, parameters, store."""
    best = row.difference == row.difference_low == row.difference_high == 0
    return [
        f"{100 * row.accuracy:.1f}",
        f"{100 * row.low:.1f}-{100 * row.high:.1f}",
        "" if best else f"{100 * row.difference:+.1f}",
        "" if best else f"{100 * row.difference_low:+.1f}..{100 * row.difference_high:+.1f}",
        f"{100 * row.neighbours:.1f}",
        f"{1000 * row.image_s:.3g}",
        f"{row.num_parameters / 1e6:.3g} M",
        size(row.row_bytes) if row.row_bytes else "none",
    ]


def measured(probed: Probed) -> list[str]:
    """An explanation of each figure, one sentence each."""
    ask = probed.ask
    which, what = "every image" if ask.everything else "train and val", "mAP, the mean over labels" if ask.several else "right"
    return [
        f"{what}: by {HEADS[ask.head]} on the features; {probed.num_images:,} images ({which}) in {ask.k} folds, each judged once, "
        f"by a head that never saw its fold; the heads took {duration(sum(row.solve_s for row in probed.rows))}",
        f"to best: the difference on the same images (bootstrap over them). {NEIGHBOURS} NN: the vote of the nearest images of other folds",
        "time in ms: one image in the network, the median of passes of 1 image and of a few, whichever is less; store: bytes an image",
    ]


def verdict(probed: Probed) -> list[str]:
    """The best, what is as good and cheaper, and what saying always the same gives."""
    best, knee = probed.rows[0], probed.knee
    between = f"{100 * best.low:.1f} to {100 * best.high:.1f}"
    if probed.ask.several:
        said = f"mAP {100 * best.accuracy:.1f} % on {probed.num_images:,} images ({between}); a random order of {probed.num_classes} labels"
    else:
        said = f"{100 * best.accuracy:.1f} % of {probed.num_images:,} images are right ({between}); always saying the most frequent of "
        said += f"{probed.num_classes} classes"
    lines = [f"{best.name}: {said} gives {100 * probed.baseline:.1f} %."]
    if knee is not best:
        lines.append(
            f"{knee.name} may be as good ({100 * knee.difference:+.1f} points, {100 * knee.difference_low:+.1f} to "
            f"{100 * knee.difference_high:+.1f}) and takes {1000 * knee.image_s:.3g} of {1000 * best.image_s:.3g} ms an image."
        )
    return lines


def say(probed: Probed, here: AtHand | None, console: Console) -> None:
    """Print the table, what it says, and what could not be looked at. here: the search for backbones, where none was named."""
    console.say("")
    console.show(table(probed))
    console.say("")
    for line in measured(probed):
        console.say(f"  {line}", style="dim")
    for line in verdict(probed):
        console.say(line, style="bold")
    if probed.problems:
        console.say(f"left    could not be judged, and why stands above: {', '.join(probed.problems)}", style="yellow")
    for name, how in (here.absent if here is not None else {}).items():
        console.say(f"absent  {name} is not on this machine; get it: {how}", style="dim")
    if here is not None and here.more:
        console.say(f"more    here, and not looked at (name them with --backbones): {', '.join(here.more)}", style="dim")


def as_json(probed: Probed, here: AtHand | None) -> dict[str, Any]:
    """Everything, as plain values."""
    rows = [{key: value for key, value in asdict(row).items() if key != "judged"} | {"as_good": row.as_good} for row in probed.rows]
    return {
        "source": probed.ask.source,
        "images": probed.num_images,
        "classes": probed.num_classes,
        "figure": "map" if probed.ask.several else "accuracy",
        "baseline": probed.baseline,
        "folds": probed.ask.k,
        "head": probed.ask.head,
        "rows": rows,
        "knee": probed.knee.name,
        "problems": probed.problems,
        "notes": list(probed.notes),
        "absent": here.absent if here is not None else {},
        "more": list(here.more) if here is not None else [],
    }
