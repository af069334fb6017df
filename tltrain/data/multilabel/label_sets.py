"""Sets of classes as they stand in tables, and as a matrix of ones and zeros. A set is written by its classes in order: cat|dog."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data

SEPARATOR = "|"
"""Between the classes of a set that no table writes."""
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


def separator(spec: Data) -> str:
    """What stands between two classes of a set in a listing."""
    return spec.label_separator or SEPARATOR


def names_in(label: str, spec: Data) -> list[str]:
    """The classes that a label of a listing names: itself, or of several labels an image those of its set."""
    if not spec.multilabel:
        return [label]
    return label.split(separator(spec)) if label else []


def set_in_cell(cell: str, mark: str, place: str) -> str:
    """The set that a cell names, its classes sorted. An empty cell: none of the classes. place: of the cell, for messages.

    Raises UserError for an empty name between two marks, and for a class that is named twice.
    """
    names = [name.strip() for name in cell.split(mark)] if cell else []
    if "" in names:
        raise UserError(
            f"{place}: label is {cell!r}, with nothing before or behind a {mark!r}; write each class once, with one between two"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{place}: label is {cell!r}, which names a class twice; name each class once")
    return mark.join(sorted(names))


def set_as_listed(cell: str, spec: Data, place: str) -> str:
    """The set that a cell of another table names, as the source's own listing writes it. Arguments and errors as of `set_in_cell`."""
    text, order = set_in_cell(cell, separator(spec), place), list(spec.label_columns or ())
    names = names_in(text, spec)
    return separator(spec).join(sorted(names, key=lambda name: order.index(name) if name in order else len(order)))


def set_in_columns(cells: Sequence[str], columns: Sequence[str], place: str) -> str:
    """The set that a line of ones and zeros names, one cell for each column. Raises UserError for a cell that is neither."""
    names = []
    for name, cell in zip(columns, cells, strict=True):
        if cell.lower() not in YES + NO:
            raise UserError(f"{place}: column {name} is {cell!r}; it must be 1 for an image of this class, and 0 for another")
        if cell.lower() in YES:
            names.append(name)
    return SEPARATOR.join(names)


def classes_of(sets: Sequence[str], spec: Data) -> tuple[str, ...]:
    """The classes: the recipe's columns, or those that the sets name, sorted. Raises UserError for a name with SEPARATOR in it."""
    if spec.label_columns is not None:
        return spec.label_columns
    names = sorted({name for text in sets for name in names_in(text, spec)})
    if unclear := next((name for name in names if SEPARATOR in name), None):
        raise UserError(f"label {unclear!r} has a {SEPARATOR} in it, which parts the labels of a set in what a run writes; rename it")
    return tuple(names)


def matrix(sets: Sequence[str], classes: Sequence[str], spec: Data) -> np.ndarray:
    """(S, K) uint8: 1 where a set holds a class."""
    number_of = {name: k for k, name in enumerate(classes)}
    out_SK = np.zeros((len(sets), len(classes)), dtype=np.uint8)
    for s, text in enumerate(sets):
        out_SK[s, [number_of[name] for name in names_in(text, spec)]] = 1
    return out_SK


def written(label_NK: np.ndarray, classes: Sequence[str]) -> list[str]:
    """(N,) the set of each row as text, its classes sorted, such as cat|dog. Empty: none of the classes."""
    different_SK, which_N = np.unique(label_NK, axis=0, return_inverse=True)
    # Sorted: runs whose classes stand in another order write one set alike.
    texts = [SEPARATOR.join(sorted(name for name, has in zip(classes, row, strict=True) if has)) for row in different_SK.tolist()]
    return [texts[s] for s in which_N.ravel().tolist()]


def check_known(spec: Data, of_source: bool) -> None:
    """Raise UserError where a recipe of several labels meets a source without them (not `of_source`)."""
    if spec.multilabel and not of_source:
        kind = spec.source.partition(":")[0]
        raise UserError(
            f"data.label_separator and data.label_columns are of tables (csv:FILE), and {kind}{':PATH' if ':' in spec.source else ''} has "
            "one class an image; leave them out, or list its images in a table"
        )
