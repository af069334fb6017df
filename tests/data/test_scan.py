"""What a scan says of files that are no pictures, and how much memory it takes."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from photo_files import scene
from PIL import Image

from tltrain.cli.main import main
from tltrain.core.recipe import Data
from tltrain.data import decode as decoder
from tltrain.data import open_images
from tltrain.data.decode import Memory, decode, decoded_bytes
from tltrain.data.sources import scan as scanning
from tltrain.data.views import Preprocess
from tltrain.evaluation import predict as predicting


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _folder(root: Path, num: int = 8) -> Path:
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(scene(24, 20, seed=100 * k + i)).save(root / name / f"{i}.png")
    return root


NO_PICTURES = {
    "pointer.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "a pointer of Git LFS, not the image: run `git lfs pull`",
    ),
    "page.png": (b"\n <!DOCTYPE html><html><body>404</body></html>", "a web page (HTML), not an image: the download went wrong"),
    "scan.tif": (bytes(128) + b"DICM" + bytes(100), "a DICOM file: convert it to PNG with the window that a reader would use"),
    "empty.jpg": (b"", "the file is empty"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "a HEIC file: `pip install 'tltrain[heif]'` and it is read, or convert it to JPEG"),
    "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image of a kind that is read here"),
}


def test_a_plan_calls_files_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decoder, "formats", lambda: ["PNG", "JPEG", "TIFF"])  # as where pillow-heif is not installed
    root = _folder(tmp_path / "d")
    for name, (content, _) in NO_PICTURES.items():
        (root / "a" / name).write_bytes(content)
    assert main(["plan", "folder-resnet50", "--data.source", f"folder:{root}"]) == 2
    said = capsys.readouterr().err
    assert "6 of 22 images cannot be read" in said
    for name, (_, why) in NO_PICTURES.items():
        assert f"{name} ({why})" in said


def test_a_class_of_heic_alone_names_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoder, "formats", lambda: ["PNG", "JPEG"])
    root = _folder(tmp_path / "d")
    (root / "c").mkdir()
    for i in range(12):
        (root / "c" / f"IMG_{i:04}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert main(["plan", "folder-resnet50", "--data.source", f"folder:{root}"]) == 2
    said = capsys.readouterr().err
    assert "IMG_0000.HEIC (a HEIC file: `pip install 'tltrain[heif]'`" in said


# --- memory


def test_large_images_are_decoded_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as fit; one that is larger than the limit by itself is decoded alone."""
    memory, most, held, lock = Memory(100), 0, 0, threading.Lock()
    monkeypatch.setattr(decoder, "decoded_bytes", len)

    def work(num_bytes: int) -> None:
        nonlocal most, held
        with memory.room_for(bytes(num_bytes)):
            with lock:
                held += num_bytes
                most = max(most, held if held > num_bytes else 0)
            with lock:
                held -= num_bytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [40, 60, 150, 30, 70, 50, 20, 90] * 50))
    assert most <= 100
    assert memory.held == 0


class _Watched(Memory):
    """Counts what is decoded at the same time."""

    most, at_a_time = 0, 0

    @contextlib.contextmanager
    def room_for(self, content: bytes) -> Iterator[None]:
        with super().room_for(content):
            self.at_a_time += 1
            self.most = max(self.most, self.at_a_time)
            assert self.held == decoded_bytes(content) * self.at_a_time
            yield
            self.at_a_time -= 1


def test_scan_and_predict_decode_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _folder(tmp_path / "d", num=12)
    memory = _Watched(2 * 12 * 24 * 20)  # room for two
    monkeypatch.setattr(scanning, "MEMORY", memory)
    assert open_images(Data(source=f"folder:{root}")).notes == ()
    assert 1 <= memory.most <= 2
    memory.most = 0
    monkeypatch.setattr(predicting, "MEMORY", memory)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: predicting.evaluation_view(path, Preprocess(20, 20)), sorted(root.rglob("*.png"))))
    assert 1 <= memory.most <= 2


@pytest.mark.parametrize("kind", ["JPEG turned", "PNG RGBA", "PNG I;16", "PNG P", "WEBP RGB", "TIFF CMYK"])
def test_no_picture_takes_more_memory_than_is_held_for_it(tmp_path: Path, kind: str) -> None:
    """The peak of a process that decodes it, as the kernel counts it."""
    side, (file_format, mode) = 1600, kind.split()
    ramp = (np.add.outer(np.arange(side), np.arange(side)) % 256).astype(np.uint8)
    image, options = Image.fromarray(ramp), {}
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112], mode = 6, "RGB"
        options["exif"] = exif.tobytes()
    if mode == "P":
        options["transparency"] = b"\3"
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    (tmp_path / "picture").write_bytes(stream.getvalue())
    code = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("alone", sys.argv.pop(1))  # without torch, which takes seconds and memory of its own
sys.modules["alone"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
decode = module.decode
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024
small, content = (Path(name).read_bytes() for name in sys.argv[1:])
decode(small)
before = peak()
decode(content)
print(peak() - before)
"""
    small = io.BytesIO()
    image.resize((8, 8)).save(small, file_format, **options)
    (tmp_path / "small").write_bytes(small.getvalue())
    done = subprocess.run(
        [sys.executable, "-c", code, decoder.__file__, str(tmp_path / "small"), str(tmp_path / "picture")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) <= decoded_bytes(stream.getvalue()) + 4e6, "a few MB that allocators keep"
    assert decode(stream.getvalue()).size == (side, side)


@pytest.mark.slow
def test_threads_give_back_the_memory_of_large_pictures(tmp_path: Path) -> None:
    """What glibc keeps for a thread added up over the threads of a scan: 2 GB for twelve pictures of 6000 x 6000."""
    num_pixels, pixels_HWC = 3400**2, np.zeros((3400, 3400, 4), np.uint8)
    pixels_HWC[:900] = 90
    for i in range(6):
        pixels_HWC[900:, :, :3] = i
        Image.fromarray(pixels_HWC).save(tmp_path / f"{i}.png", compress_level=1)
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tltrain.data import decode
from tltrain.data.sources import scan
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024
decode.MEMORY.limit = 1  # one after the other
before = peak()
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda path: scan._read(path, None), Path(sys.argv[1]).glob('*.png')))
assert len(results) == 6 and not any(result.problem for result, _ in results)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30 * num_pixels, "one at its peak takes 20 bytes a pixel"
