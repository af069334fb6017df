"""Plants errors in a folder of pictures, and counts what `tltrain doctor` finds of them: copies, wrong labels, outliers.

    python -m benchmarks.doctor pictures --backbone timm:tf_efficientnet_lite0 --weights efficientnet-lite0.pth --seeds 3

For each seed 30 near-duplicates (saved again as JPEG, resized, cropped by 3 %, mirrored; one in five under another class), 20 wrong labels
and 10 outliers (text, noise, charts, codes, gradients) are planted in a copy of the folder. A false alarm is an image that is named and was
not planted; near-duplicates that the folder itself holds are not counted as such. `benchmarks.pictures` makes a folder.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tltrain.analysis.doctor import findings as problems
from tltrain.analysis.doctor import looks, twins
from tltrain.analysis.doctor.command import recipe_of
from tltrain.analysis.doctor.examine import Diagnosis, examine
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Backbone
from tltrain.data.decode import read_image
from tltrain.data.tables.corrections import RELABEL

NUM_COPIES, NUM_WRONG, NUM_OUTLIERS = 30, 20, 10
ELSEWHERE = 5
"""Each fifth copy is put into another class."""
COPIES = (problems.TWIN, problems.TWIN_SPLITS, problems.TWIN_LABELS, problems.IDENTICAL)
Draw = np.random.Generator


def saved_again(image: Image.Image, draw: Draw) -> Image.Image:
    """Through JPEG of a quality from 40 to 80."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=int(draw.integers(40, 81)))
    return Image.open(content).convert("RGB")


def resized(image: Image.Image, draw: Draw) -> Image.Image:
    """To between half and four fifths of its size."""
    scale = float(draw.uniform(0.5, 0.8))
    return image.resize((max(8, round(image.width * scale)), max(8, round(image.height * scale))), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, draw: Draw) -> Image.Image:
    """Without 3 % of its width and of its height, cut off on either side."""
    width, height = (max(1, round(0.03 * side)) for side in image.size)
    x, y = int(draw.integers(width + 1)), int(draw.integers(height + 1))
    return image.crop((x, y, image.width - width + x, image.height - height + y))


def mirrored(image: Image.Image, draw: Draw) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


KINDS: tuple[Callable[[Image.Image, Draw], Image.Image], ...] = (saved_again, resized, cropped, mirrored)


def outlier(number: int, draw: Draw) -> Image.Image:
    """A picture that belongs to no class: a page of text, noise, a chart, a code, a gradient."""
    side = int(draw.integers(120, 300))
    image = Image.new("RGB", (side, side), "white")
    pen, kind = ImageDraw.Draw(image), number % 5
    if kind == 0:
        for y in range(4, side - 10, 12):
            words = ("".join(map(chr, draw.integers(97, 123, int(n)))) for n in draw.integers(2, 9, 12))
            pen.text((5, y), " ".join(words), fill="black")
    elif kind == 1:
        return Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
    elif kind == 2:
        for bar in range(8):
            colour, height = tuple(draw.integers(0, 256, 3).tolist()), int(draw.integers(10, side - 10))
            pen.rectangle((bar * side // 8 + 3, side - height, (bar + 1) * side // 8 - 3, side - 2), fill=colour)
    elif kind == 3:
        cells = draw.integers(0, 2, 2 * [int(draw.integers(6, 14))], dtype=np.uint8) * 255
        return Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST).convert("RGB")
    else:
        along = np.linspace(0, 1, side)
        waves = np.outer(along, np.cos(along * draw.uniform(2, 20))) * 127 + 128
        return Image.fromarray(np.stack([waves, waves.T, 255 - waves], -1).astype(np.uint8))
    return image


@dataclass
class Planted:
    """What was planted, by the name of the file."""

    copies: dict[str, tuple[str, str]] = field(default_factory=dict)
    """File to (the file it was made of, the kind)."""
    wrong: dict[str, str] = field(default_factory=dict)
    """File to its true class."""
    origin: dict[str, str] = field(default_factory=dict)
    """File to the name it had in the folder."""
    outliers: set[str] = field(default_factory=set)

    @property
    def misplaced(self) -> set[str]:
        return {*self.wrong, *(name for name, (source, _) in self.copies.items() if name.split("/")[0] != source.split("/")[0])}


def plant(folder: Path, out: Path, seed: int) -> Planted:
    """Copy a folder of class folders, and plant errors in the copy. A file gets one of them at most."""
    shutil.copytree(folder, out)
    draw, planted = np.random.default_rng(seed), Planted()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file())
    classes = sorted({name.split("/")[0] for name in names})
    order = [names[i] for i in draw.permutation(len(names))]

    def another(label: str) -> str:
        return classes[(classes.index(label) + 1 + int(draw.integers(len(classes) - 1))) % len(classes)]

    for n, name in enumerate(order[:NUM_COPIES]):
        label, kind = name.split("/")[0], KINDS[n % len(KINDS)]
        made = f"{another(label) if n % ELSEWHERE == ELSEWHERE - 1 else label}/planted-copy-{n}.png"
        kind(read_image(out / name), draw).save(out / made)
        planted.copies[made], planted.origin[made] = (name, kind.__name__), name
    for n, name in enumerate(order[NUM_COPIES : NUM_COPIES + NUM_WRONG]):
        label = name.split("/")[0]
        made = f"{another(label)}/planted-wrong-{n}{Path(name).suffix}"
        (out / name).rename(out / made)
        planted.wrong[made], planted.origin[made] = label, name
    for n in range(NUM_OUTLIERS):
        made = f"{classes[int(draw.integers(len(classes)))]}/planted-outlier-{n}.png"
        outlier(n, draw).save(out / made)
        planted.outliers.add(made)
    return planted


def own_copies(folder: Path) -> dict[str, int]:
    """The near-duplicates that the folder holds as it is: name to the number of its cluster."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file())

    def read(number: int) -> Image.Image:
        return read_image(folder / names[number])

    pairs, _ = twins.twins(list(looks.look_at(read, range(len(names)))), read, range(len(names)))
    cluster_N = twins.clusters(len(names), ((pair.first, pair.second) for pair in pairs))
    return dict(zip(names, cluster_N.tolist(), strict=True))


def score(diagnosis: Diagnosis, planted: Planted, own: dict[str, int]) -> Counter[str]:
    """Counts by word: `KIND found`, `copies false`, `wrong found`, ... of one planted folder."""
    counts: Counter[str] = Counter()
    pairs = [(f.path, f.other) for f in diagnosis.findings if f.problem in COPIES]
    paired = {name for pair in pairs for name in pair}
    for name, (_, kind) in planted.copies.items():
        counts[f"{kind} planted"] += 1
        counts[f"{kind} found"] += name in paired
    original = [tuple(planted.origin.get(name, name) for name in pair) for pair in pairs]
    counts["copies false"] = sum(own.get(a, -1) != own.get(b, -2) for a, b in original)
    named = {f.path: f for f in diagnosis.findings if f.problem == problems.WRONG}
    suggested = {name: f.suggestion for name, f in named.items() if f.suggestion.startswith(RELABEL)}
    counts["wrong planted"], counts["wrong found"] = len(planted.wrong), len(named.keys() & planted.wrong.keys())
    counts["wrong false"] = len(named.keys() - planted.misplaced - planted.outliers)
    right = {name: f"{RELABEL}:{planted.origin[name].split('/')[0]}" for name in planted.misplaced}
    counts["relabel"], counts["relabel right"] = len(suggested), sum(right.get(name) == word for name, word in suggested.items())
    far = {f.path for f in diagnosis.findings if f.problem == problems.OUTLIER}
    anything = {f.path for f in diagnosis.findings}
    counts["outliers planted"], counts["outliers found"] = len(planted.outliers), len(far & planted.outliers)
    counts["outliers named at all"] = len(anything & planted.outliers)
    counts["outliers false"] = len(far - planted.outliers - planted.misplaced)
    counts["images"] = diagnosis.num
    return counts


def rows(counts: Counter[str], seeds: int) -> list[str]:
    """The table in Markdown: sums over the seeds."""
    lines = ["| planted | number | found | false alarms |", "|--|--:|--:|--:|"]
    for kind in KINDS:
        name = kind.__name__
        words = "near-duplicates, " + name.replace("_", " ")
        lines.append(f"| {words} | {counts[f'{name} planted']} | {counts[f'{name} found']} | |")
    copies = [sum(counts[f"{kind.__name__} {what}"] for kind in KINDS) for what in ("planted", "found")]
    lines.append(f"| near-duplicates, all | {copies[0]} | {copies[1]} | {counts['copies false']} |")
    for name, words in (("wrong", "wrong labels"), ("outliers", "outliers")):
        lines.append(f"| {words} | {counts[f'{name} planted']} | {counts[f'{name} found']} | {counts[f'{name} false']} |")
    lines.append(
        f"\nSums over {seeds} seeds, {counts['images'] // seeds} images each. {counts['relabel']} labels were suggested, and "
        f"{counts['relabel right']} of them are the true one; {counts['outliers named at all']} of the outliers are named for some reason."
    )
    return lines


def main(argv: Sequence[str] | None = None) -> Counter[str]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="class folders of pictures without errors, as far as one knows")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0", help="the network that is asked")
    parser.add_argument("--weights", default="DEFAULT", help="its weights (default: by download, or of an installed package)")
    parser.add_argument("--seeds", type=int, default=3, help="how often errors are planted (default: 3)")
    parser.add_argument("--first-seed", type=int, default=20, help="thresholds were chosen on the seeds 0 to 12 (default: 20)")
    given = parser.parse_args(argv)
    own, total = own_copies(given.folder), Counter[str]()
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        with tempfile.TemporaryDirectory() as place:
            planted = plant(given.folder, Path(place) / "planted", seed)
            recipe = recipe_of(f"folder:{place}/planted", Backbone(name=given.backbone, weights=given.weights))
            found = score(examine(recipe, RunFlags(cache="never"), Console(enabled=False), True), planted, own)
        total += found
        print(f"seed {seed}: {dict(found)}", flush=True)
    print("\n".join(rows(total, given.seeds)))
    return total


if __name__ == "__main__":
    main()
