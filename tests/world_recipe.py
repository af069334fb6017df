"""The recipe that worlds of processes train: three stages of a small pretrained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import ALL, HEAD, made_recipe

from benchmarks import trials
from tltrain.runs.metrics_log import read_rows

MIDDLE = {"resnet-tiny": "layer3", "vit-tiny": "block.2"}


FIXED = {"carry": "last", "eval_epochs": 10}  # evaluate at the ends only: a tie in top-1 must not choose other weights


def stages(backbone: str, **changes: Any) -> list[dict[str, Any]]:
    middle = ALL | {"name": "mid", "unfreeze": MIDDLE[backbone], "steps": 3, "clip": 0.5, "weight_decay": 0.01}
    return [stage | FIXED | changes for stage in (HEAD | {"steps": 3}, middle, ALL | {"steps": 3, "optimizer": "sgd", "lr": 0.05})]


def recipe(backbone: str, teacher: Path | None = None, batch: int = 13, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"backbone": trials.NETS[backbone], "batch": batch, "stages": stages(backbone), "data": {"eval_limit": 19}}
    if teacher is not None:
        raw["distill"] = {"teacher": {"weights": str(teacher)}, "temperature": 2.0, "weight": 0.7}
    return made_recipe(**(raw | changes)).model_dump(mode="json")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run) if row["kind"] == "train"]
