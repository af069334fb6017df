"""Compares what we see in pictures with what libvips and OpenCV see: made pictures, and folders of yours.

pip install 'tltrain[bench]' brings both. A picture in which neither of them sees what we see needs a reason, which is known here.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.damaged import Child, Lost, pictures
from tltrain.data.decode import ORIENTATION, as_seen, decode, describe, opened

MEAN, FAR, MANY = 1.5, 48, 0.01
"""Two pictures agree up to this mean difference of a channel, of 255, and this share of channels that are FAR apart."""
Seen = np.ndarray | str
"""uint8 (H, W, 3), or why there is nothing to see."""


class Verdict(NamedTuple):
    ours: str | None
    """Why we refuse it. None: it is read."""
    agree: tuple[bool | None, ...]
    """For libvips and OpenCV: whether they see what we see. None: one of us two does not read it."""
    read: tuple[bool, ...]
    """Whether libvips and OpenCV read it."""
    reason: str | None
    """Why what we see may differ from what they see."""


def by_us(content: bytes) -> Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(decode(content))
        except Exception as error:  # Pillow has no common base for what a broken file makes it raise
            return describe(error)


def by_vips(content: bytes) -> Seen:
    import pyvips

    try:
        image = pyvips.Image.new_from_buffer(content, "").autorot()
        if image.get_typeof("icc-profile-data"):
            try:
                image = image.icc_transform("srgb", intent="relative")
            except pyvips.Error:  # a profile of another kind of image
                image = image.colourspace("srgb")
        image = image.colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=[255, 255, 255])
        pixels: np.ndarray = image.cast("uchar").numpy()
    except pyvips.Error as error:
        return str(error).strip().partition("\n")[0]
    return _three(pixels)


def by_opencv(content: bytes) -> Seen:
    import cv2

    try:
        stored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if stored is not None and (stored.ndim == 2 or stored.shape[2] == 3):
            stored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)  # turned upright, of 8 bits
    except cv2.error as error:
        return str(error).strip().partition("\n")[0]
    if stored is None:
        return "not read"
    if stored.ndim == 3 and stored.shape[2] == 4:
        scaled = stored / 257 if stored.dtype == np.uint16 else stored.astype(float)
        alpha = scaled[..., 3:] / 255
        stored = (scaled[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return _three(stored[..., ::-1])


def _three(pixels: np.ndarray) -> np.ndarray:
    pixels_HWC = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.repeat(pixels_HWC, 3, axis=-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC[..., :3]


def alike(one: Seen, other: Seen) -> bool | None:
    """Whether both see the same. None where one sees nothing."""
    if isinstance(one, str) or isinstance(other, str):
        return None
    if one.shape != other.shape:
        return False
    apart = abs(one.astype(int) - other.astype(int))
    return bool(apart.mean() <= MEAN and (apart > FAR).mean() <= MANY)


def judge(content: bytes) -> Verdict:
    ours, others = by_us(content), [by_vips(content), by_opencv(content)]
    agree = tuple(alike(ours, other) for other in others)
    read = tuple(not isinstance(other, str) for other in others)
    if isinstance(ours, str):
        return Verdict(ours, agree, read, None)
    return Verdict(None, agree, read, None if True in agree or agree == (None, None) else _reason(content, others))


def _reason(content: bytes, others: Sequence[Seen]) -> str | None:
    """Why nobody sees what we see, as far as it is known."""
    with warnings.catch_warnings(), opened(content) as image:
        warnings.simplefilter("ignore")
        if any(alike(np.asarray(_unturned(image)), other) for other in others):
            return "turned by a mark that the others do not read (XMP, or EXIF in a chunk of ImageMagick)"
        if image.mode == "LAB":
            return "Lab, of which OpenCV takes another white"
        if image.mode == "CMYK" and "icc_profile" not in image.info:
            return "CMYK without a profile: the ink is subtracted, as browsers do; libvips assumes a printer"
        if image.info.get("compression") == "lzma":
            return "TIFF with LZMA, which this libvips shows black"
        if image.format == "BMP" and _is_odd_bitmap(content):
            return "a BMP of 16 bits, of bit fields or with a gap before its pixels, which OpenCV rounds down, colours or shifts"
    return None


def _unturned(image: Image.Image) -> Image.Image:
    plain = image.copy()
    plain.format = image.format
    plain.getexif()[ORIENTATION] = 1
    return as_seen(plain)


def _is_odd_bitmap(content: bytes) -> bool:
    offset, header = int.from_bytes(content[10:14], "little"), int.from_bytes(content[14:18], "little")
    bits, compression, colours = (int.from_bytes(content[a:b], "little") for a, b in ((28, 30), (30, 34), (46, 50)))
    palette = 4 * (colours or (1 << bits if bits <= 8 else 0))
    return bits == 16 or compression == 3 or header == 52 or offset != 14 + header + palette


def made() -> Iterator[tuple[str, bytes]]:
    """(name, file) of pictures in every mode of every format that Pillow writes, with profiles of none."""
    with Image.open(io.BytesIO(pictures()["png"])) as image:
        colour = image.convert("RGB")
    deep = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    clear = colour.copy()
    clear.putalpha(Image.linear_gradient("L").resize(colour.size))
    modes = {mode: colour.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK")} | {
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "I;16": deep,
    }
    lossy: dict[str, object] = {"quality": 95}
    packings: list[dict[str, object]] = [
        {"compression": name} for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
    ]
    options: dict[str, list[dict[str, object]]] = {
        "PNG": [{}, {"bits": 4}], "JPEG": [{**lossy}, {**lossy, "progressive": True}], "WEBP": [{"lossless": True}, {**lossy}],
        "TIFF": [*packings, {"tiffinfo": {262: 0}}],
        "BMP": [{}], "GIF": [{}], "PPM": [{}], "AVIF": [{**lossy}], "JPEG2000": [{}],
    }  # fmt: skip
    for file_format, ways in options.items():
        for way in ways:
            for mode, picture in modes.items():
                if "tiffinfo" in way and mode not in ("1", "L", "I;16"):
                    continue  # zero can be white in grey alone
                for turn in (1, 6) if mode == "RGB" and file_format in ("PNG", "JPEG", "WEBP", "TIFF") else (1,):
                    exif, stream = Image.Exif(), io.BytesIO()
                    exif[ORIENTATION] = turn
                    try:
                        picture.save(stream, file_format, **(way | ({"exif": exif} if turn > 1 else {})))
                    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
                        continue  # the format does not know this mode
                    yield f"{file_format} {mode} {way or ''} {f'turn {turn}' if turn > 1 else ''}".strip(), stream.getvalue()


def files(folders: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(folder)), path.read_bytes()


def compare(named: Iterator[tuple[str, bytes]], say: Callable[[str], None]) -> int:
    """Number of pictures that crash a decoder, or that only we see so without a known reason."""
    child, kinds, bad = Child(), Counter[str](), 0
    for name, content in named:
        try:
            verdict = child.run(judge, content)
        except Lost:
            bad += 1
            say(f"CRASHED OR HUNG  {name}")
            continue
        if verdict.ours is not None:
            kind = "refused by all" if not any(verdict.read) else "refused by us, read by another"
            if any(verdict.read):
                say(f"refused          {name}: {verdict.ours}")
        elif True in verdict.agree:
            kind = "seen as both see it" if False not in verdict.agree and None not in verdict.agree else "seen as one sees it"
        elif False in verdict.agree:
            kind = "seen otherwise, for a known reason" if verdict.reason else "SEEN OTHERWISE"
            bad += verdict.reason is None
            say(f"{'differs          ' if verdict.reason else 'DIFFERS          '}{name}: {verdict.reason or 'no reason is known'}")
        else:
            kind = "read by us alone"
            say(f"read by us alone {name}")
        kinds[kind] += 1
    for kind, number in kinds.most_common():
        say(f"{number:6} {kind}")
    return bad


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders of pictures (default: pictures made here)")
    arguments = parser.parse_args(words)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TLTRAIN_CACHE", cache)
        bad = compare(files(arguments.folders) if arguments.folders else made(), lambda text: print(text, flush=True))
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
