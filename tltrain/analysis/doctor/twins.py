"""Near-duplicates: the same picture saved again, resized, cropped a little, or mirrored.

Candidates are pairs that are near in features or in small grey copies; each is confirmed by the pixels of both images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from tltrain.analysis.doctor.looks import Look, blank
from tltrain.core.files import in_parallel
from tltrain.heads.neighbours import Pairs, near_pairs

NEAR_FEATURES, NEAR_GREY = 0.7, 0.9
"""Least cosine of a candidate, of centred features and of grey copies. Copies of a picture lie above 0.81 and 0.93 but for one in forty."""
SAME, SAME_SMALL = 0.955, 0.99
"""Least correlation of the pixels of two copies, of images above and up to `SMALL` pixels. Of 90 copies the lowest had 0.959, of pairs of
other pictures the highest 0.92; small images, such as digits, have too little in them to be told apart by less."""
SMALL = 32
MOST_PAIRS = 100_000
TOGETHER = 500
"""Pairs that are confirmed at a time; an image takes a quarter of a megabyte then."""
BASE, TILE = 64, 24
"""Side at which images are kept for the comparison, and at which they are compared."""
CROPS = (1.0, 0.97, 0.94)
"""Sides of the crops that are tried, each at nine places."""


@dataclass(frozen=True)
class Twin:
    """Two images that show the same picture. first < second are positions among the images."""

    first: int
    second: int
    similarity: float
    """Highest correlation of their pixels over crops and mirroring, up to 1."""


def twins(
    looks: Sequence[Look], read: Callable[[int], Image.Image], numbers: Sequence[int], features_ND: torch.Tensor | None = None
) -> tuple[list[Twin], bool]:
    """(pairs of near-duplicates, whether there were more candidates than are compared). Blank images have no twins.

    read, numbers: give each image again; only those of candidates are read. features_ND: of a network, or None.
    """
    candidates, cut = _candidates(looks, features_ND)
    found: list[Twin] = []
    for at in range(0, len(candidates), TOGETHER):
        pairs = candidates[at : at + TOGETHER]
        wanted = sorted({i for pair in pairs for i in pair})
        views = dict(zip(wanted, in_parallel(lambda i: _views(read(numbers[i])), wanted), strict=True))
        for first, second in pairs:
            similarity = _similarity(views[first], views[second])
            if similarity >= (SAME if min(*looks[first].size, *looks[second].size) > SMALL else SAME_SMALL):
                found.append(Twin(first, second, similarity))
    return found, cut


def clusters(num: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """The smallest position (N,) of the images that each one is connected with by pairs, itself included."""
    parent = list(range(num))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, second in pairs:
        a, b = sorted((root(first), root(second)))
        parent[b] = a
    return np.array([root(i) for i in range(num)], dtype=np.int64)


def _candidates(looks: Sequence[Look], features_ND: torch.Tensor | None) -> tuple[list[tuple[int, int]], bool]:
    blank_N = blank(looks)
    found: list[Pairs] = [near_pairs(_grey_rows(looks), NEAR_GREY, MOST_PAIRS)]
    if features_ND is not None:
        found.append(near_pairs(features_ND, NEAR_FEATURES, MOST_PAIRS, centred=True))
    pairs = {(i, j) for each in found for i, j in zip(each.first_P.tolist(), each.second_P.tolist(), strict=True)}
    return sorted(pair for pair in pairs if not blank_N[list(pair)].any()), any(len(each.first_P) == MOST_PAIRS for each in found)


def _grey_rows(looks: Sequence[Look]) -> torch.Tensor:
    """(N, 2 GREY^2): the even part of each copy under mirroring, and the size of its odd part.

    The product of two rows is at least the correlation of the copies, with either of them mirrored or not, so one search finds both.
    """
    copies_NHW = torch.from_numpy(np.stack([each.grey for each in looks])).float()
    rows_NHW = copies_NHW - copies_NHW.mean((1, 2), keepdim=True)
    even, odd = (rows_NHW + rows_NHW.flip(2)) / 2, (rows_NHW - rows_NHW.flip(2)) / 2
    return torch.cat([even.flatten(1), odd.abs().flatten(1)], 1)


def _views(image: Image.Image) -> np.ndarray:
    """float32 (2, V, D): crops of an image and of its mirror image as rows of mean 0 and length 1. The first of each is the whole."""
    base = image.resize((BASE, BASE), Image.Resampling.BOX)
    mirrored = base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rows = np.stack([np.stack([_crop(each, *box) for box in _boxes()]) for each in (base, mirrored)])
    rows -= rows.mean(2, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), 1e-6)


def _boxes() -> list[tuple[float, float, float, float]]:
    boxes = []
    for scale in CROPS:
        places = (0.0, (1 - scale) / 2, 1 - scale) if scale < 1 else (0.0,)
        boxes += [(x * BASE, y * BASE, (x + scale) * BASE, (y + scale) * BASE) for x in places for y in places]
    return boxes


def _crop(image: Image.Image, *box: float) -> np.ndarray:
    return np.asarray(image.resize((TILE, TILE), Image.Resampling.BOX, box=box), dtype=np.float32).reshape(-1)  # type: ignore[arg-type]


def _similarity(a_2VD: np.ndarray, b_2VD: np.ndarray) -> float:
    """Highest correlation of the whole of one image with a crop of the other, mirrored or not."""
    crops_of_b = b_2VD.reshape(-1, b_2VD.shape[2]) @ a_2VD[0, 0]
    crops_of_a = a_2VD.reshape(-1, a_2VD.shape[2]) @ b_2VD[0, 0]
    return float(max(crops_of_a.max(), crops_of_b.max()))
