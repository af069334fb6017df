"""`tltrain predict`: prints predictions for files as a table, as JSON or as CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rich.progress import track
from rich.table import Table
from rich.text import Text

from tltrain.core.errors import some
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.data.pictures.warned import recorded
from tltrain.evaluation.predict import BATCH, Prediction, find_files, predict
from tltrain.evaluation.trained import load_trained

Form = Literal["table", "json", "csv"]


def predict_files(run: Path, paths: Sequence[str], form: Form, top: int, batch: int = BATCH) -> bool:
    """Predict the class of each file, and write the rows to standard output. Returns whether any file could be read. Raises UserError.

    paths: files, folders, or - for paths from standard input. On a terminal, standard error shows a progress bar.
    """
    trained = load_trained(run)
    files = find_files(paths, sys.stdin)
    bar, out = Terminal(stderr=True), sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="surrogateescape")  # file names that are not valid UTF-8 keep their bytes
    predictions = predict(trained, files, top, batch)
    rows = _Counted(track(predictions, "predict", len(files), console=bar, transient=True, disable=not bar.is_terminal))
    with recorded() as warned:
        if form == "json":
            write_json(rows, out)
        elif form == "csv":
            write_csv(rows, out, min(top, len(trained.classes)))
        else:
            shown = table(rows)
            Terminal(file=out, highlight=False).print(shown)
    if warned:
        files_said = some([f"{file} ({said})" for file, said in warned.items()])
        print(escape.line(f"note    {len(warned)} of {len(files)} files are read with a warning of Pillow: {files_said}"), file=sys.stderr)
    return rows.num_read > 0


@dataclass
class _Counted:
    """Iterates over predictions and counts those of readable images."""

    predictions: Iterable[Prediction]
    num_read: int = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self.predictions:
            self.num_read += prediction.problem is None
            yield prediction


def write_json(predictions: Iterable[Prediction], out: IO[str]) -> None:
    """One array, an object a line: {"path", "label", "confidence", "top": [{"label", "confidence"}], "problem"}."""
    out.write("[")
    for number, prediction in enumerate(predictions):
        out.write(("\n" if number == 0 else ",\n") + json.dumps(_plain(prediction)))
        out.flush()
    out.write("\n]\n")


def _plain(p: Prediction) -> dict[str, Any]:
    top = [{"label": name, "confidence": share} for name, share in p.top]
    return {"path": p.id, "label": p.label, "confidence": p.confidence, "top": top, "problem": p.problem}


def write_csv(predictions: Iterable[Prediction], out: IO[str], top: int) -> None:
    """path, label, confidence, label_2, confidence_2, ..., problem. Names are as they are, and escaped on a terminal."""
    names = escape.terminal if out.isatty() else str
    writer = csv.writer(out, lineterminator="\n")
    others = [f"{name}_{i}" for i in range(2, top + 1) for name in ("label", "confidence")]
    writer.writerow(["path", "label", "confidence", *others, "problem"])
    for p in predictions:
        cells = [cell for name, share in p.top for cell in (escape.csv_cell(names(name)), f"{share:.6f}")] or [""] * (2 * top)
        writer.writerow([escape.csv_cell(names(p.id)), *cells, escape.csv_cell(names(p.problem or ""))])
        out.flush()


def table(predictions: Iterable[Prediction]) -> Table:
    """A table with one line for each file: its class, the confidence, and the next classes."""
    out = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for head in ("file", "class", "sure", "then"):
        out.add_column(head, justify="right" if head == "sure" else "left", overflow="fold")
    for p in predictions:
        if p.problem is not None:
            out.add_row(_text(p.id), Text("cannot be read", style="red"), "", _text(p.problem))
            continue
        (label, share), *others = p.top
        then = ", ".join(f"{name} {100 * s:.1f}" for name, s in others)
        out.add_row(_text(p.id), _text(label, "bold"), f"{100 * share:.1f} %", _text(then, "dim"))
    return out


def _text(name: str, style: str = "") -> Text:
    return Text(escape.line(name), style=style)
