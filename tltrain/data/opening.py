"""From data.source to an open data set. What a source can be stands in tltrain/registry.py."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import cast

from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.paths import data_root
from tltrain.core.recipe import Data
from tltrain.data.dataset import DataSplits, SourceKind
from tltrain.data.splits import split


def outline_images(spec: Data, root: Path | None = None) -> DataSplits:
    """As open_images, for a plan: nothing is downloaded, and a known data set that is absent is planned with its published numbers."""
    kind, argument = _find(spec.source)
    source = None if kind.outline is None else kind.outline(argument, spec, root or data_root())
    return open_images(spec, root) if source is None else split(source, spec)


def open_images(spec: Data, root: Path | None = None) -> DataSplits:
    """The data set that a recipe names, read through once and split.

    root: where downloads lie; by default TLTRAIN_DATA, else the user's cache folder.
    Raises UserError for a data set that cannot be trained on.
    """
    kind, argument = _find(spec.source)
    return split(kind.open(argument, spec, root or data_root()), spec)


def _find(source: str) -> tuple[SourceKind, str | None]:
    """The kind, and what stands behind the colon. Raises UserError for an unknown kind, and for one with too much or too little."""
    name, colon, argument = source.partition(":")
    known = registry.names("sources")
    if name in known and bool(colon) == bool(_kind(name).argument):
        return _kind(name), argument if colon else None
    forms = {_form(other): other for other in known}
    near = [form for form, other in forms.items() if other == name] or get_close_matches(source, forms, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it can be {', '.join(forms)}"
    raise UserError(f"data.source is {source!r}; {hint}")


def _kind(name: str) -> SourceKind:
    return cast(SourceKind, registry.find("sources", name, f"data.source is {name!r}"))


def _form(name: str) -> str:
    """How a recipe names a source of this kind; its name alone where another package's cannot be imported."""
    try:
        argument = _kind(name).argument
    except UserError:
        return name
    return f"{name}:{argument}" if argument else name
