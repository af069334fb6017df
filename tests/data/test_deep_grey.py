"""Grey images with 16 bits whose camera has fewer: what a scan says of them, and what data.white makes of them everywhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_files import scene
from PIL import Image
from pydantic import ValidationError

from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.decode import as_seen, decode
from tltrain.data.views import Preprocess
from tltrain.evaluation.predict import evaluation_view


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _microscope(root: Path, white: int = 4095, suffix: str = "png", num: int = 12) -> Path:
    """Two classes of grey images with 16 bits, with values from 0 to `white`."""
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            grey_HW = scene(24, 20, seed=100 * k + i)[..., 0].astype(np.uint32) * white // 255
            grey_HW[0, :2] = 0, white
            Image.fromarray(grey_HW.astype(np.uint16)).save(root / name / f"{i:02}-{suffix}.{suffix}")
    return root


def _open(root: Path, **options: Any) -> DataSplits:
    return open_images(Data(source=f"folder:{root}", **options))


def _notes(root: Path, **options: Any) -> str:
    return " | ".join(_open(root, **options).notes)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_twelve_bits_in_sixteen_are_said_and_scaled(tmp_path: Path, suffix: str) -> None:
    root = _microscope(tmp_path / "d", suffix=suffix)
    for _ in range(2):  # read, and then remembered
        notes = _notes(root)
        assert "24 of 24 images are grey with 16 bits, and no value in them is above 4095" in notes
        assert "If they hold 12 bits" in notes
        assert "set data.white to 4095" in notes
        assert np.asarray(_open(root).train.read(0)).max() == 16
    assert _notes(root, white=4095) == ""
    scaled = _open(root, white=4095).train
    with Image.open(root / scaled.ids[3]) as image:
        stored_HW = np.asarray(image).astype(int)
    assert abs(np.asarray(scaled.read(3))[..., 1] - stored_HW * 255 / 4095).max() <= 0.5


def test_whites_are_other_data_and_other_caches(tmp_path: Path) -> None:
    root = _microscope(tmp_path / "d")
    fingerprints = {_open(root, white=white).fingerprint for white in (None, 4095, 1023, 4095, None)}
    assert len(fingerprints) == 3
    assert len(list((tmp_path / "cache" / "scans").glob("*.scan"))) == 3


def test_values_beyond_white_and_a_white_far_beyond_them_are_said(tmp_path: Path) -> None:
    root = _microscope(tmp_path / "d")
    Image.fromarray(np.full((9, 9), 5000, np.uint16)).save(root / "a" / "bright.png")
    notes = _notes(root, white=4095)
    assert "25 of 25 images are grey with 16 bits, and 1 of them hold values above data.white = 4095, shown as white: " in notes
    assert "bright.png" in notes
    (root / "a" / "bright.png").unlink()
    assert "no value in them is above 4095, where 16383 is white" in _notes(root, white=16383)


def test_a_second_camera_is_said_by_its_files(tmp_path: Path) -> None:
    root = _microscope(tmp_path / "d", white=65535, num=11)
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(root / "b" / "other.png")
    notes = _notes(root)
    assert "1 of them hold no value above 4095, where others go up to 65535" in notes
    assert "other.png" in notes


def test_ordinary_images_are_not_doubted_and_a_white_without_effect_is_said(tmp_path: Path) -> None:
    assert _notes(_microscope(tmp_path / "full", white=65535)) == ""
    for name in "ab":
        (tmp_path / "plain" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(scene(12, 10, seed=100 * ord(name) + i)).save(tmp_path / "plain" / name / f"{i}.png")
    assert _notes(tmp_path / "plain") == ""
    assert "no image is grey with 16 bits: it changes nothing" in _notes(tmp_path / "plain", white=4095)
    assert "digits has no image files" in " | ".join(open_images(Data(source="digits", white=4095)).notes)


def test_colour_of_16_bits_that_is_dark_is_said(tmp_path: Path) -> None:
    root = _microscope(tmp_path / "d", white=65535)
    pixels = np.full((4, 4, 3), 4000, np.uint16)  # Pillow writes no such file: a PNG of its own
    (root / "a" / "colour.png").write_bytes(_png(pixels))
    assert np.asarray(decode(_png(pixels * 16)))[0, 0, 0] == 250
    notes = _notes(root)
    assert "1 image of 16 bits in colour (or transparent) without a value above 4095, seen dark" in notes
    assert "colour.png" in notes


def _png(pixels_HWC: np.ndarray) -> bytes:
    """A PNG in colour with 16 bits a channel."""
    import struct
    import zlib

    height, width = pixels_HWC.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    framed = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_white_is_of_zero_is_white_and_of_transparency_too() -> None:
    stored_HW = np.array([[0, 1000, 4095, 4500]], np.uint16)
    stream = io.BytesIO()
    Image.fromarray(stored_HW).save(stream, "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode(stream.getvalue(), 4095))[0, :, 0].tolist() == [255, 193, 0, 0]
    stream = io.BytesIO()
    Image.fromarray(stored_HW).save(stream, "PNG", transparency=4500)
    assert np.asarray(decode(stream.getvalue(), 4095))[0, :, 0].tolist() == [0, 62, 255, 255]
    assert np.asarray(decode(stream.getvalue(), 2000))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_one_white_for_files_and_images_that_are_predicted(tmp_path: Path) -> None:
    path = _microscope(tmp_path / "d", num=1) / "a" / "00-png.png"
    with Image.open(path) as image:
        expected = np.asarray(as_seen(image, 4095))
    assert expected.max() == 255
    with Image.open(path) as image:
        for picture in (path, image):
            view = evaluation_view(picture, Preprocess(20, 20), 4095)
            assert torch.equal(torch.as_tensor(view), torch.as_tensor(evaluation_view(Image.fromarray(expected), Preprocess(20, 20))))


@pytest.mark.parametrize("white", [0, -1, 65536, 4095.5])
def test_a_white_that_none_can_have_is_refused(white: Any) -> None:
    with pytest.raises(ValidationError, match="white"):
        Data(source="digits", white=white)
