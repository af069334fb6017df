"""What a folder means: splits, wrappers, what is passed over and counted, links, names; and what is refused with what was meant."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from other_user import any_user, readable_folder
from PIL import Image

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.sources.folder import check_apart


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _images(folder: Path, num: int = 12) -> Path:
    """Images that are unlike any in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(os.fsencode(folder)))
    for i in range(num):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def _tree(root: Path, *folders: str, num: int = 12) -> Path:
    for name in folders:
        _images(root / name, num)
    return root


def _open(root: Path, **options: Any) -> DataSplits:
    return open_images(Data(source=f"folder:{root}", **options))


def _refused(root: Path, match: str, **options: Any) -> str:
    with pytest.raises(UserError, match=match) as caught:
        _open(root, **options)
    return str(caught.value)


def _sizes(images: DataSplits) -> list[int]:
    return [0 if split is None else len(split) for split in (images.train, images.val, images.test)]


# --- splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Train", "Val", "Test"), ("TRAINING", "validation", "Testing"), ("train", "dev", "test"), ("Training", "eval", "testing")],
)
def test_splits_are_known_in_any_case_and_by_their_usual_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    root = _tree(tmp_path / "d", *(f"{split}/{name}" for split in (train, val, test) for name in ("cat", "dog")))
    images = _open(root)
    assert images.classes == ("cat", "dog")
    assert _sizes(images) == [24, 24, 24]
    assert images.notes == ()
    assert images.test is not None
    assert all(name.startswith(f"{test}/") for name in images.test.ids)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "train/a", "train/b", "dev/a", "eval/b")
    _refused(root, "has dev, eval, two of which mean val; keep one")
    root = _tree(tmp_path / "e", "train/a", "train/b", "Training/a", "Training/b")
    _refused(root, "has Training, train, two of which mean train")


@pytest.mark.parametrize(
    "names", [("train", "test"), ("Training", "Testing"), ("train", "val", "cats"), ("train2017", "val2017"), ("train", "test1")]
)
def test_splits_are_never_learned_as_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = _tree(tmp_path / "d", *names)
    said = _refused(root, "called like splits, and would be learned as a class")
    assert f"put the training images of each class into {root}/train/CLASS/, or list all in csv:FILE" in said


@pytest.mark.parametrize("name", ["test", "Val", "dev"])
def test_a_split_without_train_is_not_a_class(tmp_path: Path, name: str) -> None:
    _refused(_tree(tmp_path / "d", "cat", "dog", name), f"{name} is called like a split.*if its images have no label, move it elsewhere")


def test_following_the_words_on_nearly_splits_makes_them_splits(tmp_path: Path) -> None:
    root = _tree(tmp_path / "my photos", *(f"{split}/{name}" for split in ("Trainset", "test_images") for name in ("cat", "dog")))
    said = _refused(root, "called like splits")
    commands = said.split("rename: ")[1]
    subprocess.run(commands.replace("; ", " && "), shell=True, check=True)
    assert _sizes(_open(root, val_fraction=0)) == [24, 0, 24]


def test_vehicles_may_be_trains(tmp_path: Path) -> None:
    vehicles = _open(_tree(tmp_path / "d", "Bus", "Train", "tram"))
    assert vehicles.classes == ("Bus", "Train", "tram")
    assert "Train holds images and no class folders: Train is learned as a class, beside the others" in vehicles.notes
    assert _open(_tree(tmp_path / "s", "train/bus", "train/train", "test/bus", "test/train")).classes == ("bus", "train")
    assert _open(_tree(tmp_path / "e", "devices", "trainers", "tests_of_time", "valley")).classes[0] == "devices"


def test_folders_that_all_hold_the_same_subfolders_are_refused(tmp_path: Path) -> None:
    _refused(
        _tree(tmp_path / "a", "x/cat", "x/dog", "y/cat", "y/dog"),
        "x, y all hold the same subfolders, cat, dog.*data.depth: 2; or .*csv:FILE",
    )
    _refused(_tree(tmp_path / "b", "cat/train", "cat/test", "dog/train", "dog/test"), r"same subfolders, test, train.*train/CLASS/")
    images = _open(_tree(tmp_path / "c", "cat/images", "dog/images"))  # as tiny-imagenet has it
    assert images.classes == ("cat", "dog")
    assert _open(_tree(tmp_path / "d", "cat/2019", "cat/2020", "dog/2019")).classes == ("cat", "dog")


def test_classes_in_a_tree_are_named_by_their_path(tmp_path: Path) -> None:
    names = ("animals/birds/owl", "animals/birds/tit", "animals/fish/carp", "plants/trees/oak", "plants/moss")
    root = _tree(tmp_path / "d", *names)
    _images(root / "plants", 3)
    for depth, classes in (
        (1, ("animals", "plants")),
        (2, ("animals/birds", "animals/fish", "plants/moss", "plants/trees")),
        (3, ("animals/birds/owl", "animals/birds/tit", "animals/fish/carp", "plants/moss", "plants/trees/oak")),
    ):
        images = _open(root, depth=depth)
        assert images.classes == classes
        for split in (images.train, images.val, images.test):
            assert split is not None
            assert all(name.startswith(f"{classes[k]}/") for name, k in zip(split.ids, split.labels, strict=True))
    assert images.notes == ("3 images right in plants, above its classes: not used",)
    assert _open(root).notes == ("class folders of folders, whose images count as theirs (data.depth: 2 makes classes of those): animals",)
    _refused(root, r"data.depth is 4, and .*/d has no folder of classes at that level; its deepest are at level 3", depth=4)
    with pytest.raises(
        UserError, match=r"data.depth is of folders \(folder:, zip:, tar:, lmdb:\), and data.source is digits; leave it out"
    ):
        open_images(Data(source="digits", depth=2))


def test_classes_in_a_tree_below_splits(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", *(f"{split}/{name}" for split in ("train", "test") for name in ("animals/owl", "plants/oak")))
    images = _open(root, depth=2)
    assert images.classes == ("animals/owl", "plants/oak")
    assert images.test is not None
    assert len(images.test) == 24
    _images(root / "test" / "animals" / "Ox")
    _images(root / "train" / "animals" / "ox")
    _refused(root, r"test/animals/Ox has no counterpart below train; .*rename animals/Ox to animals/ox", depth=2)


def test_a_wrapper_is_refused_with_what_was_meant(tmp_path: Path) -> None:
    root = _tree(tmp_path / "a b", "photos/inner/cat", "photos/inner/dog", "__MACOSX/photos/cat")
    said = _refused(root, "holds nothing but photos/inner, which holds cat, dog; did you mean")
    meant = said.split("did you mean ")[1].rstrip("?").strip("'")
    assert open_images(Data(source=meant)).classes == ("cat", "dog")
    root = _tree(tmp_path / "c", "archive/train/cat", "archive/train/dog", "archive/test/cat", "archive/test/dog")
    assert _refused(root, "holds nothing but archive").endswith(f"did you mean folder:{root}/archive?")
    root = _tree(tmp_path / "d", "train/images/cat", "train/images/dog")
    _refused(root, "train holds images alone, which holds cat, dog; if those are the classes, move them up")
    root = _tree(tmp_path / "e", "train/train/cat", "train/train/dog", "train/test/cat", "train/test/dog")
    assert _refused(root, "called like splits").endswith(f"did you mean folder:{root}/train?")
    _refused(_tree(tmp_path / "f", "photos"), r"has 1 class \(photos\)")


def test_what_is_not_used_is_counted(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "train/cat", "train/dog", "test", "more/a", "more/b", "val2017/cat")
    _images(root, 3)
    _images(root / "train", 1)
    for name in ("README.md", "train/labels.csv", "more/a/x.txt"):
        (root / name).write_text("words")
    images = _open(root)
    assert _sizes(images) == [18, 2, 4]
    assert images.notes == (
        "3 images beside the class folders without a class: not used",
        "more stands beside train and is not called like a split: its 24 images and 1 other file are not used",
        "test has no class folders: its 12 images have no label and are not used",
        "1 image right in train without a class: not used",
        "val2017 stands beside train and is not called like a split (call it val if it is one): its 12 images are not used",
        "files that are not images by their suffix are left out: 1 .csv, 1 .md",
    )


def test_a_class_folder_without_images(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", *(f"{split}/{name}" for split in ("train", "test") for name in "ab"))
    for image in (root / "test" / "b").iterdir():
        image.unlink()
    assert _open(root).notes == ("test has no image of class b",)
    for image in (root / "train" / "b").iterdir():
        image.rename(image.with_suffix(".raw"))
    _refused(root, r"class folder .*train/b has no image .*, but files: 12 \.raw; add images or take b out of every split")


def test_a_strange_class_is_refused_with_a_remedy(tmp_path: Path) -> None:
    _refused(_tree(tmp_path / "a", "train/a", "train/b", "test/B"), "test/B has no counterpart below train; .*rename B to b")
    _refused(_tree(tmp_path / "b", "train/a", "train/b", "test/images"), r"test/images has no counterpart.*take the folder out of the data")


@pytest.mark.parametrize("num", [1, 2])
def test_the_remedies_for_tiny_classes_are_enough(tmp_path: Path, num: int) -> None:
    root = _tree(tmp_path / "d", "a", "b", num=num)
    said = _refused(root, "leaves no image for")
    fractions = said.split("or set ")[1].removesuffix(" to 0").split(" and ")
    images = _open(root, **{name.removeprefix("data."): 0 for name in fractions})
    assert len(images.train) == 2


# --- what is nobody's image


def test_folders_of_systems_hidden_ones_runs_and_caches_are_passed_over(tmp_path: Path) -> None:
    root = _tree(
        tmp_path / "d", "cat", "dog", "__MACOSX/cat", "cat/@eaDir", ".ipynb_checkpoints", "dog/.thumbs", "tagged",
        "runs/resnet/checkpoints", "runs/by-seed/0", "dog/old run",
    )  # fmt: skip
    (root / "tagged" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    (root / "cat" / "._00.png").write_bytes(b"of a Mac")
    (root / "cat" / ".DS_Store").write_bytes(b"of a Mac")
    for run in ("runs/resnet", "runs/by-seed/0", "dog/old run"):
        (root / run / "generations").mkdir()
        (root / run / "recipe.yaml").write_text("name: x")
    images = _open(root)
    assert images.classes == ("cat", "dog")
    assert sum(_sizes(images)) == 24
    assert images.notes == (
        "passed over, caches: tagged",
        "passed over, folders of the system: __MACOSX, cat/@eaDir",
        "passed over, hidden: .ipynb_checkpoints, cat/._00.png, dog/.thumbs",
        "passed over, run folders: dog/old run, runs",
    )


def test_the_cache_among_the_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    monkeypatch.setenv("TLTRAIN_CACHE", str(root / "cache"))
    _refused(root, "cache is the cache of tltrain and lies among the images; set TLTRAIN_CACHE to a folder outside")
    (root / "cache").rmdir()
    monkeypatch.setenv("TLTRAIN_CACHE", str(root / ".cache"))
    assert sum(_sizes(_open(root))) == 24


def test_a_new_run_among_the_images_is_refused_and_an_old_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=r"run folder runs/x would lie among the images of folder:\.; choose one elsewhere with --folder"):
        check_apart("folder:.", Path("runs/x"))
    check_apart("folder:.", tmp_path / "runs" / "x")
    check_apart("folder:cat", Path("runs/x"))
    check_apart("csv:t.csv", Path("runs/x"))
    (root / "runs" / "x" / "generations").mkdir(parents=True)
    (root / "runs" / "x" / "recipe.yaml").write_text("name: x")
    check_apart("folder:.", Path("runs/x"))


def test_plan_and_train_print_the_classes_and_refuse_a_run_among_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    recipe = ["digits-resnet", "--data.per-class", "5"]
    monkeypatch.chdir(root)
    for verb in ("plan", "train"):
        assert main([verb, *recipe, "--data.source", "folder:."]) == 2
        assert "would lie among the images" in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]
    monkeypatch.chdir(tmp_path)
    for verb in ("plan", "train"):
        assert main([verb, *recipe, "--data.source", "folder:d", *(["--smoke"] if verb == "train" else [])]) == 0
        assert "classes cat 5, dog 5 (training images)" in capsys.readouterr().out


# --- links


def test_a_folder_is_read_once_however_its_links_go(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "cat/more", "dog")
    (root / "cat" / "self").symlink_to(".")
    (root / "cat" / "more" / "up").symlink_to("../..")
    (root / "cat" / "again").symlink_to("more")
    (root / "dog" / "far").symlink_to("/")
    (root / "all").symlink_to(root)
    images = _open(root)
    assert images.classes == ("cat", "dog")
    assert sum(_sizes(images)) == 24
    assert images.notes == (
        "class folders of folders, whose images count as theirs (data.depth: 2 makes classes of those): cat",
        "passed over, links to a folder above them: all, cat/again/up, cat/self, dog/far",
        "passed over, links to a folder that was read already: cat/more",
    )


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    _images(tmp_path / "elsewhere")
    root = _tree(tmp_path / "d", "dog")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    assert _sizes(_open(root, val_fraction=0, test_fraction=0)) == [24, 0, 0]


def test_a_link_in_a_circle_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    (root / "cat" / "x.png").symlink_to("x.png")
    (root / "dog" / "y.png").symlink_to("nowhere.png")
    note = _open(root, max_unreadable=0.1).notes[0]
    assert "x.png (Too many levels of symbolic links)" in note
    assert "y.png (No such file or directory)" in note


@pytest.fixture
def place() -> Iterator[Path]:
    with readable_folder() as folder:
        folder.chmod(0o777)  # the cache is written beside the data
        yield folder


@pytest.mark.parametrize("closed", ["cat/inner", "cat", ""])
def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_absence(place: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(place / "cache"))
    root = _tree(place / "d", "cat/inner", "dog")
    (root / closed).chmod(0)
    with any_user():
        _refused(root, rf"{root / closed} cannot be read: Permission denied; mend its permissions")
    (root / closed).chmod(0o755)


def test_a_folder_behind_a_closed_one_is_not_called_absent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(place / "cache"))
    root = _tree(place / "closed" / "d", "cat", "dog")
    root.parent.chmod(0)
    with any_user():
        _refused(root, f"{root} cannot be read: Permission denied")
        _refused(root.parent / "none" / "x", "x cannot be read: Permission denied")
        _refused(place / "none", "is not a folder")
    root.parent.chmod(0o755)


# --- one picture, two labels; names


def test_one_picture_under_two_labels_is_said_with_the_pairs(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    (root / "dog" / "copy.png").write_bytes((root / "cat" / "03.png").read_bytes())
    (root / "dog" / "link.png").symlink_to("../cat/04.png")
    (root / "dog" / "same.png").write_bytes((root / "dog" / "05.png").read_bytes())
    (note,) = _open(root).notes
    assert note == (
        "2 pairs of byte-identical images stand under two labels, so that one of them is wrong: "
        "cat/03.png (cat) = dog/copy.png (dog), cat/04.png (cat) = dog/link.png (dog)"
    )
    (root / "bird").symlink_to("dog")
    assert _open(root).notes[0].startswith("17 pairs of byte-identical images")


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("Cat", "cat", "upper and lower case: 'Cat' (12 images) and 'cat' (12 images)"),
        ("01", "1", "how a number is written: '01' (12 images) and '1' (12 images)"),
        ("class_01", "class 1", "case, spaces, signs or leading zeros"),
        (unicodedata.normalize("NFD", "café"), "café", r"(NFC and NFD of Unicode): 'cafe\u0301' (12 images) and 'caf\xe9' (12 images)"),
        ("STRASSE", "straße", "upper and lower case"),
    ],
)
def test_classes_that_may_be_one_are_said_with_how_they_differ(tmp_path: Path, one: str, other: str, differ: str) -> None:
    images = _open(_tree(tmp_path / "d", one, other))
    assert len(images.classes) == 2
    (note,) = images.notes
    assert note.startswith("classes whose names differ only in ")
    assert differ in note


def test_unlike_names_are_not_doubted(tmp_path: Path) -> None:
    assert _open(_tree(tmp_path / "d", "1", "10", "1.5", "cat", "cats", "é", "e")).notes == ()
    (note,) = _open(_tree(tmp_path / "e", "nan", "cat")).notes
    assert note == "classes that are called like a missing value: 'nan' (12 images)"


@pytest.mark.parametrize("bad", [b"cat/caf\xe9.png", b"caf\xe9/00.png", b"cat/\xe9/00.png"])
def test_names_that_are_not_utf8_are_refused_with_file_and_remedy(tmp_path: Path, bad: bytes) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    path = Path(os.fsdecode(os.fsencode(root) + b"/" + bad))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((root / "cat" / "00.png").read_bytes())
    said = _refused(root, r"xe9.*: the name is not UTF-8.*convmv")
    said.encode()  # it can be printed
    path.unlink()
    (root / "cat" / os.fsdecode(b"x.\xe9")).write_text("no image")
    if path.parent.name in ("cat", "dog"):
        assert _open(root).notes == (r"files that are not images by their suffix are left out: 1 .\xe9",)


def test_names_that_python_reads_in_another_encoding_are_said(tmp_path: Path) -> None:
    """Its own choice is UTF-8 also in the locale C; somebody has to turn that off."""
    code = "import sys; from pathlib import Path; from tltrain.data.sources.names import check_utf8; check_utf8(Path(sys.argv[1]))"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, wrong in (("d/cat/00.png", False), ("d/k\u00e4fer/00.png", True)):
        done = subprocess.run([sys.executable, "-c", code, name], env=ascii_only, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) is wrong
        assert ("this Python reads file names as ascii" in done.stderr and "PYTHONUTF8=1" in done.stderr) is wrong


# --- files that are no files


def test_a_named_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    root = _tree(tmp_path / "d", "cat", "dog")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "dog" / "zero.png").symlink_to("/dev/zero")
    (note,) = _open(root, max_unreadable=0.1).notes
    assert "pipe.png (a named pipe, not a file)" in note
    assert "zero.png (a device, not a file)" in note
