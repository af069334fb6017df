"""What decoders say besides the picture: each word stands beside the file that it is about, and nowhere else."""

from __future__ import annotations

import io
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from photo_files import scene
from PIL import Image

from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.decode import decode
from tltrain.data.pictures import checks
from tltrain.data.pictures.warned import about, recorded


def damaged_tiff(compression: str = "tiff_lzw") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene(96, 72, seed=0)).save(stream, "TIFF", compression=compression)
    content = bytearray(stream.getvalue())
    third = len(content) // 3
    content[third : third + 400] = b"\xa5" * 400
    return bytes(content)


def bitmap(runs: bytes, bits: int = 8, width: int = 10, height: int = 2) -> bytes:
    """A run-length coded BMP, black and white. A third colour: Pillow 11 reads none that is of two greys alone."""
    palette = b"\0\0\0\0\xff\xff\xff\0\0\0\xff\0"
    offset = 54 + len(palette)
    header = b"BM" + (offset + len(runs)).to_bytes(4, "little") + bytes(4) + offset.to_bytes(4, "little")
    numbers = [(40, 4), (width, 4), (height, 4), (1, 2), (bits, 2), (1 if bits == 8 else 2, 4), (len(runs), 4), (0, 8), (3, 4), (0, 4)]
    return header + b"".join(value.to_bytes(size, "little") for value, size in numbers) + palette + runs


WHITE_ROW = b"\x0a\x01\0\0"


@pytest.mark.parametrize(
    ("runs", "bits"),
    [
        (WHITE_ROW + WHITE_ROW + b"\0\x01", 8),
        (b"\x0a\x11\0\0\x0a\x11\0\x01", 4),
        (b"\x10\x01\0\0" + WHITE_ROW + b"\0\x01", 8),  # the padding of a row is coded too
        (b"\0\x0a" + b"\x01" * 10 + b"\0\0" + WHITE_ROW + b"\0\x01", 8),  # not coded
        (b"\0\x0a" + b"\x11" * 5 + b"\0" + b"\0\0" + b"\x0a\x11\0\x01", 4),  # not coded, and padded to an even number of bytes
        (b"\0\x02\x08\x00\x02\x01\0\0" + WHITE_ROW + b"\0\x01", 8),  # eight pixels are passed over
    ],
)
def test_a_bitmap_of_run_lengths_is_read(runs: bytes, bits: int) -> None:
    if checks.PILLOW < checks.READS_SKIPS and runs.startswith(b"\0\x02"):
        with pytest.raises(ValueError, match="passes over pixels"):
            decode(bitmap(runs, bits))
        return
    seen = np.asarray(decode(bitmap(runs, bits)))
    assert seen.shape == (2, 10, 3)
    assert (seen[0] == 255).all(), "the first row that is coded is the lowest, and the upper one is white in all"


@pytest.mark.parametrize(
    "runs",
    [
        WHITE_ROW + b"\xff\x01\0\0\0\x01",  # a run behind the end of the row
        WHITE_ROW + b"\0\0" + WHITE_ROW + b"\0\x01",  # a third row
        b"\0\x02\x30\x00\x02\x01\0\0" + WHITE_ROW + b"\0\x01",  # passes over more than the row
        WHITE_ROW + b"\0\x14" + b"\x01" * 20 + b"\0\x01",  # not coded, twice as long as the row
    ],
)
def test_run_lengths_that_leave_the_bitmap_are_refused(runs: bytes) -> None:
    with pytest.raises(ValueError, match=r"a damaged BMP: its run lengths lead out of the picture|which Pillow 1.* misreads"):
        decode(bitmap(runs))


def test_what_libtiff_says_is_the_error_of_its_file_and_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    lzw, deflate = damaged_tiff("tiff_lzw"), damaged_tiff("tiff_adobe_deflate")

    def said(content: bytes) -> str:
        with pytest.raises(OSError, match=" ") as refused:
            decode(content)
        return str(refused.value)

    alone = said(lzw), said(deflate)
    assert alone[0] != alone[1]
    assert not any("decoder error" in text for text in alone)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(said, [lzw, deflate] * 40)) == list(alone) * 40
    assert capfd.readouterr() == ("", "")


def test_a_file_that_pillow_logs_of_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=" "):
        decode(damaged_tiff())  # sets Pillow up
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded: %s", 65535)
    assert capfd.readouterr().err == ""


def test_a_warning_is_kept_for_the_file_that_its_thread_decodes(capfd: pytest.CaptureFixture[str]) -> None:
    def warn(name: str) -> None:
        with about(name):
            warnings.warn_explicit(f"of {name}\nand more", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")

    with recorded() as said, ThreadPoolExecutor(4) as threads:
        list(threads.map(warn, "abcd" * 5))
    assert said == {name: f"of {name}" for name in "abcd"}
    assert capfd.readouterr().err == ""
    with pytest.warns(UserWarning, match="of nobody"), recorded() as said:
        warnings.warn_explicit("of nobody", UserWarning, "x.py", 1, "PIL.x")
    assert said == {}


def test_a_scan_names_the_file_that_libtiff_speaks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    for k, name in enumerate("ab"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(scene(96, 72, seed=100 * k + i)).save(tmp_path / "d" / name / f"{i}.png")
    (tmp_path / "d" / "b" / "odd.tif").write_bytes(damaged_tiff())
    for _ in range(2):
        notes = " | ".join(open_images(Data(source=f"folder:{tmp_path / 'd'}", max_unreadable=0.1)).notes)
        assert "odd.tif (" in notes
        assert "decoder error" not in notes
    assert capfd.readouterr() == ("", "")
