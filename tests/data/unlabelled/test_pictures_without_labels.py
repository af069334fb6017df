"""Pictures without labels: every image below a folder, but for those that the data set has itself."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_files import digit_folder, digit_image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, validate
from tltrain.data import DataSplits, open_images
from tltrain.data.dataset import NO_LABEL, class_weights, sampling_weights
from tltrain.data.unlabelled.loose import open_unlabelled
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


def test_folds_leave_what_is_declared_as_test_unseen(labelled: Path) -> None:
    data = {"folds": 2, "fold": 0, "per_class": 2}
    images = opened(f"folder:{labelled}", f"folder:{labelled}", **data)
    assert images.unlabelled is not None
    assert {name.split("/")[0] for name in images.unlabelled.split.ids} == {"train"}
    assert "16 of test, 6 of val, 4 that train has" in images.notes[-1], "those of the fold that plays test, and those declared"


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


def test_what_data_exclude_leaves_out_stays_out(labelled: Path, tmp_path: Path) -> None:
    out = [f"train/digit 0/{path.name}" for path in sorted((labelled / "train" / "digit 0").iterdir())[:4]]
    (tmp_path / "out.csv").write_text("path\n" + "\n".join(out))
    data = {"per_class": 3, "exclude": str(tmp_path / "out.csv")}
    images = opened(f"folder:{labelled}", f"folder:{labelled}", **data)
    assert images.unlabelled is not None
    assert not set(out) & set(images.unlabelled.split.ids)
    assert len(images.unlabelled.split) == 30 - 14 - 6 - 4
    assert images.notes[-1].endswith("8 of test, 6 of val, 6 that train has with their labels, 4 that data.exclude leaves out")
    root = loose(tmp_path / "more", 900)
    (root / "copy.png").write_bytes((labelled / out[0]).read_bytes())
    elsewhere = opened(f"folder:{labelled}", f"folder:{root}", **data)
    assert elsewhere.unlabelled is not None
    assert list(elsewhere.unlabelled.split.ids) == ["900.png"], "known by its bytes under another name"
    (tmp_path / "numbers.csv").write_text("path\ndigits/5\n")
    in_memory = opened("digits", "digits", per_class=5, exclude=str(tmp_path / "numbers.csv"))
    assert in_memory.unlabelled is not None
    assert "digits/5" not in set(in_memory.unlabelled.split.ids)


@pytest.mark.parametrize("kind", ["zip", "tar", "csv"])
@pytest.mark.parametrize("inside", ["", "only/", "test/"])
def test_archives_and_tables_need_no_classes(labelled: Path, tmp_path: Path, kind: str, inside: str) -> None:
    root = tmp_path / "more"
    (root / inside).mkdir(parents=True)
    for number in (900, 901):
        digit_image(number).save(root / inside / f"{number}.png")
    file = tmp_path / f"more.{kind}"
    if kind == "csv":
        file.write_text("path\n" + "\n".join(f"more/{inside}{number}.png" for number in (900, 901)))
    else:
        shutil.make_archive(str(file.with_suffix("")), kind, root)
    images = opened(f"folder:{labelled}", f"{kind}:{file}", depth=1)
    assert images.unlabelled is not None
    assert [Path(name).name for name in images.unlabelled.split.ids] == ["900.png", "901.png"]
    for i, number in enumerate((900, 901)):
        assert np.array_equal(np.asarray(images.unlabelled.split.read(i)), np.asarray(digit_image(number)))


def test_columns_and_levels_of_the_data_are_not_asked_of_another_kind(tmp_path: Path) -> None:
    root = loose(tmp_path / "more", 900)
    shutil.make_archive(str(tmp_path / "more"), "zip", root)
    data = recipe_of("parquet:x", None, image_column="picture", label_column="kind").data
    for named in (f"zip:{tmp_path / 'more.zip'}", f"folder:{root}", "digits"):
        assert len(open_unlabelled(named, data).ids) in (1, 1797)
    assert len(open_unlabelled("digits", recipe_of("folder:x", None, depth=2).data).ids) == 1797


def test_pictures_that_are_all_declared_as_test_are_said(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text(f"path,split\n{digit_file(tmp_path, 900)},test\n{digit_file(tmp_path, 901)},val\n")
    with pytest.raises(UserError, match=r"more\.csv, whose 2 pictures are all declared as val or test there, and those are not taken"):
        opened(f"folder:{labelled}", f"csv:{tmp_path / 'more.csv'}")


def test_mistakes_name_the_key(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.csv").write_text("picture\n1.png\n")
    digit_image(1).save(tmp_path / "1.png")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("read me.txt", "nothing")
    for named, told in (
        ("folder:absent", r"distill\.unlabelled is folder:absent; .*absent is not a folder; give one that holds images"),
        (f"folder:{tmp_path / 'empty'}", r"distill\.unlabelled is .* holds no image \("),
        (
            f"csv:{tmp_path / 'odd.csv'}",
            r"distill\.unlabelled is csv:.*has the columns picture and not path; the first line names: path\[,split\]",
        ),
        (f"zip:{tmp_path / 'none.zip'}", r"distill\.unlabelled is zip:.*none\.zip holds no image \("),
        ("zip:absent.zip", r"distill\.unlabelled is zip:absent\.zip; .* is not there; give a zip archive"),
        ("foldr:x", r"distill\.unlabelled is 'foldr:x'; did you mean folder:PATH\?"),
    ):
        with pytest.raises(UserError, match=told):
            opened(f"folder:{labelled}", named)
    with pytest.raises(UserError, match=r"distill.*the URL holds a secret \(what stands before @\)") as refused:
        recipe_of("digits", "zip:https://me:hidden@host/x.zip")
    assert "hidden" not in str(refused.value)
    raw = recipe_of("digits", "digits").model_dump(mode="json")
    with pytest.raises(UserError, match=r"unlabelled pictures have the teacher's term alone, and weight is 0; raise weight, or leave"):
        validate(raw | {"distill": raw["distill"] | {"weight": 0}}, "mine")


def test_classes_are_drawn_equally_and_pictures_without_labels_as_the_mean_image() -> None:
    labels = np.array([0, 0, 0, 1, NO_LABEL, NO_LABEL])
    weight_N = sampling_weights(labels, 2)
    assert weight_N.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1, 1])
    assert weight_N[:4].tolist() == class_weights(labels[:4], 2)[labels[:4]].tolist()
