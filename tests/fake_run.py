"""Run folders as a run writes them, without a run: for the tests of what reads them."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tltrain.core.recipe import Backbone, Data, Recipe, Stage


def fake_run(
    folder: Path, classes: Sequence[str], *, n: int = 360, skill: float = 0.9, seed: int = 0, batch: int = 64, lr: float = 5e-4
) -> Path:
    """A run folder as a finished run of two stages leaves it. skill: about the share of test images that are right."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    stages = (
        Stage(name="head", unfreeze="head", steps=60, lr=1e-2),
        Stage(name="all", unfreeze="all", steps=140, lr=lr, layer_decay=0.7),
    )
    backbone = Backbone(name="resnet-tiny", weights="shipped:resnet-tiny")
    recipe = Recipe(
        name="digits-resnet",
        purpose="Printed to handwritten digits in two stages",
        seed=seed,
        batch=batch,
        data=Data(source="digits"),
        backbone=backbone,
        stages=stages,
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    write_rows(folder / "metrics-000001.jsonl", [{"kind": "start", "from": None}, *fake_rows(recipe, skill, rng)])
    (folder / "test_metrics.json").write_text(json.dumps(fake_test(folder, classes, n, skill, rng)))
    (folder / "mistakes.json").write_text(json.dumps(fake_mistakes(classes, rng)))
    (folder / "outcome.json").write_text(json.dumps({"outcome": "finished"}))
    env = {
        "versions": {"python": "3.11.2", "torch": "2.14.1", "torchvision": "0.29.0"},
        "git": None,
        "hardware": {"device": "cpu", "cores": 2},
        "accelerate": {"num_processes": 1},
        "command": ["tltrain", "train", "digits-resnet"],
    }
    (folder / "env.json").write_text(json.dumps(env))
    blocks = ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "head"]
    lines = [f"{b:<12}{'frozen':>12}{5e-4 * 0.7 ** (5 - i):>12.2e}{3**i * 1000:>14,}" for i, b in enumerate(blocks)]
    (folder / "plan.txt").write_text("\n".join([f"{'block':<12}{'head':>12}{'all':>12}{'parameters':>14}", *lines]) + "\n")
    return folder


def fake_rows(recipe: Recipe, skill: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    run_step, top = 0, 0.0
    chance = 0.1

    def add(kind: str, index: int, step: int, **values: Any) -> None:
        stage = recipe.stages[index].name
        rows.append(
            {
                "kind": kind,
                "time": 1.795e9 + run_step,
                "stage": stage,
                "stage_index": index,
                "step": step,
                "run_step": run_step,
                "epoch": step / 20,
                **values,
            }
        )

    for index, stage in enumerate(recipe.stages):
        assert stage.steps is not None
        for step in range(stage.steps + 1):
            progress = 1 - math.exp(-run_step / 50)
            if step:
                run_step += 1
                loss = 2.3 - 2.1 * progress + rng.normal(0, 0.12)
                lr = (stage.lr or 0.0) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
                add("train", index, step, loss=max(loss, 0.02), lr=lr, grad_norm=1.0, images_per_s=900.0)
            if step % 20 == 0:
                top1 = chance + (skill - chance) * progress + rng.normal(0, 0.01)
                best, top = top1 > top, max(top, top1)
                values = {"n": 144, "loss": 2.3 - 1.9 * progress, "top1": top1, "top5": 0.99, "f1_macro": top1 - 0.01, "ece": 0.03}
                add("val", index, step, best=best, **values)
        add("stage_end", index, stage.steps, reason="finished", seconds=(12.5, 37.0)[index])
    return rows


def fake_test(folder: Path, classes: Sequence[str], n: int, skill: float, rng: np.random.Generator) -> dict[str, Any]:
    num = len(classes)
    label = np.sort(np.random.default_rng(n).integers(num, size=n))  # every run of a test is tested on the same images
    confidence = np.clip(rng.beta(6, 1, n), 1 / num, 1)
    right = rng.random(n) < confidence * skill / (6 / 7)
    other = np.where(rng.random(n) < 0.6, (label + 1) % num, (label + 1 + rng.integers(num - 1, size=n)) % num)
    predicted = np.where(right, label, other)
    matrix = np.zeros((num, num), int)
    np.add.at(matrix, (label, predicted), 1)
    hit = np.diag(matrix)
    recall, precision = hit / np.maximum(matrix.sum(1), 1), hit / np.maximum(matrix.sum(0), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    bins = []
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        mean = [float(v[inside].mean()) if inside.any() else None for v in (confidence, right)]
        bins.append({"low": low, "high": low + 0.1, "n": int(inside.sum()), "confidence": mean[0], "accuracy": mean[1]})
    with (folder / "test_predictions.csv").open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", "confidence"])
        for i in range(n):
            writer.writerow([f"digits/{i}", classes[label[i]], classes[predicted[i]], confidence[i]])
    per_class = [
        {"name": c, "precision": precision[i], "recall": recall[i], "f1": f1[i], "support": int(matrix[i].sum())}
        for i, c in enumerate(classes)
    ]
    top1 = float((label == predicted).mean())
    return {
        "split": "test",
        "n": n,
        "loss": 0.31,
        "top1": top1,
        "top5": 0.994,
        "f1_macro": float(f1.mean()),
        "ece": 0.021,
        "weights": "best",
        "classes": list(classes),
        "per_class": per_class,
        "confusion": matrix.tolist(),
        "reliability": bins,
        "calibration": {"temperature": 1.31, "ece": 0.012, "reliability": bins[2:]},
        "seconds": 41.2,
    }


def fake_mistakes(classes: Sequence[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    mistakes = []
    for i in range(24):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
        label, predicted = classes[i % len(classes)], classes[(i + 1) % len(classes)]
        png = base64.b64encode(stream.getvalue()).decode()
        mistakes.append(
            {"id": f"photos/of {label}/{i}.png", "label": label, "predicted": predicted, "confidence": 0.999 - i / 60, "png": png}
        )
    return mistakes


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
