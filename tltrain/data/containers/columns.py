"""Finds the image and class columns of a table, by types, metadata and names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Data

IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo", "image_bytes", "bytes")
LABELS = ("label", "class", "target", "category", "class_name", "label_name", "labels", "cls", "y")
NEEDED = "pip install 'tltrain[parquet]'"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used."""

    image: str
    label: str
    split: str = ""
    group: str = ""
    """Empty: the table has no such column."""
    classes: tuple[str, ...] = ()
    """Class names of the numbers in the column `label` (ClassLabel of Hugging Face). Empty: the table has none."""

    def names(self) -> list[str]:
        return [name for name in (self.image, self.label, self.split, self.group) if name]


def find_columns(schema: Any, spec: Data, place: str) -> Columns:
    """The columns of a table with this schema of pyarrow. Raises UserError where they are missing, or where several may be meant.

    place: the file or data set, in messages.
    """
    features = _features(schema)
    images = [field.name for field in schema if _holds_bytes(field.type)]
    marked = [name for name in images if _kind(features, name) == "Image"]
    has = f"{place} has the columns {some(schema.names)}"
    image = _chosen(schema.names, spec.image_column, "image_column", place) or _one(
        marked or images, IMAGES, has, "image_column", "holds images (bytes, or bytes with a path)"
    )
    if image not in images:
        raise UserError(f"{place}: column {image} holds {schema.field(image).type}; images are bytes, or bytes with a path")
    classed = [name for name in schema.names if _kind(features, name) == "ClassLabel"]
    named = [name for name in schema.names if name.casefold() in LABELS and name != image]
    label = _chosen(schema.names, spec.label_column, "label_column", place) or _one(
        classed or named, LABELS, has, "label_column", "is called like a class"
    )
    kind = schema.field(label).type
    if not any(word in str(kind) for word in ("int", "string")) or str(kind).startswith(("list", "large_list", "fixed_size", "struct")):
        raise UserError(f"{place}: column {label} holds {kind}; the class of an image is one number or one text")
    by_name = {name.casefold(): name for name in schema.names}
    classes = features.get(label, {}).get("names", ()) if _kind(features, label) == "ClassLabel" else ()
    return Columns(image, label, by_name.get("split", ""), by_name.get("group", ""), tuple(classes))


def classes_of(values: Sequence[Any], columns: Columns, place: str, first: int) -> Iterator[str | None]:
    """The class of each row; None for -1, which stands for an image whose class is not told. Raises UserError, with the row.

    values: of the label's column. first: the row of the first of them.
    """
    for row, value in enumerate(values, first):
        if value is None or str(value).strip() == "":
            raise UserError(f"{place}, row {row}: {columns.label} is empty; every image needs a class")
        if value == -1:
            yield None
        elif columns.classes and isinstance(value, int):
            if not 0 <= value < len(columns.classes):
                raise UserError(
                    f"{place}, row {row}: {columns.label} is {value}, and the table names {len(columns.classes)} classes, from 0"
                )
            yield columns.classes[value]
        else:
            yield str(value).strip()


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's metadata of the columns. Empty for other tables."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: dict[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _holds_bytes(kind: Any) -> bool:
    text = str(kind)
    if text.startswith("struct<"):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return text in ("binary", "large_binary", "binary_view")


def _chosen(names: Sequence[str], given: str | None, key: str, place: str) -> str | None:
    """The column that the recipe names, in whatever case. Raises UserError if there is none."""
    if given is None:
        return None
    by_name = {name.casefold(): name for name in names}
    if given.casefold() not in by_name:
        near = get_close_matches(given.casefold(), by_name, n=1)
        hint = f"did you mean {by_name[near[0]]}?" if near else f"it has {some(names)}"
        raise UserError(f"data.{key} is {given!r}, and {place} has no such column; {hint}")
    return by_name[given.casefold()]


def _one(found: Sequence[str], usual: Sequence[str], has: str, key: str, what: str) -> str:
    """The one column that is meant: the only one, or the only one with the most usual name. Raises UserError."""
    if len(found) == 1:
        return found[0]
    called = sorted((usual.index(name.casefold()), name) for name in found if name.casefold() in usual)
    if called and (len(called) == 1 or called[0][0] != called[1][0]):
        return called[0][1]
    if not found:
        raise UserError(f"{has}, none of which {what}; name it with data.{key}")
    raise UserError(f"{has}, and any of {some(found)} may be meant; name it with data.{key}, such as --data.{key} {found[0]}")
