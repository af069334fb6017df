"""Files as people have them, decoded to what people see."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from photo_files import scene
from PIL import Image, TiffImagePlugin

from tltrain.core.errors import UserError
from tltrain.data import decode as module
from tltrain.data.decode import as_seen, decode, read_image


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


# --- what is shown wrong without a word, or hides behind a suffix


def _file(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, file_format, **options)
    return stream.getvalue()


def _profile(*primaries: Sequence[float]) -> bytes:
    """An ICC profile (version 2) of a display: its red, green and blue as XYZ relative to D50, gamma 1."""

    def xyz(values: Sequence[float]) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"a test's own\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2)
    tags = {
        b"desc": described + bytes(-len(described) % 4),
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
    }
    tags |= {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    body = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + struct.pack(
        ">6H", 2026, 1, 1, 0, 0, 0
    )
    header += b"acsp" + bytes(28) + struct.pack(">3i", round(0.9642 * 65536), 65536, round(0.8249 * 65536))
    return header.ljust(128, b"\0") + body


SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
"""Red, green and blue of sRGB, relative to D50."""


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_are_those_of_the_profile(file_format: str) -> None:
    """Red and green exchanged in the profile, and light in proportion to the numbers: red is shown as green, grey as a lighter grey."""
    pixels_HWC = np.full((16, 16, 3), 55, np.uint8)
    pixels_HWC[:8] = (255, 0, 0)
    content = _file(
        pixels_HWC, file_format, icc_profile=_profile(SRGB[1], SRGB[0], SRGB[2]), **({"quality": 100} if file_format == "WEBP" else {})
    )
    seen = np.asarray(decode(content)).astype(int)
    assert (abs(seen[2, 8] - (0, 255, 0)) < 30).all()
    assert (abs(seen[13, 8] - 128) < 12).all(), "55 of 255 in linear light is 128 in sRGB"
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(np.asarray(as_seen(opened)), np.asarray(decode(content)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_a_profile_that_does_not_fit_or_is_damaged_changes_nothing(mode: str) -> None:
    image = Image.fromarray(scene(32, 24, seed=1)).convert(mode)
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    plain = np.asarray(decode(_file(image, file_format)))
    assert np.array_equal(np.asarray(decode(_file(image, file_format, icc_profile=b"no profile at all" * 20))), plain)
    profiled = np.asarray(decode(_file(image, file_format, icc_profile=_profile(*SRGB))))
    assert profiled.shape == plain.shape
    if mode in ("L", "CMYK"):  # a profile of RGB
        assert np.array_equal(profiled, plain)


def test_every_flipped_bit_and_zeroed_tail_of_a_png_is_seen() -> None:
    """Whatever a checksum covers; a PNG's signature and chunk lengths are noticed too."""
    whole, draw, passed = _file(scene(40, 30, seed=2), "PNG"), np.random.default_rng(0), []
    for position in draw.integers(8, len(whole) - 12, 150).tolist():
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << int(draw.integers(8))
        passed += [position] if _is_read(bytes(spoilt)) else []
    for share in np.linspace(0.1, 0.95, 40):
        length = int(share * len(whole))
        passed += [length] if _is_read(whole[:length] + bytes(len(whole) - length)) else []
    assert passed == []
    assert _is_read(whole)


def _is_read(content: bytes) -> bool:
    try:
        decode(content)
    except Exception:  # Pillow has no common base for what a broken file makes it raise
        return False
    return True


def test_a_bitmap_whose_fourth_byte_is_empty_is_seen() -> None:
    pixels_HWC = scene(20, 16, seed=3)
    rgba = Image.fromarray(np.dstack([pixels_HWC, np.zeros((16, 20), np.uint8)]), "RGBA")
    rows = np.asarray(rgba)[::-1, :, [2, 1, 0, 3]].tobytes()  # BITMAPV4HEADER: bottom up, BGRA, with a mask for alpha
    header = struct.pack("<IiiHHIIiiII", 108, 20, 16, 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    header += struct.pack("<4I", 0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000) + b"BGRs" + bytes(48)
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows
    assert np.array_equal(np.asarray(decode(content)), pixels_HWC)


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_grey_tiffs_of_12_and_16_bits(bits: int, white_is_zero: bool) -> None:
    """A ramp over all greys in each of 8 rows, packed as the file says."""
    white = 2**bits - 1
    ramp = np.linspace(0, white, 64).round().astype(np.uint32)
    stored = np.tile(white - ramp if white_is_zero else ramp, 8)
    pairs = stored.reshape(-1, 2).tolist()
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs) if bits == 12 else stored.astype("<u2").tobytes()
    tags = {256: 64, 257: 8, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: 8, 279: len(packed)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())  # all as LONG
    content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + table + bytes(4)
    seen = np.asarray(decode(content))[5, :, 0].astype(int)
    assert (abs(seen - np.linspace(0, 255, 64)) <= 1).all()


def test_16_bits_in_planes_are_refused_and_not_scrambled() -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    content = bytearray(_file(scene(16, 12, seed=4), "TIFF", tiffinfo=info))
    with Image.open(io.BytesIO(content)) as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        image.tag_v2[258], image.tag_v2[284] = (16, 16, 16), 2
        with pytest.raises(ValueError, match="16 bits in separate planes"):
            module._choose_page(image)


def test_the_first_page_that_is_no_thumbnail_is_taken() -> None:
    large, small = Image.fromarray(scene(64, 48, seed=5)), TiffImagePlugin.ImageFileDirectory_v2()
    small[254] = 1  # of reduced resolution
    thumbnail = large.resize((16, 12))
    large.encoderinfo = {"tiffinfo": {}}  # so that the second page is not called a thumbnail too
    assert decode(_file(thumbnail, "TIFF", save_all=True, append_images=[large], tiffinfo=small)).size == (64, 48)
    assert decode(_file(thumbnail, "TIFF", tiffinfo=small)).size == (16, 12), "where there is nothing else"


def test_an_orientation_that_stands_in_xmp_alone_turns_the_image() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    content = _file(scene(40, 20, seed=6), "JPEG", xmp=xmp)
    assert decode(content).size == (20, 40)
    with Image.open(io.BytesIO(content)) as image:
        assert as_seen(image).size == as_seen(image).size == (20, 40), "the image that is given stays as it is"


def test_postscript_starts_nothing_whatever_its_suffix(tmp_path: Path) -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(Exception, match="cannot identify image file"):
        decode(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (bytes(128) + b"DICM" + bytes(100), "a DICOM file"),
        (b"\0\0\0\x18ftypheic" + bytes(100), r"pip install 'tltrain\[heif\]'"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(content: bytes, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "formats", lambda: ["PNG", "JPEG"])  # as where pillow-heif is not installed
    with pytest.raises(ValueError, match=says):
        decode(content)


def test_a_heic_is_read_as_phones_write_it() -> None:
    """Turned by its own box (irot), transparency on white; a cut one is refused."""
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'tltrain[heif]'").register_heif_opener()
    assert "HEIF" in module.formats()
    pixels_HWC = scene(64, 48, seed=7)
    content = _file(pixels_HWC, "HEIF", quality=95)
    assert abs(np.asarray(decode(content)).astype(int) - pixels_HWC).mean() < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(decode(_file(pixels_HWC, "HEIF", quality=95, exif=exif.tobytes()))).astype(int)
    assert abs(turned - np.rot90(pixels_HWC, -1)).mean() < 8
    assert np.asarray(decode(_file(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "HEIF"))).min() > 250
    assert not _is_read(content[: len(content) // 2])
