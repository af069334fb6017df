"""Opens the pictures that a recipe names under distill.unlabelled, and keeps those apart that the data set has itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data, Recipe
from tltrain.data.dataset import NO_LABEL, DataSplits, Indexed, Source, Split, Unlabelled
from tltrain.data.splits import open_source, split_names
from tltrain.data.tables.texts import Texts
from tltrain.data.unlabelled.loose import open_unlabelled

OUT = "excluded"
"""Where a picture stands that data.exclude leaves out, as the splits are named."""


def beside(images: DataSplits, recipe: Recipe, outline: bool = False) -> DataSplits:
    """The data set with all pictures of distill.unlabelled, none left out yet. Raises UserError as opening a source does.

    Labels of their source are not read further, and what it declares as val or test is not taken. outline: as in `open_source`.
    What data.exclude leaves out of the data set is known to the result, for `apart`.
    """
    if recipe.distill is None or recipe.distill.unlabelled is None:
        return images
    named = recipe.distill.unlabelled
    try:
        source = open_unlabelled(named, recipe.data, outline)
    except UserError as error:
        said = str(error).replace("data.source is", "distill.unlabelled is")
        raise UserError(said if said.startswith("distill.unlabelled") else f"distill.unlabelled is {named}: {said}") from error
    at = np.flatnonzero(source.declared == "train")
    if not len(at):
        told = f"whose {len(source.ids):,} pictures are all declared as val or test there, and those are not taken"
        raise UserError(f"distill.unlabelled is {named}, {told}; give others, or leave it out")
    excluded = _excluded(images, recipe.data, named, outline)
    digests = _taken(source.digests, at)
    opened = Unlabelled(named, _split(source, at), source.fingerprint, digests, source.in_memory, source.notes, excluded)
    return replace(images, unlabelled=opened, in_memory=images.in_memory and opened.in_memory)


def apart(images: DataSplits, opened: Unlabelled | None, own: str) -> DataSplits:
    """The data set with the pictures that none of its own images is. A note says how many are left out, and where they stand.

    What test and val measure must be new to the student: a teacher's answer of a picture says nearly what its label does.
    own: data.source. Raises UserError where no picture is left.
    """
    if opened is None:
        return images
    place_N = np.array(list(_places(images, opened, own)), dtype=object)
    kept = np.flatnonzero(place_N == "")
    found = Counter(place_N.tolist())
    told = {"test": "of test", "val": "of val", "train": "that train has with their labels", OUT: "that data.exclude leaves out"}
    gone = [f"{found[name]:,} {what}" for name, what in told.items() if found[name]]
    num, source = len(opened.split), images.source
    if not len(kept):
        whose = f"distill.unlabelled is {opened.named}, whose {num:,} pictures are images of this data set ({', '.join(gone)})"
        raise UserError(f"{whose}; give others, or leave it out")
    state = hashlib.blake2b(opened.fingerprint.encode() + opened.split.source_index[kept].astype("<i8").tobytes(), digest_size=16)
    unlabelled = replace(opened, split=_part(opened.split, kept), digests=_taken(opened.digests, kept), fingerprint=state.hexdigest())
    note = f"{len(kept):,} pictures without labels from {opened.named}"
    note += f"; left out, as images of this data set: {', '.join(gone)}" if gone else ""
    if source is None or not (own == opened.named or _comparable(source, opened)):
        note += f"; whether some are images of val or test is not known, since {own} and they have no hashes of one kind"
    notes = (*images.notes, note, *(f"{opened.named}: {each}" for each in opened.notes))
    # Folds have stores of their own then: rows of all folds together would be of other pictures than these.
    return replace(images, unlabelled=unlabelled, notes=notes, in_memory=images.in_memory and opened.in_memory, shared=None)


def _places(images: DataSplits, opened: Unlabelled, own: str) -> Iterator[str]:
    """The split of the data set that each picture stands in, by its bytes or, of the same source, by its id. Empty: in none."""
    source, split = images.source, opened.split
    if source is None:
        yield from [""] * len(split)
        return
    rank = {"": 0, OUT: 1, "train": 2, "val": 3, "test": 4}
    by_digest, by_id = dict[str, str](), dict[str, str]()
    for i, (drawn, declared) in enumerate(zip(split_names(images), source.declared.tolist(), strict=True)):
        name = drawn or declared.replace("train", "")  # folds have what is declared as test in no split, and it stays unseen
        if _comparable(source, opened) and rank[name] > rank[by_digest.get(source.digests[i], "")]:
            by_digest[source.digests[i]] = name
        if own == opened.named and name:
            by_id[source.ids[i]] = name
    for i, digest in enumerate(opened.digests or [""] * len(split)):
        out = OUT if digest in opened.excluded or split.ids[i] in opened.excluded else ""
        yield max(by_digest.get(digest, ""), by_id.get(split.ids[i], ""), out, key=rank.__getitem__)


def _excluded(images: DataSplits, data: Data, named: str, outline: bool) -> frozenset[str]:
    """`Unlabelled.excluded`: what the source has and the open data set has not. Raises UserError as opening a source does."""
    if data.exclude is None or images.source is None:
        return frozenset()
    whole = open_source(data.model_copy(update={"exclude": None, "relabel": None, "max_unreadable": 1.0}), outline=outline)
    kept = set(images.source.ids)
    at = [i for i, name in enumerate(whole.ids) if name not in kept]
    names = [whole.ids[i] for i in at] if data.source == named else []
    return frozenset([*names, *(whole.digests[i] for i in at if len(whole.digests))])


def _comparable(source: Source, opened: Unlabelled) -> bool:
    """Whether both have hashes, and of the same parts of their files."""
    kinds = [digests[0][:1] == "~" for digests in (source.digests, opened.digests) if len(digests)]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _split(source: Source, at: np.ndarray) -> Split:
    numbers = source.numbers[at]
    labels = np.full(len(at), NO_LABEL, dtype=np.int64)
    return Split("unlabelled", labels, Texts.of(source.ids).take(at), numbers, Indexed(source.read, numbers))


def _part(split: Split, at: np.ndarray) -> Split:
    read = Indexed(split.read, at)
    return replace(split, labels=split.labels[at], ids=Texts.of(split.ids).take(at), source_index=split.source_index[at], read=read)


def _taken(texts: Sequence[str], at: np.ndarray) -> Sequence[str]:
    return Texts.of(texts).take(at) if len(texts) else ()
