"""The recipes that `tltrain fit --dry-run` writes for sets of 30 to 30,000 drawn pictures of 2 to 100 classes, and what a dry run takes.

    python -m benchmarks.fit_recipes --weights efficientnet-lite0-57934424.pth

100 classes are ten textures in ten colours, 10 are the textures, and 2 are stripes and checks; angle, scale, light and noise differ from
picture to picture. Each dry run is a process of its own, with an empty cache. Pictures are deleted once their recipes are written.
"""

from __future__ import annotations

import argparse
import colorsys
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

NAME = "timm:tf_efficientnet_lite0"
PICTURES, CLASSES = (30, 300, 3_000, 30_000), (2, 10, 100)
WIDTH, HEIGHT, TIMES = 80, 60, 4
"""Of what is drawn, pixels, and how much larger it is written."""
COLOURS = 10
KINDS = 10 * COLOURS


@dataclass(frozen=True)
class Written:
    """What a dry run left."""

    code: int
    said: str
    """Its output."""
    recipe: str
    """The file's text. Empty: none was written."""
    seconds: float
    cpu_s: float
    """Seconds of the processor, which a busy machine lengthens less."""
    memory_mb: float
    """The most that the process, or one of its own, held."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="DEFAULT", help=f"a file of weights for {NAME} (default: by download)")
    parser.add_argument("--backbone", default=NAME, help=f"the network (default: {NAME})")
    parser.add_argument("--minutes", type=float, default=10.0, help="for fit (default: 10)")
    parser.add_argument("--pictures", type=int, nargs="+", default=PICTURES, help="sizes of the sets (default: 30 300 3000 30000)")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes (default: 2 10 100)")
    parser.add_argument("--out", type=Path, default=Path("runs/fit-recipes"), help="folder of the recipes (default: runs/fit-recipes)")
    given = parser.parse_args(words)
    for num in given.pictures:
        pool = given.out.absolute() / f"{num}-pictures"
        shutil.rmtree(pool, ignore_errors=True)
        draw(pool, num)
        for num_classes in given.classes:
            told = dry_run(given, pool, num, num_classes)
            where = "" if told.recipe else f"; it says: {told.said.strip().splitlines()[-1]}"
            took = f"{told.seconds:.0f} s, {told.cpu_s:.0f} s of the processor, {told.memory_mb:,.0f} MB, exit {told.code}"
            print(f"\n## {num:,} pictures of {num_classes} classes: {took}{where}")
            print(short(yaml.safe_load(told.recipe)) if told.recipe else "", flush=True)
        shutil.rmtree(pool)


def dry_run(given: argparse.Namespace, pool: Path, num: int, num_classes: int) -> Written:
    """Run, keep the recipe and the output beside each other, and delete the rest. pool: where the pictures are drawn."""
    place = given.out.absolute() / f"{num}-of-{num_classes}"
    shutil.rmtree(place, ignore_errors=True)
    into_classes(pool, place / "pictures", num_classes)
    words = ["fit", str(place / "pictures"), "--minutes", f"{given.minutes:g}", "--backbones", f"{given.backbone}={given.weights}"]
    command = [sys.executable, "-m", "tltrain", *words, "--folder", str(place / "fit"), "--dry-run"]
    environment = os.environ | {"TLTRAIN_CACHE": str(place / "cache")}
    log, began = place / "log", time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, recipe = time.perf_counter() - began, place / "fit" / "recipe.yaml"
    for folder in ("pictures", "cache"):
        shutil.rmtree(place / folder, ignore_errors=True)
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    unit = 1e-6 if sys.platform == "darwin" else 1e-3
    return Written(process.returncode, log.read_text(encoding="utf-8"), text, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


def draw(pool: Path, num: int) -> None:
    """Write `num` JPEG files, named by their kind, of kinds that follow each other evenly over all."""
    pool.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for i in range(num):
        kind = i * 37 % KINDS  # any number of pictures is spread over the textures, and each texture's over the colours
        picture(kind, chance).save(pool / f"{kind:02d}-{i:05d}.jpg", quality=80)


def into_classes(pool: Path, folder: Path, num_classes: int) -> None:
    """Link the pictures into class folders: neighbouring kinds are one class."""
    for number in range(num_classes):
        (folder / f"class-{number:02d}").mkdir(parents=True)
    for path in pool.glob("*.jpg"):
        os.link(path, folder / f"class-{int(path.name[:2]) * num_classes // KINDS:02d}" / path.name)


def picture(kind: int, chance: np.random.Generator) -> Image.Image:
    """One picture of a kind, 0 to KINDS - 1."""
    texture, colour = divmod(kind, COLOURS)
    row_H1, column_W = np.arange(HEIGHT, dtype=np.float32)[:, None], np.arange(WIDTH, dtype=np.float32)
    angle, x, y = chance.normal(0, 0.2), chance.uniform(0, 9), chance.uniform(0, 9)
    x_HW, y_HW = x + column_W * np.cos(angle) + row_H1 * np.sin(angle), y + row_H1 * np.cos(angle) - column_W * np.sin(angle)
    scale = 1.6 ** (texture % 5) * chance.uniform(0.85, 1.15)
    wave_HW = np.sin(x_HW / scale) * (1 if texture < 5 else np.sin(y_HW / scale))
    hue = (colour / COLOURS + chance.normal(0, 0.04)) % 1
    shades = ((hue, chance.uniform(0.3, 0.9), 0.9), (hue, 0.3, chance.uniform(0.2, 0.7)))
    front, back = (np.array(colorsys.hsv_to_rgb(*shade), np.float32) for shade in shades)
    blobs = Image.fromarray(chance.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    share_HW1 = (0.5 + 0.5 * wave_HW)[..., None]
    pixels_HWC = 255 * (share_HW1 * front + (1 - share_HW1) * back) + chance.uniform(0.2, 1.0) * (np.asarray(blobs, np.float32) - 127.5)
    drawn = Image.fromarray((pixels_HWC * chance.uniform(0.6, 1.2)).clip(0, 255).astype(np.uint8))
    return drawn.resize((TIMES * WIDTH, TIMES * HEIGHT), Image.Resampling.BILINEAR)


def short(recipe: dict[str, Any]) -> str:
    """A recipe in a few lines: what is trained on, then each stage."""
    data = {key: value for key, value in recipe["data"].items() if key != "source"}
    lines = [f"batch {recipe['batch']}" + "".join(f", {key} {value}" for key, value in data.items())]
    for stage in recipe["stages"]:
        lines.append(", ".join(f"{key} {value}" for key, value in stage.items() if key not in ("name", "carry")) + f" -> {stage['carry']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
