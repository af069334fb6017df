"""answers.jsonl: what a run answers under each corruption. The first line says what was asked, each further one is a pass over the images.

A pass is added when it is done. So a measurement that was stopped goes on where it was, and a torn last line is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.data.corruptions.views import Cell
from tltrain.runs import manifest


@dataclass
class Measured:
    """The answers of a run under corruptions."""

    folder: Path
    about: Mapping[str, Any]
    """What the answers depend on: weights, images, size, seed, the version of the corruptions."""
    ids: tuple[str, ...]
    """(N,) of the images, in the order of the answers."""
    label: np.ndarray
    """(N,) int64. Of several labels an image: its set as text, such as cat|dog."""
    predicted: dict[Cell, np.ndarray] = field(default_factory=dict)
    """(N,) as `label`, of each pass that was made."""
    group: np.ndarray | None = None
    """(N,) int64, the group of each image, as `evaluation.metrics.Predictions.group`."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.label.dtype.kind == "U"

    def right(self, cell: Cell) -> np.ndarray:
        """(N,) bool: of several labels, whether all are right."""
        right_N: np.ndarray = self.predicted[cell] == self.label
        return right_N

    def write(self) -> None:
        """Begin the file anew, with the passes that there are. It is not covered by the manifest until `seal`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest.uncover(self.folder.parent, list(self.folder.iterdir()))
        head = {"about": self.about, "ids": self.ids, "label": self.label.tolist()}
        lines = [json.dumps(head), *(_line(cell, predicted_N) for cell, predicted_N in self.predicted.items())]
        files.write_atomic(answers_file(self.folder), "".join(f"{line}\n" for line in lines))

    def add(self, cell: Cell, predicted_N: np.ndarray) -> None:
        """Add a pass to the file, and wait until it is on the disk."""
        self.predicted[cell] = predicted_N
        with answers_file(self.folder).open("a", encoding="utf-8") as file:
            file.write(_line(cell, predicted_N) + "\n")
        files.sync(answers_file(self.folder))

    def seal(self) -> None:
        """Cover all files of the folder by the manifest of the run."""
        manifest.cover(self.folder.parent, sorted(self.folder.iterdir()))


def answers_file(folder: Path) -> Path:
    return folder / "answers.jsonl"


def _line(cell: Cell, predicted_N: np.ndarray) -> str:
    return json.dumps({"corruption": cell.name, "severity": cell.severity, "predicted": predicted_N.tolist()})


def read(folder: Path) -> Measured | None:
    """What a folder holds. None if it holds nothing. Raises UserError for a damaged file."""
    path = answers_file(folder)
    if not path.is_file():
        return None
    manifest.check(path)
    head, *lines = files.read_text(path).split("\n")
    try:
        first = json.loads(head)
        ids, label_N = tuple(first["ids"]), np.array(first["label"])
        measured = Measured(folder, first["about"], ids, label_N)
        for line in lines[:-1]:  # what stands behind the last line's end is a torn write, or nothing
            row = json.loads(line)
            measured.predicted[Cell(row["corruption"], row["severity"])] = np.array(row["predicted"])
        if any(
            said_N.shape != (len(ids),) or said_N.dtype.kind != label_N.dtype.kind for said_N in [label_N, *measured.predicted.values()]
        ):
            raise ValueError("a pass has another number of images, or other answers")
        return measured
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to measure anew") from error
