"""Pictures that a disk or a download damaged: what the format can show is refused, and what merely looks like it is a note."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from photo_files import scene
from PIL import Image

from benchmarks import damaged
from benchmarks.damaged import damages, must_be_refused, pictures, wrong_pixels
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.decode import decode


@pytest.mark.parametrize("kind", pictures())
def test_what_a_format_can_show_is_refused(kind: str) -> None:
    content, refused = pictures()[kind], 0
    assert wrong_pixels(content, content) == 0
    for damage in damages(content, 24, seed=3):
        share = wrong_pixels(content, damage.content)
        refused += share is None
        assert share is None or not must_be_refused(kind, damage, content), (damage.how, damage.position, share)
    assert refused >= 6, "every cut"


def test_the_benchmark_fails_where_damage_is_accepted(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    bitmap = pictures()["bmp"]
    monkeypatch.setattr(damaged, "pictures", lambda: {"bmp": bitmap})
    with pytest.raises(SystemExit) as ended:
        damaged.main(["--trials", "8"])
    assert not ended.value.code
    monkeypatch.setattr(damaged, "SHOWN", {"bmp": ("zeros",)})  # which a bitmap cannot show
    with pytest.raises(SystemExit) as ended:
        damaged.main(["--trials", "8"])
    assert ended.value.code
    assert "bmp, zeros at" in capfd.readouterr().out


def test_a_jpeg_whose_rest_is_zeros_is_refused() -> None:
    """libjpeg makes grey or smeared pixels of them without an error, where a zero byte stands for enough of them."""
    content = pictures()["jpeg"]
    for share in (0.3, 0.5, 0.9):
        kept = int(share * len(content))
        with pytest.raises(ValueError, match="a truncated JPEG"):
            decode(content[:kept] + bytes(len(content) - kept))


def test_what_stands_behind_the_end_of_a_jpeg_and_in_its_segments_does_no_harm() -> None:
    """Phones append videos and gain maps; a thumbnail in EXIF has an end of its own."""
    content = pictures()["jpeg"]
    for tail in (bytes(500), b"\0\0\0\x18ftypmp42" + bytes(200)):
        assert np.array_equal(np.asarray(decode(content + tail)), np.asarray(decode(content)))
    thumbnail = b"\xff\xe1" + (len(content) + 8).to_bytes(2, "big") + b"Exif\0\0" + content
    inside = content[:2] + thumbnail + content[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow finds no EXIF in there
        assert np.array_equal(np.asarray(decode(inside)), np.asarray(decode(content)))
        kept = len(thumbnail) + len(content) * 2 // 3
        with pytest.raises(ValueError, match="a truncated JPEG"):
            decode(inside[:kept] + bytes(len(inside) - kept))


def test_a_tail_of_zeros_that_a_format_cannot_show_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    for k, name in enumerate("ab"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(scene(96, 72, seed=100 * k + i)).save(tmp_path / "d" / name / f"{i}.webp", quality=90)
    assert open_images(Data(source=f"folder:{tmp_path / 'd'}")).notes == ()
    broken = tmp_path / "d" / "a" / "3.webp"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    notes = " | ".join(open_images(Data(source=f"folder:{tmp_path / 'd'}")).notes)
    assert "1 image whose last tenth or more is zeros, as a broken download leaves them" in notes
    assert "3.webp" in notes
