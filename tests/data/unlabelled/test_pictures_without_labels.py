"""Pictures without labels: every image below a folder, but for those that the data set has itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_files import digit_folder, digit_image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, validate
from tltrain.data import DataSplits, open_images
from tltrain.data.dataset import NO_LABEL, class_weights, sampling_weights
from tltrain.data.unlabelled.pictures import apart, beside


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 train, 3 val and 4 test images of each of two classes."""
    return digit_folder(tmp_path_factory.mktemp("labelled") / "digits", 2)


def recipe_of(source: str, unlabelled: str | None, **data: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "student", "batch": 4, "data": {"source": source} | data, "backbone": {"weights": "x"},
        "distill": {"teacher": {"weights": "teacher"}, "unlabelled": unlabelled},
        "stages": [{"name": "a", "unfreeze": "all", "steps": 1, "lr": 1}],
    }  # fmt: skip
    return validate(raw, "test")


def opened(source: str, unlabelled: str | None, **data: Any) -> DataSplits:
    recipe = recipe_of(source, unlabelled, **data)
    images = open_images(recipe.data)
    return apart(images, beside(images, recipe).unlabelled, source)


def loose(root: Path, *numbers: int) -> Path:
    root.mkdir()
    for number in numbers:
        digit_image(number).save(root / f"{number}.png")
    return root


def test_loose_pictures_stand_behind_train_without_labels(labelled: Path, tmp_path: Path) -> None:
    root = loose(tmp_path / "more", 900, 901)
    (root / "deeper" / "still").mkdir(parents=True)
    digit_image(902).save(root / "deeper" / "still" / "c.png")
    images = opened(f"folder:{labelled}", f"folder:{root}")
    assert images.notes[-1] == f"3 pictures without labels from folder:{root}"
    assert images.unlabelled is not None
    assert list(images.unlabelled.split.ids) == ["900.png", "901.png", "deeper/still/c.png"]
    assert len(images.train) == 16
    assert images.pool.labels.tolist() == [*images.train.labels, NO_LABEL, NO_LABEL, NO_LABEL]
    assert images.source is not None
    assert images.pool.source_index[16:].min() > images.source.numbers.max(), "each has views of its own"
    for i in range(16):
        assert np.array_equal(np.asarray(images.pool.read(i)), np.asarray(images.train.read(i)))
    for i, number in enumerate((900, 901, 902)):
        assert np.array_equal(np.asarray(images.pool.read(16 + i)), np.asarray(digit_image(number)))
    assert sum(len(split) for split in (images.val, images.test) if split) == 14
    assert images.fingerprint_of(images.train) != images.fingerprint_of(images.pool)


def test_images_of_test_val_and_train_are_left_out_and_counted(labelled: Path, tmp_path: Path) -> None:
    root = loose(tmp_path / "more", 900)
    taken = {split: sorted((labelled / split).rglob("*.png")) for split in ("train", "val", "test")}
    for split, num in (("train", 3), ("val", 2), ("test", 5)):
        for path in taken[split][:num]:
            (root / f"{split}-{path.name}").write_bytes(path.read_bytes())
    images = opened(f"folder:{labelled}", f"folder:{root}")
    assert images.unlabelled is not None
    assert list(images.unlabelled.split.ids) == ["900.png"]
    left_out = "5 of test, 2 of val, 3 that train has with their labels"
    assert images.notes[-1] == f"1 pictures without labels from folder:{root}; left out, as images of this data set: {left_out}"


def test_the_own_folder_gives_what_per_class_leaves_out(labelled: Path) -> None:
    images = opened(f"folder:{labelled}", f"folder:{labelled}", per_class=5)
    assert images.unlabelled is not None
    names = set(images.unlabelled.split.ids)
    assert len(names) == 2 * (8 - 5)
    assert not names & {name for split in (images.train, images.val, images.test) if split for name in split.ids}
    with pytest.raises(UserError, match=r"30 pictures are images of this data set \(8 of test, 6 of val, 16 that train has"):
        opened(f"folder:{labelled}", f"folder:{labelled}")


def test_images_in_memory_are_known_by_their_numbers(tmp_path: Path) -> None:
    images = opened("digits", "digits", per_class=5)
    assert images.unlabelled is not None
    own = {name for split in (images.train, images.val, images.test) if split for name in split.ids}
    assert not set(images.unlabelled.split.ids) & own
    assert images.in_memory
    other = opened("digits", f"folder:{loose(tmp_path / 'more', 1)}")
    assert "whether some are images of val or test is not known, since digits and they have no hashes of one kind" in other.notes[-1]
    assert not other.in_memory, "files are read by data workers"


def test_what_is_left_out_changes_the_rows_of_stores(labelled: Path, tmp_path: Path) -> None:
    root = loose(tmp_path / "more", 900, 901)
    one, two = (opened(f"folder:{labelled}", f"folder:{root}", per_class=n) for n in (5, 6))
    assert one.fingerprint_of(one.pool) != two.fingerprint_of(two.pool)
    (root / "901.png").unlink()
    fewer = opened(f"folder:{labelled}", f"folder:{root}", per_class=5)
    assert fewer.fingerprint == one.fingerprint
    assert fewer.fingerprint_of(fewer.pool) != one.fingerprint_of(one.pool)


def test_what_is_declared_as_test_there_is_not_taken(labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.csv"
    rows = [
        f"{digit_file(tmp_path, n)},{label},{split}" for n, label, split in ((900, "x", "train"), (901, "y", "train"), (902, "x", "test"))
    ]
    table.write_text("path,label,split\n" + "\n".join(rows))
    images = opened(f"folder:{labelled}", f"csv:{table}")
    assert images.unlabelled is not None
    assert [Path(name).name for name in images.unlabelled.split.ids] == ["900.png", "901.png"]
    assert images.classes == ("digit 0", "digit 1"), "its labels are nobody's"


def digit_file(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    digit_image(number).save(path)
    return path


def test_mistakes_name_the_key(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for named, told in (
        ("folder:absent", r"distill\.unlabelled is folder:absent; .*absent is not a folder; give one that holds images"),
        (f"folder:{tmp_path / 'empty'}", r"distill\.unlabelled is .* holds no image \("),
        ("foldr:x", r"distill\.unlabelled is 'foldr:x'; did you mean folder:PATH\?"),
    ):
        with pytest.raises(UserError, match=told):
            opened(f"folder:{labelled}", named)
    raw = recipe_of("digits", "digits").model_dump(mode="json")
    with pytest.raises(UserError, match=r"unlabelled pictures have the teacher's term alone, and weight is 0; raise weight, or leave"):
        validate(raw | {"distill": raw["distill"] | {"weight": 0}}, "mine")


def test_classes_are_drawn_equally_and_pictures_without_labels_as_the_mean_image() -> None:
    labels = np.array([0, 0, 0, 1, NO_LABEL, NO_LABEL])
    weight_N = sampling_weights(labels, 2)
    assert weight_N.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1, 1])
    assert weight_N[:4].tolist() == class_weights(labels[:4], 2)[labels[:4]].tolist()
