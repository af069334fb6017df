"""The comparison with other decoders says what nobody else sees, and why where that is known."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from photo_files import scene
from PIL import Image

from benchmarks import decoders
from benchmarks.decoders import Seen, by_us, compare, judge, made


def _file(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Seen], Seen]], None]:
    """Makes both other decoders see what this function makes of what we see, in this process."""

    class Here:
        def run(self, work: Callable[..., Any], *given: Any) -> Any:
            return work(*given)

    def see(changed: Callable[[Seen], Seen]) -> None:
        for name in ("by_vips", "by_opencv"):
            monkeypatch.setattr(decoders, name, lambda content: changed(by_us(content)))

    monkeypatch.setattr(decoders, "Child", Here)
    return see


PHOTO = Image.fromarray(scene(60, 44, seed=1))


def test_what_all_see_alike_and_what_nobody_reads_is_counted(others: Any) -> None:
    others(lambda seen: seen)
    said: list[str] = []
    assert compare(iter([("a.png", _file(PHOTO, "PNG")), ("b.png", b"no picture")]), said.append) == 0
    assert said == ["     1 seen as both see it", "     1 refused by all"]


def test_what_nobody_else_sees_needs_a_reason(others: Any) -> None:
    others(lambda seen: seen if isinstance(seen, str) else seen[::-1])
    said: list[str] = []
    assert compare(iter([("a.png", _file(PHOTO, "PNG"))]), said.append) == 1
    assert said[0] == "DIFFERS          a.png: no reason is known"
    upside_down = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="4"/></x:xmpmeta>'  # which turns it
    assert "turned by a mark" in str(judge(_file(PHOTO, "JPEG", xmp=upside_down, quality=95)).reason)
    said.clear()
    assert compare(iter([("lab.tif", _file(PHOTO.convert("CMYK"), "TIFF"))]), said.append) == 0
    assert "CMYK without a profile" in said[0]


def test_a_refusal_of_ours_alone_is_said_with_our_reason(others: Any) -> None:
    others(lambda seen: np.zeros((4, 4, 3), np.uint8))
    said: list[str] = []
    assert compare(iter([("deep.tif", _file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))]), said.append) == 0
    assert said[0].startswith("refused          deep.tif: pixels of mode F")


def test_the_made_pictures_are_all_read_by_us() -> None:
    names = [name for name, content in made() if not isinstance(by_us(content), str)]
    assert len(names) == len(list(made())) > 90
    assert {name.split()[0] for name in names} >= {"PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"}


def test_libvips_and_opencv_see_the_made_pictures_as_we_do() -> None:
    pytest.importorskip("pyvips", reason="libvips is not here: pip install 'tltrain[bench]'")
    pytest.importorskip("cv2", reason="OpenCV is not here: pip install 'tltrain[bench]'")
    assert compare(made(), print) == 0
