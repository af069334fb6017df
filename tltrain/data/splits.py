"""Cuts val and test out of train: stratified, by seed, and never through a group."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import cast

import numpy as np

from tltrain.core import registry
from tltrain.core.errors import UserError, some
from tltrain.core.paths import data_root
from tltrain.core.recipe import Data
from tltrain.data.dataset import DataSplits, Indexed, Source, SourceKind, Split
from tltrain.data.sampler import key, shuffled

TINY = 5
"""A class with fewer training images than this is worth a note."""


def split(source: Source, spec: Data) -> DataSplits:
    """Train, val and test of a source. A split that the source declares is taken as it is; the others are cut out of train.

    Raises UserError if train, or a split that is asked for, would be empty.
    """
    train = np.flatnonzero(source.declared == "train")
    parts: dict[str, np.ndarray] = {}
    for name, fraction in (("test", spec.test_fraction), ("val", spec.val_fraction)):
        parts[name] = np.flatnonzero(source.declared == name)
        if len(parts[name]) == 0 and fraction > 0:
            leaves = cut(source.labels[train], source.groups[train], fraction, key(spec.seed, name))
            parts[name], train = train[leaves], train[~leaves]
            if len(parts[name]) == 0:
                raise _too_few(source, spec, train, name)
    notes = [*source.notes, *_tiny(source, train, parts)]
    if spec.per_class is not None:
        train = train[keep_per_class(source.labels[train], spec.per_class, key(spec.seed, "per_class"))]
    return _data_splits(source, {"train": train, **parts}, notes)


def assign(source: Source, names: Sequence[str], to_train: bool) -> DataSplits:
    """As `split`, with the splits given and not drawn. names: (N,) of each sample; one in no split has another name.

    to_train: raises UserError if a class has no training image.
    """
    name_N = np.array(names, dtype=object)
    parts = {name: np.flatnonzero(name_N == name) for name in ("train", "test", "val")}
    notes = [*source.notes, *(_tiny(source, parts["train"], {n: parts[n] for n in ("test", "val")}) if to_train else ())]
    return _data_splits(source, parts, notes)


def split_names(images: DataSplits) -> list[str]:
    """(N,) the split of each sample of the source; empty for one in none."""
    assert images.source is not None
    name_of = {int(number): s.name for s in (images.train, images.val, images.test) if s is not None for number in s.index}
    return [name_of.get(number, "") for number in images.source.numbers.tolist()]


def _data_splits(source: Source, parts: dict[str, np.ndarray], notes: list[str]) -> DataSplits:
    notes = [*notes, *_twins(source, parts)]
    splits = {name: _split(source, name, samples) for name, samples in parts.items()}
    return DataSplits(
        source.classes, splits["train"], splits["val"] if len(parts["val"]) else None, splits["test"] if len(parts["test"]) else None,
        _fingerprint(source, parts), tuple(notes), source.in_memory, source,
    )  # fmt: skip


def _too_few(source: Source, spec: Data, train: np.ndarray, name: str) -> UserError:
    """What to say where train has no image to give. The remedy names each split that would be refused next."""
    fractions = {"test": spec.test_fraction, "val": spec.val_fraction}
    num_groups = len(np.unique(source.groups[train]))
    also = name == "test" and spec.val_fraction > 0 and not (source.declared == "val").any()
    also = also and not cut(source.labels[train], source.groups[train], spec.val_fraction, key(spec.seed, "val")).any()
    none = "data.test_fraction and data.val_fraction" if also else f"data.{name}_fraction"
    return UserError(
        f"{spec.source}: {name}_fraction = {fractions[name]:g} of {len(train)} images in {num_groups} groups leaves no image for {name}; "
        f"add images or smaller groups, or set {none} to 0"
    )


def cut(label_N: np.ndarray, group_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask (N,) of the samples that leave: close to `fraction` of each class, whole groups only, some of every class left behind.

    Groups are tried in an order drawn by `seed`; one leaves if that brings the class counts closer to what is wanted. A class of two
    samples or more gives at least one, if its groups allow.
    """
    leaves = np.zeros(len(label_N), dtype=bool)
    count_K = np.bincount(label_N)
    wanted_K = np.where(count_K > 1, np.clip(fraction * count_K, 1, np.maximum(count_K - 1, 1)), 0).tolist()
    room_K = (count_K - 1).tolist()
    taken_K = [0] * len(count_K)
    labels = label_N.tolist()  # plain integers: numpy is slow one by one
    for members in _groups(group_N, seed):
        counts = Counter([labels[i] for i in members])
        gain = sum(abs(wanted_K[c] - taken_K[c]) - abs(wanted_K[c] - taken_K[c] - n) for c, n in counts.items())
        if gain > 0 and all(taken_K[c] + n <= room_K[c] for c, n in counts.items()):
            leaves[members] = True
            for c, n in counts.items():
                taken_K[c] += n
    return leaves


def keep_per_class(label_N: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Positions, in order, of at most `num` samples of each class, drawn by `seed`."""
    order = shuffled(seed, len(label_N))
    kept = [order[label_N[order] == c][:num] for c in np.unique(label_N)]
    return np.sort(np.concatenate(kept))


def _groups(group_N: np.ndarray, seed: int) -> Iterator[list[int]]:
    """The positions of each group, groups in an order drawn by `seed`."""
    by_group = np.argsort(group_N, kind="stable")
    ends = np.flatnonzero(np.diff(group_N[by_group], append=group_N.max() + 1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    positions = by_group.tolist()
    for i in shuffled(seed, len(ends)):
        yield positions[starts[i] : ends[i]]


def _split(source: Source, name: str, samples: np.ndarray) -> Split:
    numbers = source.numbers[samples]
    return Split(name, source.labels[samples], tuple(source.ids[i] for i in samples), numbers, Indexed(source.read, numbers))


def _tiny(source: Source, train: np.ndarray, parts: dict[str, np.ndarray]) -> list[str]:
    """Notes on classes that have few images to train on, or none to evaluate on. Raises UserError if train misses a class."""
    count_K = np.bincount(source.labels[train], minlength=len(source.classes))
    absent = [name for name, n in zip(source.classes, count_K, strict=True) if n == 0]
    if absent:
        raise UserError(f"no readable training image of class {some(absent)}; add some, or take the class out of every split")
    notes = []
    few = [f"{name} ({n})" for name, n in zip(source.classes, count_K, strict=True) if n < TINY]
    if few:
        notes.append(f"classes with fewer than {TINY} training images: {some(few)}")
    for split_name in ("val", "test"):
        here = set(source.labels[parts[split_name]].tolist())
        missing = [name for c, name in enumerate(source.classes) if c not in here]
        if here and missing:
            notes.append(f"{split_name} has no image of class {some(missing)}")
    return notes


def _twins(source: Source, parts: dict[str, np.ndarray]) -> list[str]:
    """A note on byte-identical images that are in more than one split."""
    if not source.digests:
        return []
    first: dict[str, tuple[str, int]] = {}
    pairs = []
    for name, samples in parts.items():
        for i in samples.tolist():
            other, j = first.setdefault(source.digests[i], (name, i))
            if other != name:
                pairs.append(f"{source.ids[j]} ({other}) = {source.ids[i]} ({name})")
    return [f"{len(pairs)} byte-identical images are in two splits, which flatters the result: {some(pairs)}"] if pairs else []


def _fingerprint(source: Source, parts: dict[str, np.ndarray]) -> str:
    state = hashlib.blake2b(source.fingerprint.encode(), digest_size=16)
    for name, samples in parts.items():
        state.update(name.encode() + source.numbers[samples].astype("<i8").tobytes())
    return state.hexdigest()


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
