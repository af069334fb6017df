"""From data.source to an open data set: the list of what a source can be."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from tltrain.data.arrays import open_cifar, open_digits, outline_cifar
from tltrain.data.folder import open_folder
from tltrain.data.images import Images, Source
from tltrain.data.places import data_root
from tltrain.data.printed import open_printed
from tltrain.data.splits import split
from tltrain.data.table import open_csv
from tltrain.errors import UserError
from tltrain.recipe import Data

NAMED: dict[str, Callable[[Path], Source]] = {
    "cifar10": lambda root: open_cifar("cifar10", root),
    "cifar100": lambda root: open_cifar("cifar100", root),
    "digits": lambda root: open_digits(),
    "printed": lambda root: open_printed(),
}
"""Sources that are a name alone; each takes the folder of downloads."""

AT_PATH: dict[str, Callable[[str, Data], Source]] = {"folder": open_folder, "csv": open_csv}
"""Sources written as KIND:PATH."""


def outline_images(spec: Data, root: Path | None = None) -> Images:
    """As open_images, for a plan: nothing is downloaded, and a known data set that is absent is planned with its published numbers."""
    if spec.source in ("cifar10", "cifar100"):
        source = outline_cifar(spec.source, root or data_root())
        if source is not None:
            return split(source, spec)
    return open_images(spec, root)


def open_images(spec: Data, root: Path | None = None) -> Images:
    """The data set that a recipe names, read through once and split.

    root: where downloads lie; by default TLTRAIN_DATA, else the user's cache folder.
    Raises UserError for a data set that cannot be trained on.
    """
    kind, colon, path = spec.source.partition(":")
    if colon and kind in AT_PATH:
        source = AT_PATH[kind](path, spec)
    elif spec.source in NAMED:
        source = NAMED[spec.source](root or data_root())
    else:
        known = [*NAMED, *(f"{name}:PATH" for name in AT_PATH)]
        near = get_close_matches(spec.source, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}"
        raise UserError(f"data.source is {spec.source!r}; {hint}")
    return split(source, spec)
