"""The source webdataset:GLOB: tar shards in which files of one name are one sample, such as 07.jpg and 07.cls."""

from __future__ import annotations

import json
from pathlib import Path

from tltrain.core.errors import UserError, some
from tltrain.core.files import open_regular
from tltrain.core.recipe import Data
from tltrain.data.containers.archives import members
from tltrain.data.containers.contents import Contents, Extent, cached_contents
from tltrain.data.containers.packed import from_packed, numbers_first, of_contents
from tltrain.data.containers.several import files_of, names_of, splits_of, with_progress
from tltrain.data.dataset import Source, SourceKind

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
KEYS = ("label", "cls", "class", "class_name", "target", "category")
"""Where a .json says the class, by the first of these keys that it has."""
MOST_BYTES = 2**20
"""The largest .cls or .json that is read."""


def open_webdataset(argument: str | None, spec: Data) -> Source:
    """Open tar shards. Raises UserError for one that is damaged or compressed, and for a sample without a class."""
    files = files_of(argument, "webdataset", (".tar",))
    origin = f"webdataset:{argument}"
    names = names_of(files)
    splits, notes = splits_of(names, f"data.source is {origin}")
    shards = [cached_contents(file, "webdataset", look_through) for file in with_progress(files)]
    images = [
        image
        for file, name, split, shard in zip(files, names, splits, shards, strict=True)
        for image in of_contents(shard, name, file, split)
    ]
    return from_packed(images, origin, spec, (*notes, *_notes(shards)), numbers_first([image.listed.label for image in images]))


def look_through(file: Path) -> Contents:
    """The images of a shard with their classes. Raises UserError for a damaged shard, an image without a class, and two of one sample."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    alone: set[str] = set()
    with open_regular(file) as opened:
        for member in members(file):
            folder, slash, last = member.name.rpartition("/")
            key, _, suffix = last.partition(".")
            key, suffix = f"{folder}{slash}{key}", suffix.lower()
            if not member.isfile() or last.startswith("."):
                continue
            alone.add(key)
            if suffix in IMAGES:
                if key in images:
                    raise UserError(f"{file}: sample {key} has two images, {images[key][0]} and {member.name}; a sample has one")
                images[key] = (member.name, member.offset_data, member.size)
            elif suffix in LABELS and (suffix == "cls" or key not in labels):  # .cls counts where there are both
                opened.seek(member.offset_data)
                labels[key] = _label(file, member.name, suffix, opened.read(min(member.size, MOST_BYTES))) or labels.get(key, "")
    missing = [name for key, (name, _, _) in images.items() if not labels.get(key)]
    if missing:
        of = f"{len(missing):,} of {len(images):,} images"
        needs = f"each needs a .cls with its number or name, or a .json with one of the keys {', '.join(KEYS)}"
        raise UserError(f"{file}: {of} have no class, such as {some(missing[:3])}; {needs}")
    if not images:
        raise UserError(f"{file} holds no image ({' '.join(f'.{suffix}' for suffix in IMAGES)}); is it a shard of images?")
    extents = tuple(Extent(name, start, length, labels[key]) for key, (name, start, length) in images.items())
    return Contents(file, extents, tuple(sorted(alone - set(images))))


def _label(file: Path, name: str, suffix: str, content: bytes) -> str:
    """The class that a .cls or a .json says; empty: it says none. Raises UserError if it cannot be read."""
    try:
        text = content.decode("utf-8-sig").strip()
        if suffix == "cls":
            return text
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {name} cannot be read as {'text' if suffix == 'cls' else 'JSON'}: {error}") from error
    known = {str(key).lower(): said for key, said in value.items()} if isinstance(value, dict) else {}
    said = next((known[key] for key in KEYS if key in known), None)
    if isinstance(said, bool) or not isinstance(said, str | int):
        return ""
    try:
        str(said).encode()
    except UnicodeEncodeError as error:  # JSON may write half of a pair, \ud800
        raise UserError(f"{file}: {name} names a class that is no text: {said!r}") from error
    return str(said).strip()


def _notes(shards: list[Contents]) -> tuple[str, ...]:
    """A note on the samples without an image; a shard keeps their names as its notes."""
    names = [name for shard in shards for name in shard.notes]
    return (f"{len(names):,} samples without an image are passed over: {some(names)}",) if names else ()


WEBDATASET = SourceKind(lambda argument, spec, root: open_webdataset(argument, spec), argument="GLOB")
