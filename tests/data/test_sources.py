"""Sources on real files: folders, tables, CIFAR's own archive, digits; what is refused, and what is said."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Split, open_images
from tltrain.data.decode import opened
from tltrain.data.sources import scan as scanning


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels_HWC = np.random.default_rng(value).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(path)


def _classes(root: Path, names: str = "ab", num: int = 20, first: int = 0) -> Path:
    for k, name in enumerate(names):
        for i in range(num):
            _image(root / name / f"{i:03}.png", first + 1000 * k + i)
    return root


def _open(source: object, **options: Any) -> DataSplits:
    return open_images(Data(source=str(source), **options))


def _refused(source: object, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        _open(source, **options)


def _ids(*splits: Split | None) -> list[str]:
    return [name for split in splits if split is not None for name in split.ids]


# --- folders


def test_one_folder_is_split_stratified(tmp_path: Path) -> None:
    images = _open(f"folder:{_classes(tmp_path / 'd', 'abc', 20)}")
    assert images.classes == ("a", "b", "c")
    assert images.val is not None
    assert images.test is not None
    assert np.bincount(images.test.labels).tolist() == [4, 4, 4]
    assert np.bincount(images.val.labels).tolist() == [2, 2, 2]  # a tenth of the 16 that are left, 1.6
    everyone = _ids(images.train, images.val, images.test)
    assert sorted(everyone) == sorted({f"{c}/{i:03}.png" for c in "abc" for i in range(20)})
    assert images.notes == ()
    for split in (images.train, images.val, images.test):
        for i, name in enumerate(split.ids):
            assert images.classes[split.labels[i]] == name[0]
            expected = Image.open(tmp_path / "d" / name).convert("RGB")
            assert np.array_equal(np.asarray(split.read(i)), np.asarray(expected))


def test_the_seed_draws_the_splits(tmp_path: Path) -> None:
    source = f"folder:{_classes(tmp_path / 'd')}"
    first, again, other = _open(source), _open(source), _open(source, seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert _ids(first.test) == _ids(again.test) != _ids(other.test)


def test_declared_splits_and_one_class_list(tmp_path: Path) -> None:
    root = tmp_path / "d"
    _classes(root / "train", "abc")
    _classes(root / "valid", "c", 3, first=7000)  # indexed on its own, c would be class 0 here
    _image(root / "train" / ".checkpoints" / "x.png", 1)
    images = _open(f"folder:{root}", test_fraction=0)
    assert images.val is not None
    assert images.val.labels.tolist() == [2, 2, 2]
    assert len(images.train) == 60
    assert images.test is None
    assert images.notes == ("passed over, hidden: train/.checkpoints", "val has no image of class a, b")


def test_per_class_keeps_that_many_of_train_only(tmp_path: Path) -> None:
    source = f"folder:{_classes(tmp_path / 'd')}"
    few, all_ = _open(source, per_class=3), _open(source)
    assert np.bincount(few.train.labels).tolist() == [3, 3]
    assert _ids(few.val, few.test) == _ids(all_.val, all_.test)
    assert set(few.train.ids) < set(all_.train.ids)
    assert few.fingerprint != all_.fingerprint


def test_per_class_is_drawn_by_the_datas_seed(tmp_path: Path) -> None:
    """The folder says itself what is val and test, so that the seed has nothing else to draw."""
    for name in ("train", "val", "test"):
        _classes(tmp_path / "d" / name, "ab", 12, first=ord(name[0]) * 10_000)
    drawn = [_open(f"folder:{tmp_path / 'd'}", per_class=3, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert len({tuple(_ids(images.val, images.test)) for images in drawn}) == 1
    assert all(np.bincount(images.train.labels).tolist() == [3, 3] for images in drawn)
    assert drawn[0].train.ids == drawn[1].train.ids
    assert drawn[0].fingerprint == drawn[1].fingerprint
    assert len({images.train.ids for images in drawn[1:]}) == 4
    assert len({images.fingerprint for images in drawn[1:]}) == 4


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    _refused(f"folder:{tmp_path / 'absent'}", "absent is not a folder")
    for text, form in (("folder:", "folder:PATH"), ("csv:", "csv:PATH"), ("zip:", "zip:FILE"), ("lmdb:", "lmdb:PATH")):
        _refused(text, f"data.source is '{text}'; did you mean {form}")
    _refused("foldr:x", "data.source is 'foldr:x'; did you mean folder:PATH")
    _refused("digit", "did you mean digits")
    _refused(str(tmp_path), f"data.source is '{tmp_path}'; did you mean folder:{tmp_path}")
    (tmp_path / "set.zip").touch()
    _refused(f"{tmp_path}/set.zip", f"did you mean zip:{tmp_path}/set.zip")
    _refused("imagenet-22k", "it can be cifar10, ")
    (tmp_path / "flat").mkdir()
    _image(tmp_path / "flat" / "a.png", 1)
    _refused(f"folder:{tmp_path / 'flat'}", "no subfolders; put the images of each class")
    _refused(f"folder:{_classes(tmp_path / 'one', 'a')}", "has 1 class")
    root = _classes(tmp_path / "empty")
    (root / "hollow").mkdir()
    (root / "hollow" / "note.txt").write_text("no image")
    _refused(f"folder:{root}", r"class folder .*hollow has no image")


def test_splits_that_contradict_are_refused(tmp_path: Path) -> None:
    _classes(tmp_path / "a" / "train", "ab", 3)
    _classes(tmp_path / "a" / "test", "abc", 3, first=50)
    _refused(f"folder:{tmp_path / 'a'}", "test/c has no counterpart below train")
    _classes(tmp_path / "b" / "val", "ab", 3)
    _classes(tmp_path / "b" / "test", "ab", 3)
    _refused(f"folder:{tmp_path / 'b'}", "has test, val and no train")
    for name in ("train", "val", "valid"):
        _classes(tmp_path / "c" / name, "ab", 3)
    _refused(f"folder:{tmp_path / 'c'}", "two of which mean val")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        _classes(tmp_path / "d", (name[0]), 0)
        for i in range(10):
            _image(tmp_path / "d" / name / f"{i}.png", i + len(name) * 100)
    assert _open(f"folder:{tmp_path / 'd'}").classes == ("bus", "train")


def test_other_files_are_counted(tmp_path: Path) -> None:
    root = _classes(tmp_path / "d")
    (root / "a" / "x.mov").write_bytes(b"?")
    (root / "a" / ".DS_Store").write_bytes(b"?")
    assert _open(f"folder:{root}").notes == ("files that are not images by their suffix are left out: 1 .mov",)


# --- the scan


def test_a_share_of_unreadable_files_is_whole_files(tmp_path: Path) -> None:
    root = _classes(tmp_path / "d")
    (root / "a" / "text.jpg").write_text("I am not an image")
    (note,) = _open(f"folder:{root}").notes  # 1 % of 41 files is one
    assert note.startswith("1 of 41 images cannot be read and are left out")
    _refused(f"folder:{root}", r"1 of 41 images cannot be read, and max_unreadable = 0 allows 0: .*text\.jpg", max_unreadable=0)
    (root / "b" / "text.jpg").write_text("Nor am I")
    _refused(f"folder:{root}", r"2 of 42 images cannot be read, and max_unreadable = 0\.01 allows 1: .*text\.jpg \(not an image of a kind")


def test_few_unreadable_files_are_listed_and_left_out(tmp_path: Path) -> None:
    root = _classes(tmp_path / "d")
    whole = (root / "a" / "000.png").read_bytes()
    (root / "a" / "0000-text.jpg").write_text("I am not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    (root / "b" / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:2000])
    (root / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "nothing.png").write_bytes(b"")
    images = _open(f"folder:{root}", max_unreadable=0.1)
    (note,) = images.notes
    assert note.startswith("4 of 44 images cannot be read and are left out")
    assert all(name in note for name in ("0000-text.jpg (not an image", "cut.jpg (", "cut.png (", "nothing.png (the file is empty"))
    names = _ids(images.train, images.val, images.test)
    assert len(names) == 40
    assert not any("cut" in name or "text" in name for name in names)
    for i, name in enumerate(images.train.ids):  # the numbers behind a gap still find their file
        assert np.array_equal(np.asarray(images.train.read(i)), np.asarray(Image.open(root / name)))


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    root = _classes(tmp_path / "d")
    (root / "c").mkdir()
    (root / "c" / "text.jpg").write_text("I am not an image")
    _refused(
        f"folder:{root}",
        r"no readable training image of class c; add some, .*; 1 of 41 images cannot be read .*text.jpg",
        max_unreadable=0.5,
    )


def test_byte_identical_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "d"
    _classes(root / "train", "ab")
    _classes(root / "test", "ab", 3, first=9000)
    (root / "test" / "b" / "twin.png").write_bytes((root / "train" / "a" / "004.png").read_bytes())
    _, note = _open(f"folder:{root}", val_fraction=0).notes
    assert "1 byte-identical images are in two splits" in note
    assert "train/a/004.png (train) = test/b/twin.png (test)" in note


def test_byte_identical_images_are_never_parted_by_us(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for c in "ab":
        for i in range(30):
            _image(root / c / f"{i}.png", i // 2 + 1000 * ord(c))
    images = _open(f"folder:{root}")
    assert images.notes == ()
    for split in (images.train, images.val, images.test):
        pairs = [(name[0], int(name[2:-4]) // 2) for name in _ids(split)]
        assert all(pairs.count(pair) == 2 for pair in pairs)


def test_the_scan_is_remembered_by_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"folder:{_classes(tmp_path / 'd')}"
    read: list[str] = []
    real = scanning._read
    monkeypatch.setattr(scanning, "_read", lambda path, white: read.append(path.name) or real(path, white))  # type: ignore[func-returns-value]
    first = _open(source).fingerprint
    assert len(read) == 40
    assert _open(source).fingerprint == first
    assert len(read) == 40
    changed = tmp_path / "d" / "a" / "003.png"
    _image(changed, 31337)
    os.utime(changed, ns=(1, 1))
    assert _open(source).fingerprint != first
    assert read[40:] == ["003.png"]
    for cache in (tmp_path / "cache" / "scans").glob("*.scan"):
        cache.write_text("{ damaged")
    _open(source)
    assert len(read) == 81


def test_an_interrupted_scan_keeps_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"folder:{_classes(tmp_path / 'd')}"
    real = scanning._read

    def interrupted(path: Path, white: int | None) -> Any:
        if path.parent.name == "b":
            raise KeyboardInterrupt
        return real(path, white)

    monkeypatch.setattr(scanning, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _open(source)
    read: list[str] = []
    monkeypatch.setattr(scanning, "_read", lambda path, white: read.append(path.parent.name) or real(path, white))  # type: ignore[func-returns-value]
    _open(source)
    assert set(read) == {"b"}


def test_the_same_data_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    here, there = (_open(f"folder:{_classes(tmp_path / name)}") for name in ("x", "y"))
    assert here.fingerprint == there.fingerprint


# --- tables


def _table(tmp_path: Path, text: str) -> str:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return f"csv:{tmp_path / 't.csv'}"


def test_a_table_with_groups(tmp_path: Path) -> None:
    lines = ["path,label,group"]
    for i in range(120):
        _image(tmp_path / "img" / f"{i}.png", i)
        lines.append(f"img/{i}.png,{'cat' if i // 4 % 2 else 'dog'},patient{i // 4}")
    images = _open(_table(tmp_path, "\n".join(lines)))
    assert images.classes == ("cat", "dog")
    assert images.val is not None
    assert images.test is not None
    where: dict[int, str] = {}
    for split in (images.train, images.val, images.test):
        for name in split.ids:
            assert where.setdefault(int(name[4:-4]) // 4, split.name) == split.name
    assert np.bincount(images.test.labels).tolist() == [12, 12]


def test_a_table_with_splits(tmp_path: Path) -> None:
    for i in range(8):
        _image(tmp_path / f"{i}.png", i)
    rows = [f"{i}.png,{'xy'[i % 2]},{'validation' if i < 2 else 'test' if i < 4 else 'train'},z" for i in range(8)]
    images = _open(_table(tmp_path, "\ufeffpath,label,split,colour\n" + "\n\n".join(rows)))
    assert images.val is not None
    assert images.test is not None
    assert images.val.ids == ("0.png", "1.png")
    assert images.test.ids == ("2.png", "3.png")
    assert images.notes == ("columns that are not used: colour", "classes with fewer than 5 training images: x (2), y (2)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x", "has the columns file, label and not path; the first line names"),
        ("path,label,split\na.png,x,holdout", "line 2: split is 'holdout'; it must be train, val or test"),
        ("path,label,split\na.png,x,train\nb.png,y,", "line 3: split is ''"),
        ("path,label\na.png,x\nb.png,", "line 3: label is empty"),
        ("path,label\na.png,x\na.png,y", r"line 3: a\.png stands in line 2 already"),
        ("path,label,split,group\na.png,x,train,g\nb.png,y,test,g", "line 3: group g is in test, and in line 2 in train"),
        ("path,label,split\na.png,x,train\nb.png,y,test", "no line of split train for class y"),
        ("path,label\na.png,x", "has 1 class"),
        ("", "is empty; the first line names: path,label"),
        ("path,label\na.png,x\nb.png,y", r"2 of 2 images cannot be read.*a\.png \(No such file or directory\)"),
    ],
)
def test_broken_tables_are_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    _refused(_table(tmp_path, text), message)


def test_a_table_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    _refused(f"csv:{tmp_path / 'none.csv'}", "cannot be read as a comma-separated table")
    (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,x")
    _refused(f"csv:{tmp_path / 't.csv'}", "cannot be read as a comma-separated table in UTF-8")
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04" + bytes(200))
    _refused(f"csv:{tmp_path / 't.csv'}", "an Excel file or another archive; save it as CSV")


# --- CIFAR and digits


def _cifar_archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A small archive in CIFAR-10's own format under the name torchvision looks for. Its md5 are put into torchvision's table."""
    from torchvision.datasets import CIFAR10

    pixels_ND = np.random.default_rng(0).integers(0, 256, (120, 3072), dtype=np.uint8)
    files: dict[str, Any] = {
        f"data_batch_{b + 1}": {"data": pixels_ND[20 * b : 20 * b + 20], "labels": [i % 10 for i in range(20)]} for b in range(5)
    }
    files["test_batch"] = {"data": pixels_ND[100:], "labels": [i % 10 for i in range(20)]}
    files["batches.meta"] = {"label_names": [f"class{k}" for k in range(10)]}
    md5 = {}
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        for name, content in files.items():
            data = pickle.dumps(content)
            md5[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return pixels_ND.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_cifar_out_of_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels_NHWC = _cifar_archive(tmp_path / "data", monkeypatch)
    images = open_images(Data(source="cifar10"), tmp_path / "data")
    assert images.val is not None
    assert images.test is not None
    assert (len(images.train), len(images.val), len(images.test)) == (90, 10, 20)
    assert images.classes[3] == "class3"
    assert images.test.ids[0] == "cifar10/100"
    for split in (images.train, images.val, images.test):
        for i in range(len(split)):
            assert np.array_equal(np.asarray(split.read(i)), pixels_NHWC[split.source_index[i]])
            assert split.labels[i] == split.source_index[i] % 10
    assert len(pickle.dumps(images.train.read)) < 3000  # workers get a path, not the pixels
    (tmp_path / "data" / "cifar-10-python.tar.gz").unlink()
    monkeypatch.setenv("TLTRAIN_DATA", str(tmp_path / "data"))
    assert open_images(Data(source="cifar10")).fingerprint == images.fingerprint


def test_cifar_without_archive_and_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")  # nobody answers there
    with pytest.raises(UserError, match=r"put cifar-100-python\.tar\.gz \(md5 eb9058c3a382ffc7106e4002c42a8d85, .*TLTRAIN_DATA") as caught:
        open_images(Data(source="cifar100"), tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value)


def test_a_damaged_cifar_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    _cifar_archive(tmp_path / "data", monkeypatch)
    (tmp_path / "data" / CIFAR10.filename).write_bytes(b"cut off")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="CIFAR10 is not in"):
        open_images(Data(source="cifar10"), tmp_path / "data")


def test_digits(tmp_path: Path) -> None:
    images = _open("digits")
    assert images.val is not None
    assert images.test is not None
    assert len(images.train) + len(images.val) + len(images.test) == 1797
    assert images.train.ids[0] == f"digits/{images.train.source_index[0]}"
    image = images.train.read(0)
    assert image.size == (8, 8)
    assert image.mode == "RGB"
    assert max(np.asarray(split.read(0)).max() for split in (images.train, images.val)) == 255
    assert images.fingerprint == _open("digits").fingerprint


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    _refused(f"folder:{_classes(tmp_path / 'd', num=2)}", "cannot be created: Not a directory; set TLTRAIN_CACHE")


# --- what is odd about images that can be used


def test_blank_images_are_named(tmp_path: Path) -> None:
    root = _classes(tmp_path / "d")
    Image.new("RGB", (40, 30), "white").save(root / "a" / "white.png")
    Image.new("L", (40, 30), 0).save(root / "b" / "black.png")
    Image.new("RGB", (1, 1), "red").save(root / "b" / "dot.png")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(root / "b" / "flat.jpg")
    for _ in range(2):  # read, and then remembered
        notes = " | ".join(_open(f"folder:{root}", max_unreadable=0).notes)
        assert "1 image all white: " in notes
        assert "white.png" in notes
        assert "1 image all black: " in notes
        assert "1 image of a single pixel: " in notes
        assert "1 image of one colour: " in notes


def test_what_pillow_warns_of_names_the_file_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # twice as many are an error, as many a warning
    root = _classes(tmp_path / "d")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(root / "a" / "large.png")
    with warnings.catch_warnings(record=True) as printed:
        notes = " | ".join(_open(f"folder:{root}").notes)
    assert "1 image of which Pillow warns (Image size (3000 pixels) exceeds limit" in notes
    assert "large.png" in notes
    assert not [w for w in printed if "DecompressionBomb" in str(w.category)]


def test_a_want_of_memory_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, whole = _classes(tmp_path / "d"), opened

    def scarce(content: bytes) -> Any:
        raise MemoryError("no memory at the moment")

    monkeypatch.setattr(scanning, "opened", scarce)
    with pytest.raises(UserError, match="no memory at the moment"):
        _open(f"folder:{root}")
    monkeypatch.setattr(scanning, "opened", whole)
    assert _open(f"folder:{root}").notes == ()
