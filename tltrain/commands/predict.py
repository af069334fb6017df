"""`tltrain predict`: prints predictions for files as a table, as JSON or as CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.progress import track
from rich.text import Text

from tltrain.core.errors import UserError, some
from tltrain.core.output import escape, streams, wrapping
from tltrain.core.output.console import Terminal
from tltrain.data.pictures.warned import recorded
from tltrain.evaluation.evaluate import PLAIN, Asked
from tltrain.evaluation.predict import BATCH, Prediction, find_files, predict
from tltrain.evaluation.promises.fitted import Wanted, rules_for
from tltrain.evaluation.trained import load_trained
from tltrain.runs.report.formatting import plural

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
    asked = rules_for(run, wanted, lambda text: wrapping.say(escape.line(text), sys.stderr), batch)
    bar, out = Terminal(stderr=True), sys.stdout
    streams.say_all()  # file names that are not valid UTF-8 keep their bytes
    if form == "csv" and not out.isatty():
        streams.write_names()
    predictions = predict(trained, files, top, batch, asked)
    rows = _Counted(track(predictions, "predict", len(files), console=bar, transient=True, disable=not bar.is_terminal))
    with recorded() as warned:
        several = trained.card.thresholds is not None  # of several labels each has a probability of its own
        columns = Columns(min(top, len(trained.classes)), trained.classes if all_shares or several else (), asked, several)
        if form == "json":
            write_json(rows, out, columns)
        elif form == "csv":
            write_csv(rows, out, columns)
        else:
            terminal = Terminal(file=out, highlight=False)
            for text in table(rows, wrapping.width_of(out), columns.classes):
                terminal.print(text, soft_wrap=True)
    if warned:
        files_said = some([f"{file} ({said})" for file, said in warned.items()])
        wrapping.note(f"{len(warned)} of {len(files)} files are read with a warning of Pillow: {files_said}")
    for line in rows.lines(asked):
        wrapping.say(line, sys.stderr)
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
            parts += [plural(self.decisions["stranger"], "stranger")] if asked.strangers is not None else []
            lines.append("answers " + ", ".join(parts))
        if self.sizes:
            mean = sum(size * num for size, num in self.sizes.items()) / self.num_read
            lines.append(f"sets    {mean:.2f} classes in the mean, of one class {self.sizes[1]:,} of {self.num_read:,}")
        return lines


@dataclass(frozen=True)
class Columns:
    """What a line of the CSV, or an object of the JSON, holds beside path and problem."""

    top: int
    """Classes that are named, each with its confidence."""
    classes: tuple[str, ...] = ()
    """Those of the run, where the probability of each is given: in a column `p:CLASS`."""
    asked: Asked = PLAIN
    labels: bool = False
    """Whether an image may have several labels: a column `labels`, a JSON list as of a set, stands in place of the classes."""

    def heads(self) -> Iterator[str]:
        """The names of the columns in between."""
        if self.labels:
            yield from ("labels", *(f"p:{name}" for name in self.classes))
            return
        yield from ("label", "confidence")
        yield from (f"{name}_{i}" for i in range(2, self.top + 1) for name in ("label", "confidence"))
        yield from self.fitted()
        yield from (f"p:{name}" for name in self.classes)

    def fitted(self) -> Iterator[str]:
        """The names of those that rest on rules fitted on val."""
        yield from ["set"] if self.asked.sets else []
        yield from ["strangeness"] if self.asked.strangers is not None else []
        yield from ["decision"] if self.asked.abstentions or self.asked.strangers is not None else []

    def cells(self, p: Prediction) -> Iterator[str]:
        """What stands in them for one image. A set is a JSON list, the most probable class first: no name of a class can break it."""
        if p.labels is not None:
            yield json.dumps(p.labels, ensure_ascii=False)
        else:
            for name, share in p.top:
                yield from (name, f"{share:.6f}")
        yield from [json.dumps(p.set, ensure_ascii=False)] if p.set is not None else []
        yield from [f"{p.strangeness:.4f}"] if p.strangeness is not None else []
        yield from [p.decision] if p.decision is not None else []
        if self.classes and p.shares is not None:
            yield from (f"{share:.6f}" for share in p.shares.tolist())


def write_json(predictions: Iterable[Prediction], out: IO[str], columns: Columns) -> None:
    """One array, an object a line, all with the same keys: path, label, confidence, top (each a label and its confidence), problem.

    Where they were asked for also set, strangeness, decision, and probabilities by class. Of several labels: path, labels, top, problem,
    probabilities. What a file that cannot be read does not have is null, and its top is empty.
    """
    out.write("[")
    for number, prediction in enumerate(predictions):
        out.write(("\n" if number == 0 else ",\n") + json.dumps(_plain(prediction, columns)))
        out.flush()
    out.write("\n]\n")


def _plain(p: Prediction, columns: Columns) -> dict[str, Any]:
    plain: dict[str, Any] = {"path": p.id}
    plain |= {"labels": p.labels} if columns.labels else {"label": p.label, "confidence": p.confidence}
    plain |= {"top": [{"label": name, "confidence": share} for name, share in p.top], "problem": p.problem}
    plain |= {name: getattr(p, name) for name in columns.fitted()}
    if columns.classes:
        plain["probabilities"] = None if p.shares is None else dict(zip(columns.classes, p.shares.tolist(), strict=True))
    return plain


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


GAP = 2
SHRINKS = (("files", 24), ("others", 12), ("files", 16), ("others", 0), ("answers", 8), ("files", 2))
"""Columns down to which the parts of a line shrink in turn: paths first, then the next classes, class names last."""


class Line(NamedTuple):
    """One image in the table."""

    file: str
    answer: str
    """The class, or `cannot be read`."""
    withheld: str = ""
    """Why the class is no answer: `abstains`, `none of these`. Empty for an answer."""
    sure: str = ""
    others: tuple[str, ...] = ()
    """The next classes with their shares, or those of its set."""
    problem: str = ""

    @property
    def said(self) -> str:
        """The answer as it stands in its column."""
        return f"{self.withheld} ({self.answer}?)" if self.withheld else self.answer


def table(predictions: Iterable[Prediction], width: int | None, classes: Sequence[str] = ()) -> Iterator[Text]:
    """One line for each file: its class, the confidence, and the next classes, below a line of heads.

    width: columns of the terminal, which no line is wider than: long paths lose their middle, then the next classes are counted instead of
    named, and class names are cut last. None: nothing is cut, as for a pipe. classes: those of a run of several labels an image.
    """
    rows = [_line(p, classes) for p in predictions]
    sets = any(p.others and p.others[0].startswith("set:") for p in rows)
    head = Line("file", "class", sure="sure", others=("then",) if any(p.others for p in rows) and not sets else ())
    files, answers, sures, others = _widths([head, *rows], width)
    for row in (head, *rows):
        file = _padded(_middle_cut(row.file, files), files)
        if row.problem:
            problem = row.problem if width is None else _cut(row.problem, max(0, width - files - len(row.answer) - 2 * GAP))
            yield Text.assemble(file, " " * GAP, (row.answer, "red"), " " * GAP, problem)
            continue
        shown = Text(_cut(row.answer, answers), "bold")
        if row.withheld:
            room = answers - len(row.withheld) - len(" (?)")
            maybe = f" ({_cut(row.answer, room)}?)" if room > 1 else ""
            shown = Text.assemble((_cut(row.withheld, answers), "yellow"), (maybe, "dim"))
        shown.pad_right(max(0, answers - shown.cell_len))
        text = Text.assemble(file, " " * GAP, shown, " " * GAP, row.sure.rjust(sures), " " * GAP, (_as_fit(row.others, others), "dim"))
        text.rstrip()
        yield Text.assemble(text, style="bold") if row is head else text


def _line(p: Prediction, classes: Sequence[str]) -> Line:
    file = escape.line(p.id)
    if p.problem is not None:
        return Line(file, "cannot be read", problem=escape.line(p.problem))
    (label, share), *rest = p.top
    others = tuple(f"{escape.line(name)} {100 * s:.1f}" for name, s in rest)
    if p.set is not None:
        first, *more = map(escape.line, p.set)
        others = (f"set: {first}", *more)
    if p.labels is not None and p.shares is not None:
        rest, share_of = [(name, s) for name, s in p.top if name not in p.labels], dict(zip(classes, p.shares.tolist(), strict=True))
        sure = ", ".join(f"{100 * share_of[name]:.1f}" for name in p.labels)
        named = ", ".join(map(escape.line, p.labels)) or "none of them"
        return Line(file, named, "", sure, tuple(f"{escape.line(name)} {100 * s:.1f}" for name, s in rest))
    withheld = {"stranger": "none of these", "abstains": "abstains"}.get(p.decision or "", "")
    return Line(file, escape.line(label), withheld, f"{100 * share:.1f} %", others)


def _widths(rows: Sequence[Line], width: int | None) -> list[int]:
    """Columns of files, answers, confidences and other classes."""
    told = [row for row in rows if not row.problem]
    files, answers = max(cell_len(row.file) for row in rows), max(cell_len(row.said) for row in told)
    sures, others = max(len(row.sure) for row in told), max(cell_len(", ".join(row.others)) for row in told)
    if width is None:
        return [files, answers, sures, others]
    parts = {"files": files, "answers": answers, "others": others}
    over = sum(parts.values()) + sures + 3 * GAP - width
    for name, least in SHRINKS:
        take = max(0, min(over, parts[name] - least))
        parts[name], over = parts[name] - take, over - take
    return [parts["files"], parts["answers"], sures, parts["others"]]


def _as_fit(names: Sequence[str], width: int) -> str:
    """The names with commas between them; those for which there is no room are counted: cat 12.1, dog 3.0, +3."""
    for num in range(len(names), -1, -1):
        text = ", ".join([*names[:num], *([f"+{len(names) - num}"] if num < len(names) else [])])
        if cell_len(text) <= width:
            return text
    return ""


def _padded(text: str, width: int) -> str:
    return text + " " * max(0, width - cell_len(text))


def _cut(text: str, width: int) -> str:
    """The beginning of a text that is wider than so many columns."""
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)).rstrip() + "\u2026" * (width > 0)


def _middle_cut(path: str, width: int) -> str:
    """A path without its middle: its end stays, with the whole name if there is room, and what there is room for of its beginning."""
    if cell_len(path) <= width:
        return path
    begin = width - 2 - cell_len(path.rsplit("/", 1)[-1])
    begin = begin if begin > 4 else 0
    end = path
    while end and cell_len(end) > width - 1 - begin:
        end = end[1:]
    return set_cell_size(path, begin) + "\u2026" + end
