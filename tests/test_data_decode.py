"""Files as people have them, decoded to what people see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tltrain.data.decode import decode, read_image
from tltrain.errors import UserError


def _decoded(path: Path) -> np.ndarray:
    image = decode(path.read_bytes())
    assert image.mode == "RGB"
    return np.asarray(image)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright_HWC = np.zeros((16, 48, 3), np.uint8)
    upright_HWC[:, :24] = (255, 0, 0)  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(upright_HWC).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = _decoded(tmp_path / "a.jpg")
    assert seen.shape == (48, 16, 3)
    assert seen[2, 8, 0] > 200
    assert seen[45, 8, 0] < 50


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1"])
def test_transparency_is_put_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 8), 0)  # black, and transparent
        image.paste(Image.new(mode, (8, 4), (0, 255) if mode == "LA" else (0, 0, 0, 255)), (0, 0))
        image.save(path)
    else:
        image = Image.new(mode, (8, 8), 0)
        image.paste(1 if mode == "P" else (9, 9, 9) if mode == "RGB" else 1, (0, 0, 8, 4))
        if mode == "P":
            image.putpalette([0, 0, 200, 9, 9, 9])
        image.save(path, transparency=(0, 0, 0) if mode == "RGB" else 0)
    seen = _decoded(path)
    assert (seen[5:] == 255).all()
    assert (seen[:4] < 10).all() or mode == "1"


def test_a_palette_with_half_transparency_is_blended(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0])
    image.save(tmp_path / "a.png", transparency=bytes([128]))
    assert abs(int(_decoded(tmp_path / "a.png")[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str) -> None:
    pixels_HW = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(pixels_HW).save(tmp_path / f"a.{suffix}")
    assert _decoded(tmp_path / f"a.{suffix}")[..., 1].tolist() == [[0, 100], [200, 255]]


def test_16_bits_with_a_transparent_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100]], np.uint16)).save(tmp_path / "a.png", transparency=0)
    assert _decoded(tmp_path / "a.png")[0, :, 0].tolist() == [255, 100]


def test_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="no known white"):
        decode((tmp_path / "a.tif").read_bytes())


def test_cmyk_and_grey(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red = _decoded(tmp_path / "a.jpg")[4, 4]
    assert red[0] > 240
    assert max(red[1:]) < 15
    Image.new("L", (8, 8), 77).save(tmp_path / "b.png")
    assert (_decoded(tmp_path / "b.png") == 77).all()


def test_a_thread_like_image_is_refused(tmp_path: Path) -> None:
    Image.new("L", (1000, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1000 x 2 pixels"):
        decode((tmp_path / "a.png").read_bytes())


def test_a_late_failure_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png could be read when .* No such file .*tried 2 times"):
        read_image(tmp_path / "gone.png", tries=2, wait_s=0.0)


def test_a_late_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    real, failures = Path.read_bytes, [OSError(5, "Input/output error"), OSError(5, "Input/output error")]

    def flaky(self: Path) -> bytes:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert read_image(tmp_path / "a.png", wait_s=0.0).getpixel((0, 0)) == (255, 0, 0)
