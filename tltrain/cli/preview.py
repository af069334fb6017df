"""`tltrain preview`: the picture of what a recipe's network will see, without weights and without training."""

from __future__ import annotations

from pathlib import Path

from tltrain.core import files, stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.models import factory
from tltrain.planning.preview import ROWS, picture


def preview(recipe: Recipe, out: Path, rows: int = ROWS) -> Path:
    """Write the picture of a recipe's data; reads no weights. Raises UserError."""
    if rows < 1:
        raise UserError(f"--rows is {rows}; it must be at least 1")
    images = open_images(recipe.data)
    loaded = factory.skeleton(recipe.backbone, len(images.classes), recipe.data.size, recipe.data.resize)
    planned = stage_plan.plan(recipe, loaded.chain, len(images.train), images.val is not None)
    drawn = picture(recipe, images, loaded.preprocess, planned, rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(out, drawn)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another place with --out") from error
    return out
