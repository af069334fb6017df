"""Keeps the splits of a run fixed: later starts and evaluations use the splits of the first start, or raise an error.

The recipe draws splits from the present images. After a change of the images, the same draw would put training images into the test
split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Backbone, Data
from tltrain.data import DataSplits, Source, assign, open_images, split_names
from tltrain.data.multilabel.label_sets import written
from tltrain.data.unlabelled.pictures import apart
from tltrain.runs import data_record, run_dir
from tltrain.runs.data_record import UNUSED, DataRecord, Difference, Sample

BACK = "put the data back as it was, or begin a new run with --folder"
SEEN = "figures, sets and thresholds look better on them than on new images"
KEEPS = "known images keep their split, and new ones are left out"


@dataclass(frozen=True)
class Decision:
    """The splits that a start uses. The same on every rank."""

    fingerprint: str
    """Hash of the images that rank 0 found."""
    names: Sequence[str] | None = None
    """(N,) the split of each sample of the source. None: use the splits that the recipe draws."""
    notes: tuple[str, ...] = ()
    record: DataRecord | None = None
    """The record to write. None if the folder already has a record of these images."""
    unlabelled: str | None = None
    """Hash of the pictures without labels that rank 0 found."""

    def is_of(self, drawn: DataSplits) -> bool:
        """Whether these are the images that rank 0 found."""
        return (drawn.fingerprint, _unlabelled(drawn)) == (self.fingerprint, self.unlabelled)

    def apply(self, drawn: DataSplits, source: str) -> DataSplits:
        """The images in their splits, and the pictures without labels that are in none. source: data.source."""
        images = drawn
        if self.names is not None and drawn.source is not None:
            images = assign(drawn.source, self.names, to_train=True)
        return apart(replace(images, notes=(*self.notes, *images.notes)), drawn.unlabelled, source)


def _unlabelled(drawn: DataSplits) -> str | None:
    return None if drawn.unlabelled is None else drawn.unlabelled.fingerprint


def decide(run: Path, drawn: DataSplits, inputs: Mapping[str, str], accept: bool) -> Decision:
    """Compare the present images with those of the first start of the run. Arguments and errors are those of `_decided`."""
    found = _unlabelled(drawn)
    inputs = inputs if found is None else {**inputs, "pictures without labels": found}
    return replace(_decided(run, drawn, inputs, accept), unlabelled=found)


def _decided(run: Path, drawn: DataSplits, inputs: Mapping[str, str], accept: bool) -> Decision:
    """drawn: the images, split by the recipe. inputs: hashes of the other inputs by name (`weights`, `teacher`). accept: whether the images
    may have changed. Raises UserError with the differences if they may not, or if a split would be empty.
    """
    record = data_record.read(run)
    fresh = DataRecord(drawn.classes, drawn.fingerprint, False, inputs)
    if record is None:
        return Decision(drawn.fingerprint, None, _notes_without_record(run, drawn, accept), None if drawn.source is None else fresh)
    other = [name for name, digest in inputs.items() if record.inputs.get(name, digest) != digest]
    if other:
        raise UserError(f"{run}: the {' and the '.join(other)} are not those that this run began with; put them back, or begin a new run "
                        "with --folder")  # fmt: skip
    if drawn.source is None or (record.fingerprint == drawn.fingerprint and not record.assigned):
        return Decision(drawn.fingerprint)
    known = data_record.read_samples(run)
    difference = data_record.compare(record.classes, known, drawn.classes, _samples(drawn, drawn.source.declared.tolist()))
    names = ["" if name == UNUSED else name for name in difference.splits]
    lines = difference.lines()
    if not lines and not record.assigned:
        lines = _redrawn(drawn, drawn.source.ids, names)
    if lines:
        _check_accepted(run, lines, difference, accept)
        _check_not_empty(run, known, names)
    notes = tuple(f"changed since this run began: {line}; {KEEPS}" for line in lines)
    kept = replace(fresh, assigned=True, inputs={**record.inputs, **inputs})  # those of a teacher that is not asked again stay
    return Decision(drawn.fingerprint, names, notes, kept if lines else None)


def _redrawn(drawn: DataSplits, ids: Sequence[str], names: Sequence[str]) -> list[str]:
    redrawn = [i for i, a, b in zip(ids, names, split_names(drawn), strict=True) if a != b]
    return [f"images that would be drawn into another split: {len(redrawn):,} ({some(redrawn)})"] if redrawn else []


def changes(run: Path, drawn: DataSplits) -> list[str]:
    """Changes of the images since the run began, one line each. Empty if there are none, and if the run has no record to compare with."""
    record = data_record.read(run)
    if record is None or drawn.source is None or (record.fingerprint == drawn.fingerprint and not record.assigned):
        return []
    known = data_record.read_samples(run)
    difference = data_record.compare(record.classes, known, drawn.classes, _samples(drawn, drawn.source.declared.tolist()))
    names = ["" if name == UNUSED else name for name in difference.splits]
    return difference.lines() or _redrawn(drawn, drawn.source.ids, names)


def _check_accepted(run: Path, lines: Sequence[str], difference: Difference, accept: bool) -> None:
    problem = f"{run}: the data is not what this run began with:\n  " + "\n  ".join(lines)
    if difference.classes or difference.moved:
        why = "a network has one output for each class" if difference.classes else "what was trained on must not be tested on"
        raise UserError(f"{problem}\n{why}: {BACK}")
    if not accept:
        raise UserError(f"{problem}\n{BACK}, or go on with --accept-data-change: {KEEPS}")


def _check_not_empty(run: Path, known: Sequence[Sample], names: Sequence[str]) -> None:
    empty = {sample.split for sample in known} - {UNUSED} - set(names)
    if empty:
        raise UserError(f"{run}: no image of {some(sorted(empty))} is left of those that this run began with; {BACK}")


def _notes_without_record(run: Path, drawn: DataSplits, accept: bool) -> tuple[str, ...]:
    """Check a run of tltrain 0.1.0, which kept only a hash of the data. Returns notes for the user.

    Raises UserError if the number of classes has changed, or if the hash differs and `accept` is False.
    """
    first_data = run_dir.environment(run).get("data", {})
    if first_data.get("fingerprint", drawn.fingerprint) == drawn.fingerprint:
        return ()
    problem = f"{run}: the data is not what this run began with"
    if first_data.get("classes") != len(drawn.classes):
        raise UserError(f"{problem}: it had {first_data.get('classes')} classes, and has {len(drawn.classes)} now; {BACK}")
    if not accept:
        raise UserError(
            f"{problem}. Its version of tltrain did not keep which image was in which split, so that images which it has trained on may "
            f"now be tested on. {BACK}, or go on all the same with --accept-data-change"
        )
    return ("changed since this run began, and drawn into new splits: test images may have been trained on",)


def write(run: Path, decision: Decision, images: DataSplits) -> None:
    """Write the record of the images, if the decision has one."""
    if decision.record is not None:
        data_record.write(run, decision.record, _each(images, [name or UNUSED for name in split_names(images)]))


def learned(weights: str | None, data: Data, source: Source) -> set[int]:
    """Positions of the source's images that the run of these weights was trained or chosen on. Empty if they belong to no run.

    weights: as in `backbone.weights`; a run folder, or a file in it. data: what the source was opened from. Images are known by the hashes
    of their bytes; where the source has none, or data.check made them of other parts, by their ids if the source is the run's own.
    """
    given = Path(weights or "").expanduser()
    if weights is None or not given.exists():  # a name such as imagenet: the working folder may be a run, and is above every name
        return set()
    places = [given, *given.parents][:4]  # RUN/stages/0-head/...
    run = next((place for place in places if (place / data_record.NAME).is_file()), None)
    if run is None:
        return set()
    return set(_splits_of(run, data, source))


def _splits_of(run: Path, data: Data, source: Source) -> dict[int, str]:
    """Train or val for each position of the source whose image the run was trained or chosen on. Images are known as in `learned`."""
    known = [sample for sample in data_record.read_samples(run) if sample.split in ("train", "val")]
    known.sort(key=lambda sample: sample.split == "train")  # an image that stands in both was trained on
    digests = {sample.digest: sample.split for sample in known}
    if source.digests and {digest[:1] == "~" for digest in digests} == {source.digests[0][:1] == "~"}:  # hashes of parts are no others'
        return {i: digests[digest] for i, digest in enumerate(source.digests) if digest in digests}
    own = run_dir.read_recipe(run).data.source == data.source
    ids = {sample.id: sample.split for sample in known} if own else {}
    return {i: ids[name] for i, name in enumerate(source.ids) if name in ids}


def trained_on(run: Path, drawn: DataSplits, data: Data, which: str) -> list[str]:
    """A note where images given in place of the run's own are those that it was trained or chosen on. which: the split, or all."""
    if drawn.source is None or not (run / data_record.NAME).is_file():
        return []
    asked = [i for i, name in enumerate(split_names(drawn)) if (name if which != "all" else name and "all") == which]
    split_of = _splits_of(run, data, drawn.source)
    met = Counter(split_of[i] for i in asked if i in split_of)
    texts = []
    if met["train"]:
        texts.append(f"{met['train']:,} of these {len(asked):,} images {'was' if met['train'] == 1 else 'were'} trained on")
    if met["val"]:
        lead = f"{met['val']:,}" if texts else f"{met['val']:,} of these {len(asked):,} images"
        texts.append(f"{lead} {'is' if met['val'] == 1 else 'are'} of its val")
    return [f"{', '.join(texts)}: {SEEN}"] if texts else []


def seen_in_training(images: DataSplits, data: Data, inputs: Mapping[str, Backbone]) -> list[str]:
    """Notes about test images that the weights of another run have learned from. inputs: start weights and teachers, by name."""
    if images.source is None or images.test is None:
        return []
    known = {name: learned(spec.weights, data, images.source) for name, spec in inputs.items()}
    tested = {i for i, split in enumerate(split_names(images)) if split == "test"} if any(known.values()) else set()
    notes = []
    for name, positions in known.items():
        if seen := len(tested & positions):
            notes.append(
                f"the {name}, {inputs[name].weights}, learned from {seen:,} of the {len(tested):,} test images, so that test figures are "
                "too good to be true: give both runs the same split (data.seed, data.fold), or test on other images"
            )
    return notes


def images_for(spec: Data, run: Path, other: bool) -> DataSplits:
    """Open images as `open_images` does. other: they are not the run's own, and a mistake names what they have from its recipe."""
    try:
        return open_images(spec, to_train=not other)
    except UserError as error:
        if not other or spec.depth is None or "data.depth" not in str(error):
            raise
        raise UserError(f"{error}; data.depth comes from the run {run}, as other images are read as its own are") from error


def for_evaluation(run: Path, drawn: DataSplits) -> tuple[DataSplits, list[str]]:
    """Returns the images in the splits of the training, and notes on missing, new or changed images.

    Raises UserError if images of the training now have a class that the run does not know.
    """
    record, source = data_record.read(run), drawn.source
    if record is None or source is None:
        fingerprint = run_dir.environment(run).get("data", {}).get("fingerprint", drawn.fingerprint)
        changed = "the data is not what this run was trained on, and which image was in which split is not known: some of these may have "
        return drawn, ([] if fingerprint == drawn.fingerprint else [f"{changed}been trained on"])
    if record.fingerprint == drawn.fingerprint and not record.assigned:
        return drawn, []
    known = data_record.read_samples(run)
    now = _samples(drawn, source.declared.tolist())
    difference = data_record.compare(record.classes, known, drawn.classes, now)
    if source.labels.ndim == 2:
        if source.classes != record.classes:
            raise UserError(
                f"{run} was trained on other classes ({'; '.join(difference.classes)}); {BACK}, or give other images with --data"
            )
        return assign(source, difference.splits, to_train=False), _missing(known, difference)
    strange = {sample.label for sample, name in zip(now, difference.splits, strict=True) if name != UNUSED} - set(record.classes)
    if strange:
        names = some(sorted(strange))
        raise UserError(
            f"{run} was trained on images that are now of class {names}, which it does not know ({'; '.join(difference.classes)}); "
            "give the classes their old names, or give other images with --data"
        )
    number_of = {name: k for k, name in enumerate(record.classes)}
    label_N = np.array([number_of.get(sample.label, 0) for sample in now], dtype=np.int64)  # images of unknown classes are in no split
    images = assign(replace(source, classes=record.classes, labels=label_N), difference.splits, to_train=False)
    return images, _missing(known, difference)


def _missing(known: Sequence[Sample], difference: Difference) -> list[str]:
    lines = [f"since this run was trained: {line}" for line in difference.lines()]
    before, after = Counter(sample.split for sample in known), Counter(difference.splits)
    there = ", ".join(f"{after[name]:,} of {before[name]:,} {name}" for name in ("train", "val", "test") if before[name])
    return [*lines, f"the images keep the splits of the training ({there} are there), and new ones are left out"] if lines else []


def _samples(images: DataSplits, splits: Sequence[str]) -> list[Sample]:
    return list(_each(images, splits))


def _each(images: DataSplits, splits: Sequence[str]) -> Iterator[Sample]:
    """The samples one at a time: a million of them as objects take 300 MB."""
    source = images.source
    assert source is not None
    digests = source.digests or [""] * len(source.ids)
    several = source.labels.ndim == 2
    labels = written(source.labels, source.classes) if several else [source.classes[k] for k in source.labels.tolist()]
    return map(Sample, source.ids, splits, labels, digests)
