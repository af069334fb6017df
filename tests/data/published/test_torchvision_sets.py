"""torchvision:NAME on small sets in torchvision's own forms on the disk: idx files, MATLAB files, binaries, folders with lists."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_files import digit_rows, expected, looks
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images, outline_images
from tltrain.data.published import pcam
from tltrain.data.published import torchvision_sets as sets

NUM = {"train": 24, "test": 12}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "unresolved", lambda url: "the host has no address here: is there a network?")


def _open(name: str, root: Path, **options: Any) -> DataSplits:
    return open_images(Data(source=f"torchvision:{name}", **options), root)


def _rows(split: str) -> list[tuple[np.ndarray, int]]:
    """Grey digits of 28 x 28 pixels with their labels."""
    rows = [row for row in digit_rows() if row.split == split]
    return [(np.asarray(Image.open(io.BytesIO(row.content)).convert("L").resize((28, 28))), row.label) for row in rows]


def _mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = zip(*_rows(split), strict=True)
        head = (len(pixels)).to_bytes(4, "big")
        image_head = b"\0\0\x08\x03" + head + (28).to_bytes(4, "big") * 2
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(image_head + np.stack(pixels).tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + head + bytes(labels))


def _dtd(root: Path) -> None:
    for split in ("train", "val", "test"):
        names = []
        for i, row in enumerate(row for row in digit_rows() if row.split == split):
            name = f"kind {row.label}/{split}_{i}.jpg"
            path = root / "dtd" / "dtd" / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.content)
            names.append(name)
        listing = root / "dtd" / "dtd" / "labels" / f"{split}1.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names) + "\n")


def test_mnist_has_its_own_test_split_and_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _mnist(tmp_path)
    with pytest.raises(UserError, match=r"no readable training image of class 3 - three"):
        _open("mnist", tmp_path)
    monkeypatch.setattr(datasets.MNIST, "classes", ["0 - zero", "1 - one", "2 - two"])  # the digits that these files hold
    images = _open("mnist", tmp_path, val_fraction=0)
    assert images.classes == ("0 - zero", "1 - one", "2 - two")
    for split, name in ((images.train, "train"), (images.test, "test")):
        assert looks(split) == sorted((label, np.repeat(pixels[..., None], 3, axis=2).tobytes()) for pixels, label in _rows(name))
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
    _dtd(tmp_path)
    images = _open("dtd", tmp_path)
    assert images.classes == ("kind 0", "kind 1", "kind 2")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name)
    assert images.train.ids[0] == "dtd/dtd/images/kind 0/train_0.jpg"
    (tmp_path / "dtd/dtd/images/kind 0/train_0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"torchvision:DTD: 1 of 45 images cannot be read.*train_0.jpg \(the file is empty\)"):
        _open("dtd", tmp_path, max_unreadable=0)


def _pcam(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir()
    for split, word in (("train", "train"), ("val", "valid"), ("test", "test")):
        rows = [row for row in digit_rows(2) if row.split == split]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row.content)).convert("RGB")) for row in rows])
        for kind, name, values in (("x", "x", pixels), ("y", "y", np.array([row.label for row in rows])[:, None, None, None])):
            with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{word}_{kind}.h5", "w") as file:
                file.create_dataset(name, data=values.astype(np.uint8), compression="gzip")


def test_pcam_is_copied_out_of_its_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pcam(tmp_path)
    images = _open("pcam", tmp_path)
    assert images.classes == ("no tumor tissue", "tumor tissue")
    for split, name in ((images.train, "train"), (images.val, "val"), (images.test, "test")):
        assert looks(split) == expected(name, 2)
    with monkeypatch.context() as patched:
        patched.setattr(pcam, "_copied", None)
        assert _open("PCAM", tmp_path).fingerprint == images.fingerprint
    copy = next((tmp_path / "cache" / "packs").glob("pcam-*.npy"))
    copy.with_suffix(".json").write_text("{")
    assert _open("pcam", tmp_path).fingerprint == images.fingerprint, "what was noted is made anew"
    file = tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"split_test_x.h5 or the file of its classes is not whole: .*; delete it, and start again"):
        _open("pcam", tmp_path)


def test_folders_of_classes_and_those_without_splits(tmp_path: Path) -> None:
    for i, row in enumerate(row for row in digit_rows() if row.split == "train"):
        for path in (
            tmp_path / "eurosat/2750" / f"Land{row.label}" / f"{i}.jpg",
            tmp_path / "gtsrb/GTSRB/Training" / f"{row.label:05d}" / f"{i}.ppm",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row.content)
    images = _open("EuroSAT", tmp_path)
    assert images.classes == ("Land0", "Land1", "Land2")
    assert images.test is not None
    assert len(images.test) == 6, "cut from train, since the set has no test split"
    test = tmp_path / "gtsrb/GTSRB/Final_Test/Images"
    test.mkdir(parents=True)
    lines = ["Filename;Width;Height;ClassId"]
    for i, row in enumerate(row for row in digit_rows() if row.split == "test"):
        (test / f"{i:05d}.ppm").write_bytes(row.content)
        lines.append(f"{i:05d}.ppm;48;40;{row.label}")
    (tmp_path / "gtsrb/GT-final_test.csv").write_text("\n".join(lines) + "\n")
    signs = _open("gtsrb", tmp_path, val_fraction=0)
    assert signs.classes == ("00000", "00001", "00002")
    assert (looks(signs.train), looks(signs.test)) == (expected("train"), expected("test"))


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
    _dtd(tmp_path)
    assert _open("DtD", tmp_path).fingerprint == _open("dtd", tmp_path).fingerprint
    for given, meant in (("flowers-102x", "Flowers102"), ("oxford-iiit-pets", "OxfordIIITPet"), ("fashion", "FashionMNIST")):
        with pytest.raises(UserError, match=rf"data.source is torchvision:{given}; did you mean torchvision:{meant}\?"):
            _open(given, tmp_path)
    with pytest.raises(UserError, match=r"it can be Flowers102, OxfordIIITPet, Food101"):
        _open("zzz", tmp_path)
