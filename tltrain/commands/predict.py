"""`tltrain predict`: prints predictions for files as a table, as JSON or as CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rich.progress import track
from rich.table import Table
from rich.text import Text

from tltrain.core.errors import UserError, some
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.data.pictures.warned import recorded
from tltrain.evaluation.evaluate import PLAIN, Asked
from tltrain.evaluation.predict import BATCH, Prediction, find_files, predict
from tltrain.evaluation.promises.fitted import Wanted, rules_for
from tltrain.evaluation.trained import load_trained

Form = Literal["table", "json", "csv"]
NOTHING = Wanted()


def predict_files(
    run: Path, paths: Sequence[str], form: Form, top: int, batch: int = BATCH, wanted: Wanted = NOTHING, all_shares: bool = False
) -> bool:
    """Predict the class of each file, and write the rows to standard output. Returns whether any file could be read. Raises UserError.

    paths: files, folders, or - for paths from standard input. On a terminal, standard error shows a progress bar.
    wanted: sets, thresholds and views. all_shares: the probability of every class too, in CSV and JSON.
    """
    if all_shares and form == "table":
        raise UserError("--probabilities are too wide for a table; add --csv or --json")
    wanted.check()
    for name, value in (("top", top), ("batch", batch)):  # before val is answered, if it has to be
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    trained = load_trained(run)
    files = find_files(paths, sys.stdin)
    asked = rules_for(run, wanted, lambda text: print(escape.line(text), file=sys.stderr), batch)
    bar, out = Terminal(stderr=True), sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="surrogateescape")  # file names that are not valid UTF-8 keep their bytes
    predictions = predict(trained, files, top, batch, asked)
    rows = _Counted(track(predictions, "predict", len(files), console=bar, transient=True, disable=not bar.is_terminal))
    with recorded() as warned:
        if form == "json":
            write_json(rows, out, trained.classes if all_shares else ())
        elif form == "csv":
            columns = Columns(min(top, len(trained.classes)), trained.classes if all_shares else (), asked)
            write_csv(rows, out, columns)
        else:
            shown = table(rows)
            Terminal(file=out, highlight=False).print(shown)
    if warned:
        files_said = some([f"{file} ({said})" for file, said in warned.items()])
        print(escape.line(f"note    {len(warned)} of {len(files)} files are read with a warning of Pillow: {files_said}"), file=sys.stderr)
    for line in rows.lines(asked):
        print(line, file=sys.stderr)
    return rows.num_read > 0


@dataclass
class _Counted:
    """Iterates over predictions and counts those of readable images, what became of their answers, and the sizes of their sets."""

    predictions: Iterable[Prediction]
    num_read: int = 0
    decisions: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self.predictions:
            self.num_read += prediction.problem is None
            if prediction.decision is not None:
                self.decisions[prediction.decision] += 1
            if prediction.set is not None:
                self.sizes[len(prediction.set)] += 1
            yield prediction

    def lines(self, asked: Asked) -> list[str]:
        """The summary."""
        lines = []
        if self.decisions:
            parts = [f"{self.decisions['answers']:,} of {self.num_read:,} images answered"]
            parts += [f"abstains on {self.decisions['abstains']:,}"] if asked.abstentions else []
            parts += [f"{self.decisions['stranger']:,} strangers"] if asked.strangers is not None else []
            lines.append("answers " + ", ".join(parts))
        if self.sizes:
            mean = sum(size * num for size, num in self.sizes.items()) / self.num_read
            lines.append(f"sets    {mean:.2f} classes in the mean, of one class {self.sizes[1]:,} of {self.num_read:,}")
        return lines


def write_json(predictions: Iterable[Prediction], out: IO[str], classes: Sequence[str] = ()) -> None:
    """One array, an object a line: {"path", "label", "confidence", "top": [{"label", "confidence"}], "problem"}.

    Where they were asked for also "set", "strangeness", "decision", and "probabilities" by class. classes: those of the run, for the last.
    """
    out.write("[")
    for number, prediction in enumerate(predictions):
        out.write(("\n" if number == 0 else ",\n") + json.dumps(_plain(prediction, classes)))
        out.flush()
    out.write("\n]\n")


def _plain(p: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    top = [{"label": name, "confidence": share} for name, share in p.top]
    plain: dict[str, Any] = {"path": p.id, "label": p.label, "confidence": p.confidence, "top": top, "problem": p.problem}
    for name in ("set", "strangeness", "decision"):
        if (value := getattr(p, name)) is not None:
            plain[name] = value
    if classes and p.shares is not None:
        plain["probabilities"] = dict(zip(classes, p.shares.tolist(), strict=True))
    return plain


@dataclass(frozen=True)
class Columns:
    """What a line of the CSV holds beside path and problem."""

    top: int
    """Classes that are named, each with its confidence."""
    classes: tuple[str, ...] = ()
    """Those whose probability stands in a column `p:CLASS`."""
    asked: Asked = PLAIN

    def heads(self) -> Iterator[str]:
        """The names of the columns in between."""
        yield from ("label", "confidence")
        yield from (f"{name}_{i}" for i in range(2, self.top + 1) for name in ("label", "confidence"))
        yield from ["set"] if self.asked.sets else []
        yield from ["strangeness"] if self.asked.strangers is not None else []
        yield from ["decision"] if self.asked.abstentions or self.asked.strangers is not None else []
        yield from (f"p:{name}" for name in self.classes)

    def cells(self, p: Prediction) -> Iterator[str]:
        """What stands in them for one image. A set is a JSON list, the most probable class first: no name of a class can break it."""
        for name, share in p.top:
            yield from (name, f"{share:.6f}")
        yield from [json.dumps(p.set, ensure_ascii=False)] if p.set is not None else []
        yield from [f"{p.strangeness:.4f}"] if p.strangeness is not None else []
        yield from [p.decision] if p.decision is not None else []
        if self.classes and p.shares is not None:
            yield from (f"{share:.6f}" for share in p.shares.tolist())


def write_csv(predictions: Iterable[Prediction], out: IO[str], columns: Columns) -> None:
    """path, label, confidence, label_2, confidence_2, ..., what else was asked for, problem. Names are escaped on a terminal."""
    names = escape.terminal if out.isatty() else str
    writer = csv.writer(out, lineterminator="\n")
    heads = list(columns.heads())
    writer.writerow(["path", *(escape.csv_cell(names(head)) for head in heads), "problem"])
    for p in predictions:
        cells = [escape.csv_cell(names(cell)) for cell in columns.cells(p)] or [""] * len(heads)
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
        if p.set is not None:
            then = "set: " + ", ".join(p.set)
        said = _text(label, "bold")
        if p.decision not in (None, "answers"):
            said = Text.assemble(Text("none of these" if p.decision == "stranger" else "abstains", "yellow"), _text(f" ({label}?)", "dim"))
        out.add_row(_text(p.id), said, f"{100 * share:.1f} %", _text(then, "dim"))
    return out


def _text(name: str, style: str = "") -> Text:
    return Text(escape.line(name), style=style)
