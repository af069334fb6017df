"""Damages pictures of every format, a bit or a tail at a time: none may crash or hang, and what a format can show is refused."""

from __future__ import annotations

import argparse
import io
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tltrain.data.decode import decode

R = TypeVar("R")
MEMORY, SECONDS = 4 * 2**30, 20
"""Of the process that decodes: address space, bytes, beyond what it has at its start; and the longest time for one picture."""
ANY = ("flip", "cut", "zeros")
SHOWN = {"png": ANY, "png-grey16": ANY, "jpeg": ("cut", "zeros"), "jpeg-progressive": ("cut", "zeros"), "tiff-lzw": ("cut", "zeros"),
         "tiff-deflate": ("cut", "zeros"), "gif": ("cut", "zeros")}  # fmt: skip
"""Damages that the checksums or the structure of a kind show, so that all of them are refused. Of the other kinds: cuts."""


@dataclass(frozen=True)
class Damage:
    how: str
    """flip of a bit, cut, or zeros in place of the rest."""
    position: int
    content: bytes


def pictures(width: int = 96, height: int = 72) -> dict[str, bytes]:
    """Kind to file: a noisy gradient in each format."""
    y_HW, x_HW = np.mgrid[:height, :width]
    smooth_HWC = np.stack([x_HW * 255 / width, y_HW * 255 / height, 127 + 100 * np.sin(x_HW / 9)], axis=-1)
    noise_HWC = np.random.default_rng(0).integers(-20, 20, smooth_HWC.shape)
    colour = Image.fromarray((smooth_HWC + noise_HWC).clip(0, 255).astype(np.uint8))
    deep = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    made = {
        "png": _file(colour, "PNG"), "png-grey16": _file(deep, "PNG"),
        "jpeg": _file(colour, "JPEG", quality=95), "jpeg-progressive": _file(colour, "JPEG", quality=95, progressive=True),
        "webp": _file(colour, "WEBP", quality=90), "webp-lossless": _file(colour, "WEBP", lossless=True),
        "tiff": _file(colour, "TIFF"), "tiff-lzw": _file(colour, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": _file(colour, "TIFF", compression="tiff_adobe_deflate"), "tiff-jpeg": _file(colour, "TIFF", compression="jpeg"),
        "bmp": _file(colour, "BMP"), "bmp-palette": _file(colour.quantize(64), "BMP"), "gif": _file(colour.quantize(64), "GIF"),
    }  # fmt: skip
    return made


def _file(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def damages(content: bytes, num: int, seed: int) -> Iterator[Damage]:
    """Half of them flips, a quarter cuts, a quarter zeros in place of the rest (a download that stopped in a file of full size)."""
    draw = np.random.default_rng([seed, len(content)])
    for number in range(num):
        position, bit = int(draw.integers(1, len(content))), 1 << int(draw.integers(8))
        if number % 4 < 2:
            yield Damage("flip", position, content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        elif number % 4 == 2:
            yield Damage("cut", position, content[:position])
        else:
            yield Damage("zeros", position, content[:position] + bytes(len(content) - position))


def wrong_pixels(content: bytes, damaged: bytes) -> float | None:
    """Share of the pixels that differ by more than 8 of 255 from the whole picture's. None: the damaged one is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            seen = np.asarray(decode(damaged)).astype(int)
        except MemoryError:
            raise
        except Exception:  # Pillow has no common base for what a broken file makes it raise
            return None
        whole = np.asarray(decode(content)).astype(int)
    return 1.0 if seen.shape != whole.shape else float((abs(seen - whole).max(-1) > 8).mean())


def must_be_refused(kind: str, damage: Damage, content: bytes) -> bool:
    """Whether the format can show this damage."""
    if kind.startswith("png") and damage.position >= len(content) - 4:
        return False  # the checksum of the last chunk, which is empty
    return damage.how in SHOWN.get(kind, ("cut",)) and damage.content != content


class Lost(Exception):
    """The process that did the work died, or was ended after SECONDS."""


class Child:
    """A process with an end to its memory and its time, and another one after it has died."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, initializer=_limit)

    def run(self, work: Callable[..., R], *given: Any) -> R:
        """The result of `work` in that process. Raises Lost where the process died, and what `work` raises."""
        try:
            return self.pool.submit(_in_time, work, *given).result()
        except BrokenProcessPool as error:
            self.pool = ProcessPoolExecutor(1, initializer=_limit)
            raise Lost from error


def _limit() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


def _in_time(work: Callable[..., R], *given: Any) -> R:
    signal.alarm(SECONDS)  # ends the process, also where C code loops
    return work(*given)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damaged", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="damaged files of each kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    arguments = parser.parse_args(words)
    began, bad = time.monotonic(), []
    child = Child()
    print(f"{'kind':18} {'refused':>24} {'same':>6} {'other pixels':>24}   wrong pixels of those")
    for kind, content in pictures().items():
        found, wrong = Counter[str](), []
        for damage in damages(content, arguments.trials, arguments.seed):
            try:
                share = child.run(wrong_pixels, content, damage.content)
            except (Lost, MemoryError) as error:
                bad.append(f"{kind}, {damage.how} at {damage.position}: {type(error).__name__}")
                continue
            found[f"{'refused' if share is None else 'other' if share else 'same'} {damage.how}"] += 1
            wrong += [share] if share else []
            if share is not None and must_be_refused(kind, damage, content):
                bad.append(
                    f"{kind}, {damage.how} at {damage.position} of {len(content)}: accepted, {100 * share:.1f} % of the pixels wrong"
                )
        counts = {state: ", ".join(f"{found[f'{state} {how}']} {how}" for how in ANY) for state in ("refused", "other")}
        same, mean = sum(found[f"same {how}"] for how in ANY), f"{100 * np.mean(wrong):.0f} %" if wrong else ""
        print(f"{kind:18} {counts['refused']:>30} {same:6} {counts['other']:>30} {mean:>6}", flush=True)
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"{arguments.trials} of each kind, {len(bad)} that should not be, seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
