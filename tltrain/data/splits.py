"""Splits a source into train, val and test: stratified by class, seeded, groups kept whole. Opens the source that a recipe names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import cast

import numpy as np

from tltrain.core import registry
from tltrain.core.errors import LISTED, UserError, some
from tltrain.core.paths import data_root
from tltrain.core.schema.data import Data, without_secrets
from tltrain.data.dataset import DataSplits, Indexed, SharedImages, Source, SourceKind, Split, class_counts, corrected_source
from tltrain.data.multilabel.label_sets import check_known
from tltrain.data.multilabel.stratify import cut_label_sets, fold_label_sets, keep_of_each_label
from tltrain.data.sampler import derive_seed, first_of_each, groups_in_order, shuffled
from tltrain.data.tables.texts import Texts, same_as

TINY = 5
"""A class with fewer training images than this is reported."""


def split(source: Source, spec: Data, to_train: bool = True) -> DataSplits:
    """Train, val and test of a source. A split that the source declares is used as it is. The others are cut from train.

    With data.folds one fold of train plays test, and what the source declares as test is in no split.
    Images that data.exclude names are left out, and those of data.relabel have their new class.
    to_train: raise UserError as `_tiny` does. Also raised if a split with a fraction above 0 would be empty.
    """
    source = corrected_source(source, spec)
    train = np.flatnonzero(source.declared == "train")
    parts, fold_notes = dict[str, np.ndarray](), list[str]()
    if spec.folds is not None:
        train, parts["test"], fold_notes = _fold(source, spec, train)
    for name, fraction in (("test", spec.test_fraction), ("val", spec.val_fraction)):
        if name in parts:
            continue
        parts[name] = np.flatnonzero(source.declared == name)
        if len(parts[name]) == 0 and fraction > 0:
            leaves = cut(source.labels[train], source.groups[train], fraction, derive_seed(spec.seed, name))
            parts[name], train = train[leaves], train[~leaves]
            if len(parts[name]) == 0:
                raise _too_few(source, spec, train, name)
    notes = [*source.notes, *fold_notes, *(_tiny(source, train, parts) if to_train else ())]
    if spec.per_class is not None:
        train = train[keep_per_class(source.labels[train], spec.per_class, derive_seed(spec.seed, "per_class"))]
    images = _data_splits(source, {"train": train, **parts}, notes)
    # With per_class, folds together use few of the images: a store of all of them would mostly be of no use.
    return replace(images, shared=_shared(source)) if spec.folds is not None and spec.per_class is None else images


def _shared(source: Source) -> SharedImages:
    samples = {"all": np.flatnonzero(source.declared != "test")}
    return SharedImages(_split(source, "all", samples["all"]), _fingerprint(source, samples))


def _fold(source: Source, spec: Data, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(what is left of train, the fold that plays test, notes). Raises UserError if a fold would leave a class without training images."""
    assert spec.folds is not None
    label_N = source.labels[train]
    fold_N = folds(label_N, source.groups[train], spec.folds, derive_seed(spec.seed, "folds", spec.repeat))
    count_FK = np.stack([class_counts(label_N[fold_N == f], len(source.classes)) for f in range(spec.folds)])
    alone = [f"{name} ({n})" for name, n, most in zip(source.classes, count_FK.sum(0), count_FK.max(0), strict=True) if 0 < n == most]
    if alone:
        raise UserError(
            f"{spec.source}: all images of class {some(alone)} lie in one fold, since groups are never parted; the network that is tested "
            "on them would have seen none. Add images, or leave the class out (data.exclude)"
        )
    thin = [f"{name} ({n})" for name, n, least in zip(source.classes, count_FK.sum(0), count_FK.min(0), strict=True) if least == 0 < n]
    notes = [f"too few images or groups for {spec.folds} folds, so that some folds test none of class {some(thin)}"] if thin else []
    if num := int((source.declared == "test").sum()):
        notes.append(f"{num:,} images that the source declares as test are left out: a fold of train plays test, and they stay unseen")
    return train[fold_N != spec.fold], train[fold_N == spec.fold], notes


def assign(source: Source, names: Sequence[str], to_train: bool) -> DataSplits:
    """Build the splits from given assignments in place of random ones.

    names: (N,) the split of each sample. A sample with any other name belongs to no split.
    to_train: raise UserError if a class has no training image.
    """
    name_N = np.array(names, dtype=object)
    parts = {name: np.flatnonzero(name_N == name) for name in ("train", "test", "val")}
    notes = [*source.notes, *(_tiny(source, parts["train"], {n: parts[n] for n in ("test", "val")}) if to_train else ())]
    return _data_splits(source, parts, notes)


def split_names(images: DataSplits) -> list[str]:
    """The split of each sample of the source (N,). Empty for a sample that belongs to no split."""
    assert images.source is not None
    number_N = images.source.numbers
    order_N = np.argsort(number_N)
    name_N = np.full(len(number_N), "", dtype=object)
    for part in (images.train, images.val, images.test):
        if part is not None:
            name_N[order_N[np.searchsorted(number_N, part.source_index, sorter=order_N)]] = part.name
    return list(name_N)


def _data_splits(source: Source, parts: dict[str, np.ndarray], notes: list[str]) -> DataSplits:
    notes = [*notes, *_twins(source, parts)]
    splits = {name: _split(source, name, samples) for name, samples in parts.items()}
    return DataSplits(
        source.classes, splits["train"], splits["val"] if len(parts["val"]) else None, splits["test"] if len(parts["test"]) else None,
        _fingerprint(source, parts), tuple(notes), source.in_memory, source,
    )  # fmt: skip


def _too_few(source: Source, spec: Data, train: np.ndarray, name: str) -> UserError:
    """The error for a split that gets no image. The remedy names every fraction that has to be 0."""
    fractions = {"test": spec.test_fraction, "val": spec.val_fraction}
    num_groups = len(np.unique(source.groups[train]))
    also = name == "test" and spec.val_fraction > 0 and not (source.declared == "val").any()
    also = also and not cut(source.labels[train], source.groups[train], spec.val_fraction, derive_seed(spec.seed, "val")).any()
    none = "data.test_fraction and data.val_fraction" if also else f"data.{name}_fraction"
    return UserError(
        f"{spec.source}: {name}_fraction = {fractions[name]:g} of {len(train)} images in {num_groups} groups leaves no image for {name}; "
        f"add images or smaller groups, or set {none} to 0"
    )


def cut(label_N: np.ndarray, group_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask (N,) of the samples to cut from train: about `fraction` of each class, whole groups only, never all of a class.

    Groups are tried in a random order by `seed`. A group is cut if that brings the class counts closer to their targets. A class with
    two or more samples gives at least one, if its groups allow it. Several labels (N, K) are cut by their sets.
    """
    if label_N.ndim == 2:
        return cut_label_sets(label_N, list(groups_in_order(group_N, seed)), fraction)
    leaves: list[int] = []
    count_K = np.bincount(label_N)
    wanted_K = np.where(count_K > 1, np.clip(fraction * count_K, 1, np.maximum(count_K - 1, 1)), 0).tolist()
    room_K = (count_K - 1).tolist()
    taken_K = [0] * len(count_K)
    labels = label_N.tolist()
    by_group_N = np.argsort(group_N, kind="stable")
    if np.all(np.diff(group_N[by_group_N]) > 0):
        for c, wanted in enumerate(wanted_K):  # each image alone: by the same rule, and a million take a second
            while taken_K[c] < room_K[c] and abs(wanted - taken_K[c]) > abs(wanted - taken_K[c] - 1):
                taken_K[c] += 1
        return first_of_each(label_N, by_group_N[shuffled(seed, len(group_N))], taken_K)
    for members in groups_in_order(group_N, seed):
        counts = Counter([labels[i] for i in members])
        gain = sum(abs(wanted_K[c] - taken_K[c]) - abs(wanted_K[c] - taken_K[c] - n) for c, n in counts.items())
        if gain > 0 and all(taken_K[c] + n <= room_K[c] for c, n in counts.items()):
            leaves += members
            for c, n in counts.items():
                taken_K[c] += n
    mask_N = np.zeros(len(label_N), dtype=bool)
    mask_N[leaves] = True
    return mask_N


def folds(label_N: np.ndarray, group_N: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The fold (N,) int64 of each sample, 0 to k - 1, for k-fold cross-validation. A pure function of its arguments.

    Whole groups only, no fold is empty, and each class is spread as evenly as groups allow: where groups are single images, its counts
    in two folds, and the sizes of two folds, differ by at most 1. Large groups are placed first, in an order by `seed`, each where the
    parts of its classes are smallest. Raises UserError for fewer than 2 folds, and for more folds than groups.
    """
    num_groups = len(np.unique(group_N))
    if not 2 <= k <= num_groups:
        few = f"{len(label_N)} images make {num_groups} groups, and a group is never parted; give fewer folds"
        raise UserError(f"the data cannot be parted into {k} folds: {'give 2 or more' if k < 2 else few}")
    if label_N.ndim == 2:
        return fold_label_sets(label_N, list(groups_in_order(group_N, seed)), k)
    labels = label_N.tolist()
    groups = [(members, sorted(Counter([labels[i] for i in members]).items())) for members in groups_in_order(group_N, seed)]
    groups.sort(key=lambda group: (-len(group[0]), group[1][0][0]))  # stable, so that equal ones stay in their random order
    scale_K = [1 / max(n, 1) ** 2 for n in np.bincount(label_N).tolist()]  # a class of 5 weighs as much as one of 5,000
    count_FK = [[0] * len(scale_K) for _ in range(k)]
    fold_N, size_F = np.empty(len(label_N), dtype=np.int64), [0] * k
    for members, counts in groups:
        crowd_F = [sum(n * count_K[c] * scale_K[c] for c, n in counts) for count_K in count_FK]
        fold = min(range(k), key=list(zip(crowd_F, size_F, strict=True)).__getitem__)
        fold_N[members] = fold
        size_F[fold] += len(members)
        for c, n in counts:
            count_FK[fold][c] += n
    return fold_N


def keep_per_class(label_N: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Sorted positions of at most `num` samples of each class, drawn by `seed`; of several labels as `keep_of_each_label` does."""
    order = shuffled(seed, len(label_N))
    if label_N.ndim == 2:
        return keep_of_each_label(label_N, num, order.tolist())
    return np.sort(np.concatenate([order[label_N[order] == c][:num] for c in np.unique(label_N)]))


def _split(source: Source, name: str, samples: np.ndarray) -> Split:
    numbers = source.numbers[samples]
    return Split(name, source.labels[samples], Texts.of(source.ids).take(samples), numbers, Indexed(source.read, numbers))


def _tiny(source: Source, train: np.ndarray, parts: dict[str, np.ndarray]) -> list[str]:
    """Notes on classes with few training images or none to evaluate. Raises UserError for a class without images of train, or one class."""
    if len(source.classes) < 2:
        raise UserError(f"the images have {len(source.classes)} class ({', '.join(source.classes)}); training needs at least two")
    count_K = class_counts(source.labels[train], len(source.classes))
    if absent := [name for name, n in zip(source.classes, count_K, strict=True) if n == 0]:
        remedy = "; ".join(["add some, or take the class out of every split", *source.unreadable])
        raise UserError(f"no readable training image of class {some(absent)}; {remedy}")
    notes = []
    if few := [f"{name} ({n})" for name, n in zip(source.classes, count_K, strict=True) if n < TINY]:
        notes.append(f"classes with fewer than {TINY} training images: {some(few)}")
    for split_name in ("val", "test"):
        num_K = class_counts(source.labels[parts[split_name]], len(source.classes))
        if len(parts[split_name]) and (missing := [name for name, n in zip(source.classes, num_K, strict=True) if n == 0]):
            notes.append(f"{split_name} has no image of class {some(missing)}")
    return notes


def _twins(source: Source, parts: dict[str, np.ndarray]) -> list[str]:
    """A note on byte-identical images in different splits."""
    if not source.digests:
        return []
    names, i_M = list(parts), np.concatenate(list(parts.values()))
    part_M = np.repeat(np.arange(len(names)), [len(samples) for samples in parts.values()])
    first_M = same_as(Texts.of(source.digests).take(i_M))
    twins = np.flatnonzero(part_M[first_M] != part_M)
    if not len(twins):
        return []
    called = [(source.ids[i_M[k]], names[part_M[k]]) for k in twins[:LISTED].tolist()]
    others = [(source.ids[i_M[k]], names[part_M[k]]) for k in first_M[twins[:LISTED]].tolist()]
    pairs = [f"{other} ({place}) = {name} ({here})" for (other, place), (name, here) in zip(others, called, strict=True)]
    alike = "images of the same size, beginning and end" if source.digests[0].startswith("~") else "byte-identical images"
    return [f"{len(twins)} {alike} are in two splits, which flatters the result: {some(pairs, len(twins))}"]


def _fingerprint(source: Source, parts: dict[str, np.ndarray]) -> str:
    members = b"".join(name.encode() + source.numbers[samples].astype("<i8").tobytes() for name, samples in parts.items())
    return hashlib.blake2b(source.fingerprint.encode() + members, digest_size=16).hexdigest()


def outline_images(spec: Data, root: Path | None = None) -> DataSplits:
    """As open_images, without downloads, for `tltrain plan`. An absent known data set is outlined by its published sizes."""
    return split(open_source(spec, root, outline=True), spec)


def open_images(spec: Data, root: Path | None = None, to_train: bool = True) -> DataSplits:
    """Open, scan and split the data set that a recipe names. Arguments and errors are those of `open_source` and `split`."""
    return split(open_source(spec, root), spec, to_train)


def open_source(spec: Data, root: Path | None = None, outline: bool = False) -> Source:
    """All samples of a source. Raises UserError for one that cannot be trained on.

    root: of downloads; None is TLTRAIN_DATA or the user's cache. outline: an absent known set by its sizes.
    """
    kind, argument = _find(spec.source)
    kind.check(spec)
    check_known(spec, kind.multilabel)
    outlined = kind.outline(argument, spec, root or data_root()) if outline and kind.outline is not None else None
    source = outlined or kind.open(argument, spec, root or data_root())
    if spec.white is not None and not kind.argument:
        source = replace(source, notes=(*source.notes, f"data.white is {spec.white}, and {spec.source} has no image files it could change"))
    return source


def foreign(source: str) -> dict[str, None]:
    """Data settings that do not apply to this source, with their defaults. Raises UserError as `open_images` for an unknown kind."""
    return _find(source)[0].foreign()


def _find(source: str) -> tuple[SourceKind, str | None]:
    """The source kind, and the part after the colon. Raises UserError for an unknown kind, and for a missing or unexpected argument."""
    name, colon, argument = source.partition(":")
    known = registry.names("sources")
    if name in known and bool(colon) == bool(_kind(name).argument) and (argument or _kind(name).argument in ("", "NAME")):
        return _kind(name), argument if colon else None
    from tltrain.core.arguments.words import source_of  # with what reads flags, which data workers do not need

    on_disk = None if name in known else source_of(source)  # a folder or a file without its kind
    forms = {_form(other): other for other in known}
    near = [on_disk] if on_disk else [form for form, other in forms.items() if other == name] or get_close_matches(source, forms, n=1)
    near = near or [form for form, other in forms.items() if other in get_close_matches(name.lower(), known, n=1, cutoff=0.7)]
    hint = f"did you mean {near[0]}?" if near else f"it can be {', '.join(forms)}"
    raise UserError(f"data.source is {without_secrets(source)!r}; {hint}")


def _kind(name: str) -> SourceKind:
    return cast(SourceKind, registry.find("sources", name, f"data.source is {name!r}"))


def _form(name: str) -> str:
    """The form of a source of this kind in a recipe, such as folder:PATH. Only the name if its package cannot be imported."""
    try:
        argument = _kind(name).argument
    except UserError:
        return name
    return f"{name}:{argument}" if argument else name
