"""`tltrain.fit`: as the command, for a folder, or for a list of files and their labels."""

from __future__ import annotations

import csv
import io
import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from tltrain.analysis.probe.command import asked_source
from tltrain.api.run import Run
from tltrain.core import files
from tltrain.core.errors import UserError, some
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.data.multilabel.label_sets import SEPARATOR
from tltrain.fitting.fit import RUN, Wanted
from tltrain.fitting.fit import fit as choose_and_train
from tltrain.runs.links import check_links
from tltrain.runs.run_dir import outcome

SUFFIX = ".images.csv"
"""Suffix of the table of listed images. It lies beside the folder of the fit, and begins with the folder's name."""
SETS = (list, tuple, set, frozenset)
"""How an image's labels are given where it may have several."""
Label = str | SupportsIndex


def fit(
    images: str | Path | Sequence[str | Path],
    labels: Sequence[Label | Collection[Label]] | None = None,
    *,
    minutes: float = 10.0,
    backbones: Sequence[str] = (),
    folder: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    label_separator: str | None = None,
    label_columns: Sequence[str] | None = None,
) -> Run:
    """Choose a recipe for your images, say why, and train it, as `tltrain fit` does. Returns the run: `metrics`, `predict`, `model`.

    images: a folder of class folders, or a list of files. labels: the class of each file, strings or whole numbers; a class is called by
        its text. Where a file may have several labels, a list of them for each file, [] for none. They are kept as a table beside the
        folder, and split into train, val and test.
    minutes: time that it may take, about. backbones: NAME or NAME=WEIGHTS; none for those that are on this machine.
    folder: where everything is kept; None for runs/NAME-fit. The same call again goes on where it stopped. seed: of folds, order and new
        weights. workers: data workers; None for the processor cores, 0 for none.
    label_separator: of a table, or of strings in `labels`, where images have several labels: what parts them, such as | in cat|dog.
        label_columns: or a table's columns of 1 and 0, one for each label.
    Raises UserError for images that cannot be trained on, if the run fails, and if it was stopped (Ctrl-C) before there is a run.
    """
    listed: list[str | Path] = [] if isinstance(images, str | Path) else [*images]
    if isinstance(images, str | Path):
        if labels is not None:
            raise UserError(
                f"images is {str(images)!r}, one path, and labels are given; give a list of files with them, or a folder without"
            )
        source = asked_source(str(images), Console(enabled=False))
        name = Path(source.partition(":")[2] or source).stem or "pictures"
    else:
        source, name = "", "pictures"
    where = Path("runs") / f"{files.short_name(name)}-fit" if folder is None else Path(folder)
    if not source:
        label_separator = _separator(labels, label_separator, label_columns)
        source = f"csv:{_write_table(where, _table(listed, labels, label_separator))}"
    columns = None if label_columns is None else tuple(label_columns)
    wanted = Wanted(source, where, minutes, tuple(backbones), seed, label_separator=label_separator, label_columns=columns)
    ended = choose_and_train(wanted, RunFlags(workers=workers), Console(enabled=True))
    path = where / RUN
    if ended == "failed":
        raise UserError(f"the run failed: {outcome(path).get('error', 'see its output')}")
    if ended == "stopped" and not (path / "recipe.yaml").is_file():
        raise UserError("stopped before the run began; the same call goes on")
    return Run(path)


def _separator(labels: Sequence[Any] | None, given: str | None, columns: Sequence[str] | None) -> str | None:
    """What parts the labels of a file in the table. None: each has one class. Raises UserError where it is not clear which of the two."""
    if columns is not None:
        raise UserError(
            f"label_columns is {list(columns)}, columns of a table, and images is a list of files; give a list of labels for each file"
        )
    is_set = [isinstance(label, SETS) for label in (() if labels is None else labels)]
    if not any(is_set):
        return given
    assert labels is not None
    if not all(is_set):
        alone, several = is_set.index(False), is_set.index(True)
        raise UserError(
            f"labels[{several}] is {labels[several]!r} and labels[{alone}] is {labels[alone]!r}; where a file may have several labels, "
            "give a list for each file, [] for none of them"
        )
    return SEPARATOR if given is None else given


def _table(images: list[Any], labels: Sequence[Any] | None, mark: str | None) -> str:
    """The files and their classes as a CSV table. mark: what parts several labels. Raises UserError for what cannot be trained on."""
    if labels is None:
        raise UserError(f"images is a list of {len(images):,} files and labels is missing; give the class of each file, in the same order")
    names = [_cell(i, label, mark) for i, label in enumerate(labels)]
    if len(images) != len(names):
        raise UserError(f"there are {len(images):,} images and {len(names):,} labels; give one label for each image, in the same order")
    classes = {name.strip() for text in names for name in (text.split(mark) if mark else [text])} - {""}
    if len(classes) < 2:
        what = f"all {len(names):,} labels are {''.join(classes)!r}" if names else "there are no images"
        raise UserError(f"{what}, and a network learns to tell classes apart; give two or more")
    paths = [_path(i, image) for i, image in enumerate(images)]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"{len(missing):,} of {len(paths):,} images are not there: {some(missing)}; relative paths begin at {os.getcwd()}")
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        if (other := first.setdefault(path, i)) != i:
            raise UserError(f"images[{i}] and images[{other}] are the same file, {path}; give each image once")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "label"), *zip(paths, names, strict=True)])
    return text.getvalue()


def _cell(index: int, label: Any, mark: str | None) -> str:
    """The class of a file, or of several labels its set, in one order, whatever theirs is."""
    if not isinstance(label, SETS):
        return "" if mark is not None and isinstance(label, str) and not label else _label(index, label)
    names = sorted(_label(index, name) for name in label)
    if len(set(names)) < len(names):
        raise UserError(f"labels[{index}] is {label!r}, which names a label twice; name each once")
    assert mark is not None, "lists are parted by something"
    if any(mark in name for name in names):
        raise UserError(f"labels[{index}] is {label!r}, and {mark!r} parts the labels of a file; rename what has it in it")
    return mark.join(names)


def _label(index: int, label: Any) -> str:
    if isinstance(label, str):
        name = str(label)
    else:
        try:
            name = str(operator.index(label))  # ints of NumPy and of torch too
        except TypeError:
            name = ""
    if isinstance(label, bool) or not name or not _can_be_kept(name):
        raise UserError(f"labels[{index}] is {label!r}; a label is a whole number, or a text without spaces around it")
    return name


def _path(index: int, image: Any) -> str:
    if not isinstance(image, str | os.PathLike):
        raise UserError(f"images[{index}] is a {type(image).__name__}; give the paths of files")
    path = os.path.abspath(os.path.expanduser(os.fspath(image)))
    if not _can_be_kept(path):
        raise UserError(f"images[{index}] is {path!r}, which no table can hold; rename the file")
    return path


def _can_be_kept(text: str) -> bool:
    """Whether a CSV table preserves a text: reading strips surrounding spaces, expects UTF-8, and refuses NUL."""
    return text == text.strip() and "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _write_table(folder: Path, table: str) -> Path:
    """Write the table beside the folder of the fit, and return its path. Raises UserError if a table of other images is there."""
    beside = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))  # `.` has no name
    file = beside.with_name(f"{beside.name}{SUFFIX}")
    try:
        if file.exists() and file.read_text(encoding="utf-8") != table:
            raise UserError(f"{file} lists other images or labels than these; choose another folder, or delete it and {folder}")
        if not file.exists():
            check_links(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(file, table)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be written or read: {error}; choose another folder") from error
    return file
