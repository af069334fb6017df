"""Opens the finished runs that teach a student. They must have the same classes, and no teacher may have trained on a test image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tltrain.core.errors import UserError, some
from tltrain.core.recipe import Backbone, Data, Recipe
from tltrain.data import DataSplits, open_images
from tltrain.evaluation import kept_data
from tltrain.models import weights as files_of
from tltrain.models.metadata import WeightsMetadata, read_card
from tltrain.runs import data_record, run_dir
from tltrain.runs.folds import folder as folds

OWN_RUN = "run"
"""Where `tltrain fit` and `tltrain distil` keep the run in their folders."""
NO_FOLDS = {"folds": None, "fold": None, "repeat": 0}


@dataclass(frozen=True)
class Teacher:
    """A finished run."""

    path: Path
    recipe: Recipe
    card: WeightsMetadata


@dataclass(frozen=True)
class Taught:
    """The teachers, and the images that the student learns from."""

    teachers: tuple[Teacher, ...]
    data: Data
    """The first teacher's data settings. For a cross-validation, without its folds."""
    images: DataSplits


def opened(paths: Sequence[Path]) -> Taught:
    """Open the teachers and their images. paths: run folders, or the one folder of `tltrain folds`. Raises UserError."""
    of_folds = [path for path in paths if folds.is_folds(path)]
    if of_folds and len(paths) > 1:
        raise UserError(f"{of_folds[0]} is the folder of a cross-validation, whose runs are the teachers; give it alone")
    found = [member.path for member in folds.read(of_folds[0]).members] if of_folds else [_run_in(path) for path in paths]
    twice = [str(path) for path in found if [each.resolve() for each in found].count(path.resolve()) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each teacher once")
    teachers = tuple(map(_teacher, found))
    first = teachers[0]
    for each in teachers[1:]:
        if each.card.classes != first.card.classes:
            raise UserError(
                f"{first.path} knows the classes {some(list(first.card.classes or ()))}, and {each.path} "
                f"{some(list(each.card.classes or ()))}; teachers must know the same, in the same order"
            )
    data = first.recipe.data.model_copy(update=NO_FOLDS) if of_folds else first.recipe.data
    images = _images(first, data)
    for each in teachers:
        _check_test(each, images, of_folds[0] if of_folds else None, exact=each is first)
    if not of_folds and (lines := kept_data.changes(first.path, images)):
        raise UserError(
            f"{first.path}: the data is not what this run learned from, and its student learns from the same images:\n  "
            + "\n  ".join(lines) + "\nput the data back as it was, or train the teacher again"
        )  # fmt: skip
    return Taught(teachers, data, images)


def identity(taught: Taught) -> dict[str, Any]:
    """Fingerprints of the teachers' weights, the images and the data settings, by the names that messages use."""
    digests = [files_of.fingerprint(files_of.find(Backbone(weights=str(each.path)), network=False)) for each in taught.teachers]
    teachers = {"teacher's weights" if k == 0 else f"weights of teacher {k + 1}": digest for k, digest in enumerate(digests)}
    settings = taught.data.model_dump(mode="json", exclude_defaults=True)
    return {**teachers, "images in their splits": taught.images.fingerprint, "teacher's data settings": settings}


def _run_in(path: Path) -> Path:
    """The run inside a folder of `tltrain fit` or `distil`. Any other path is returned as it is."""
    inner = path / OWN_RUN
    return inner if run_dir.recipe_file(inner).is_file() and not run_dir.weights_file(path).is_file() else path


def _teacher(path: Path) -> Teacher:
    recipe, ended = run_dir.read_recipe(path), run_dir.outcome(path).get("outcome")
    if ended != "finished":
        how = f"it has {ended}" if ended else "it has not ended"
        raise UserError(f"{path} is no finished run ({how}), and a teacher must be; the command that began it goes on with it")
    weights = run_dir.finished_weights(path)
    card = read_card(weights)
    if card is None or card.classes is None:
        raise UserError(f"{weights} does not name its classes; give the folder of a run that `tltrain train` wrote")
    if data_record.read(path) is None:
        raise UserError(
            f"{path} does not say which image was in which split, so that a student might be tested on what its teacher learned from; "
            "train it again with this version"
        )
    return Teacher(path, recipe, card)


def _images(first: Teacher, data: Data) -> DataSplits:
    try:
        images = open_images(data)
    except UserError as error:
        raise UserError(f"the data of {first.path} cannot be opened, and its student learns from the same images: {error}") from error
    if images.classes != first.card.classes:
        raise UserError(
            f"the data of {first.path} has the classes {some(list(images.classes))} by now, and the run knows "
            f"{some(list(first.card.classes or ()))}; put the data back as it was, or train the teacher again"
        )
    return images


def _check_test(teacher: Teacher, images: DataSplits, folds_folder: Path | None, exact: bool) -> None:
    """Check that the student's test images are new to a teacher, and for a run that they are its own test images. Raises UserError.

    exact: whether an image with other bytes is another image. False: it is known by its name alone, since runs may have hashed otherwise.
    """
    if images.test is None or images.source is None:
        return
    digest_of = dict(zip(images.source.ids, images.source.digests, strict=True)) if exact and images.source.digests else {}
    tested = {(name, digest_of.get(name, "")) for name in images.test.ids}
    known = {(sample.id, sample.digest if digest_of else ""): sample.split for sample in data_record.read_samples(teacher.path)}
    seen = sum(known.get(each) in ("train", "val") for each in tested)
    if seen and folds_folder is not None:
        raise UserError(
            f"{folds_folder}: every image was learned from by all folds but one, so that no test image would be new to these teachers "
            f"({teacher.path.name} learned from {seen:,} of {len(tested):,}). Keep test images out of the folds, in a folder of their own "
            "(train/ and test/), or give runs that share one test split, such as those of several seeds"
        )
    if seen:
        raise UserError(
            f"{teacher.path} has learned from {seen:,} of the {len(tested):,} test images of its student, which would look better than it "
            "is; give runs of the same split (data.seed, data.fold), and of data that has not changed"
        )
    if folds_folder is None and {name for name, split in known.items() if split == "test"} != tested:
        raise UserError(
            f"{teacher.path} was tested on other images than its student would be; give runs of the same split (data.seed, data.fold), "
            "and of data that has not changed"
        )
