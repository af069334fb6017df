"""Pictures with three labels that can be seen: a row, a column, a square, each there or not, and tables that name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("row", "column", "square")


def label_pictures(root: Path, num: int = 60) -> np.ndarray:
    """Write num pictures of 16 px, sets.csv (row|column), columns.csv (ones and zeros) below root. Returns (num, 3) bool."""
    generator = np.random.default_rng(0)
    has_N3 = generator.random((num, 3)) < (0.5, 0.4, 0.2)
    sets, columns = ["path,label"], ["path,Row,Column,Square"]
    for i, has in enumerate(has_N3.tolist()):
        pixels = generator.integers(0, 60, (16, 16, 3)).astype(np.uint8)
        for there, (rows, cols), channel in zip(
            has, ((slice(1, 5), slice(None)), (slice(None), slice(1, 5)), (slice(10, 15),) * 2), range(3), strict=True
        ):
            pixels[rows, cols, channel] = 230 if there else pixels[rows, cols, channel]
        Image.fromarray(pixels).save(root / f"{i}.png")
        sets.append(f"{i}.png,{'|'.join(name for name, there in zip(CLASSES, has, strict=True) if there)}")
        columns.append(f"{i}.png,{','.join(str(int(there)) for there in has)}")
    (root / "sets.csv").write_text("\n".join(sets) + "\n", encoding="utf-8")
    (root / "columns.csv").write_text("\n".join(columns) + "\n", encoding="utf-8")
    return has_N3
