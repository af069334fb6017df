"""Hides a recipe's test images, since what is chosen must not have seen them, and refuses weights that know the folds."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data, Recipe
from tltrain.data import DataSplits, open_images
from tltrain.data.tables.corrections import left_out
from tltrain.evaluation.kept_data import learned


def without_test(data: Data, table: Path) -> dict[str, Any]:
    """What hides the test images from a recipe that is trained on folds, path to value. Those that the source itself declares are in no
    fold anyway. table: the file to write that `data.exclude` then names. Raises UserError."""
    images = open_images(data)
    if images.test is None or (images.source is not None and "test" in images.source.declared and data.folds is None):
        return {}
    if data.relabel is not None:
        raise UserError(
            f"data.relabel is {data.relabel}, whose images may be among those of test, which a race of depths must not see; rename the "
            "files, or name the depth in place of unfreeze: auto"
        )
    names = [*left_out(data), *images.test.ids]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["path"], *([name] for name in names)])  # paths are read as they stand
    table.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(table, text.getvalue().encode("utf-8", "surrogateescape"))
    return {"data.exclude": str(table)}


def check_weights(recipe: Recipe, images: DataSplits, remedy: str) -> None:
    """Check that no run whose weights are used has learned from these images, and so knows the fold it is tested on. Raises UserError."""
    if (source := images.source) is None:
        return
    teachers = () if recipe.distill is None else recipe.distill.teachers
    given = {"backbone.weights": recipe.backbone.weights} | {
        "distill.teacher.weights" if k == 0 else f"distill.ensemble.{k - 1}": spec.weights for k, spec in enumerate(teachers)
    }
    for name, weights in given.items():
        num = len(learned(weights, recipe.data, source))
        if num:
            raise UserError(
                f"{name} is {weights}, a run that has learned from {num:,} of these {len(source.ids):,} images, so that their folds would "
                f"not be new to it; {remedy}"
            )
