"""torchvision:NAME on small sets in torchvision's own forms on the disk: idx files, MATLAB files, binaries, folders with lists."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_files import digit_rows, expected, looks
from published_files import aircraft, country211, dtd, eurosat, grey_digits, gtsrb, mnist, pcam, pets
from scipy.io import savemat
from torchvision import datasets

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images, outline_images
from tltrain.data.published import pcam as pcam_files
from tltrain.data.published import torchvision_sets as sets

NUM = {"train": 24, "test": 12}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "unresolved", lambda url: "the host has no address here: is there a network?")


def _open(name: str, root: Path, **options: Any) -> DataSplits:
    return open_images(Data(source=f"torchvision:{name}", **options), root)


def test_mnist_has_its_own_test_split_and_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path, digit_rows())
    with pytest.raises(UserError, match=r"no readable training image of class 3 - three"):
        _open("mnist", tmp_path)
    monkeypatch.setattr(datasets.MNIST, "classes", ["0 - zero", "1 - one", "2 - two"])  # the digits that these files hold
    images = _open("mnist", tmp_path, val_fraction=0)
    assert images.classes == ("0 - zero", "1 - one", "2 - two")
    for split, name in ((images.train, "train"), (images.test, "test")):
        grey = grey_digits([row for row in digit_rows() if row.split == name])
        assert looks(split) == sorted((label, np.repeat(pixels[..., None], 3, axis=2).tobytes()) for pixels, label in grey)
    assert images.source is not None
    assert len(set(images.source.digests)) == sum(NUM.values()), "of each image"
    assert _open("MNIST", tmp_path, val_fraction=0).fingerprint == images.fingerprint


def test_svhn_is_read_from_its_matlab_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    label_N = np.arange(30) % 10
    listed = {}
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": drawn[part].transpose(1, 2, 3, 0), "y": np.where(label_N[part] == 0, 10, label_N[part])[:, None]})
        listed[split] = [f"http://x/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)  # with the sums of these files
    images = _open("svhn", tmp_path, val_fraction=0)
    assert images.classes == tuple("0123456789")
    assert images.test is not None
    assert images.test.labels.tolist() == label_N[20:].tolist(), "10 stands for 0 there"
    assert all(np.array_equal(np.asarray(images.test.read(i)), drawn[20 + i]) for i in range(10))


def test_dtd_is_read_from_its_lists_and_checked_as_every_file_is(tmp_path: Path) -> None:
    dtd(tmp_path, digit_rows())
    images = _open("dtd", tmp_path)
    assert images.classes == ("kind 0", "kind 1", "kind 2")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert images.train.ids[0] == "dtd/dtd/images/kind 0/train_0.jpg"
    (tmp_path / "dtd/dtd/images/kind 0/train_0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"torchvision:DTD: 1 of 45 images cannot be read.*train_0.jpg \(the file is empty\)"):
        _open("dtd", tmp_path, max_unreadable=0)


def test_pcam_is_copied_out_of_its_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pcam(tmp_path, digit_rows())
    images = _open("pcam", tmp_path)
    assert images.classes == ("no tumor tissue", "tumor tissue")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name, 2)
    with monkeypatch.context() as patched:
        patched.setattr(pcam_files, "_copied", None)
        assert _open("PCAM", tmp_path).fingerprint == images.fingerprint
    copy = next((tmp_path / "cache" / "packs").glob("pcam-*.npy"))
    copy.with_suffix(".json").write_text("{")
    assert _open("pcam", tmp_path).fingerprint == images.fingerprint, "what was noted is made anew"
    file = tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"split_test_x.h5 or the file of its classes is not whole: .*; delete it, and start again"):
        _open("pcam", tmp_path)


def test_folders_of_classes_and_those_without_splits(tmp_path: Path) -> None:
    eurosat(tmp_path, digit_rows())
    images = _open("EuroSAT", tmp_path)
    assert images.classes == ("Land0", "Land1", "Land2")
    assert images.test is not None
    assert len(images.test) == 6, "cut from train, since the set has no test split"


@pytest.mark.parametrize(
    ("name", "classes", "has_val"),
    [
        ("gtsrb", ("00000", "00001", "00002"), False),
        ("oxford-iiit-pet", ("Kind 0", "Kind 1", "Kind 2"), False),
        ("fgvc-aircraft", ("kind 0", "kind 1", "kind 2"), True),
        ("country211", ("C0", "C1", "C2"), True),
    ],
)
def test_splits_and_classes_are_those_of_the_set(name: str, classes: tuple[str, ...], has_val: bool, tmp_path: Path) -> None:
    written = {"gtsrb": gtsrb, "oxford-iiit-pet": pets, "fgvc-aircraft": aircraft, "country211": country211}[name]
    written(tmp_path, digit_rows())
    images = _open(name, tmp_path, val_fraction=0)
    assert images.classes == classes
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))
    assert (images.val is None) == (not has_val)
    assert not has_val or looks(images.val) == expected("val")


@pytest.mark.parametrize("name", sets.SETS)
def test_what_is_absent_is_one_message_with_the_folder_and_the_address(tmp_path: Path, name: str) -> None:
    if name == "PCAM":
        pytest.importorskip("h5py")
    with pytest.raises(UserError) as caught:
        _open(name, tmp_path)
    known = sets.SETS[name]
    assert all(
        text in str(caught.value) for text in (f"torchvision:{name} is not whole in {tmp_path}", known.url, known.folder, "network?")
    )
    with pytest.raises(UserError, match=rf"torchvision:{name} is not in .* yet, and a plan downloads nothing"):
        outline_images(Data(source=f"torchvision:{name}"), tmp_path)


def test_names_are_found_whatever_their_case_and_suggested(tmp_path: Path) -> None:
    dtd(tmp_path, digit_rows())
    assert _open("DtD", tmp_path).fingerprint == _open("dtd", tmp_path).fingerprint
    for given, meant in (("flowers-102x", "Flowers102"), ("oxford-iiit-pets", "OxfordIIITPet"), ("fashion", "FashionMNIST")):
        with pytest.raises(UserError, match=rf"data.source is torchvision:{given}; did you mean torchvision:{meant}\?"):
            _open(given, tmp_path)
    with pytest.raises(UserError, match=r"it can be Flowers102, OxfordIIITPet, Food101"):
        _open("zzz", tmp_path)
