"""Writes the results of a finished run: test metrics, predictions, examples of right and wrong answers, the report."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tltrain.core.output import escape
from tltrain.core.output.console import duration
from tltrain.data import Split
from tltrain.data.views import Views
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.multilabel.details import mistake, predictions_csv, surest_mistakes
from tltrain.evaluation.multilabel.predictions import LabelPredictions
from tltrain.evaluation.saliency import lit, saliency
from tltrain.models.chain import Chain
from tltrain.runs import run_dir
from tltrain.runs.pages.write import write_report

NUM_MISTAKES, NUM_RIGHT = 24, 8
ROUNDING = 0.002
"""Largest share of images whose prediction may change with the device or the precision."""


def write_test(
    path: Path, figures: dict[str, Any], p: Predictions | LabelPredictions, split: Split, views: Views, classes: Sequence[str],
    chain: Chain | None = None,
) -> None:  # fmt: skip
    """Write test_metrics.json, test_predictions.csv, mistakes.json and right_answers.json into a run folder.

    Confidences in all but the first are calibrated. The second has a column `group` where samples have groups. Of several labels no right
    answers are shown. chain: shows where in each image it found its answer, of one class.
    """
    if isinstance(p, LabelPredictions):
        wrong = [
            {"id": split.ids[p.position[i]], **mistake(p, i, classes), "png": _encoded(_seen(views, p.position[i]), "PNG")}
            for i in surest_mistakes(p)[:NUM_MISTAKES].tolist()
        ]
        run_dir.write_test(path, figures, predictions_csv(p, split.ids, classes).encode("utf-8", "surrogateescape"), wrong, [])
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", "confidence", *([] if p.group is None else ["group"])])
    groups = [[]] * len(p.label) if p.group is None else [[g] for g in p.group.tolist()]
    for position, label, predicted, confidence, group in zip(p.position, p.label, p.predicted, p.calibrated, groups, strict=True):
        writer.writerow([*map(escape.csv_cell, (split.ids[position], classes[label], classes[predicted])), f"{confidence:.6f}", *group])
    wrong, right = (_examples(chosen, p, split, views, classes, chain) for chosen in (_surest_mistakes(p), _surest_right(p)))
    run_dir.write_test(path, figures, text.getvalue().encode("utf-8", "surrogateescape"), wrong, right)


def report(path: Path, say: Callable[[str], None]) -> Path | None:
    """Write report.html. On an error it prints a line and returns None, since the run's weights are already saved."""
    try:
        return write_report(path)
    except Exception as error:  # the run folder holds all data of the page
        say(f"report  could not be written: {type(error).__name__}: {error}; `tltrain report {path}` tries again")
        return None


def _surest_mistakes(p: Predictions) -> np.ndarray:
    wrong = np.flatnonzero(p.predicted != p.label)
    return wrong[np.argsort(-p.calibrated[wrong], kind="stable")][:NUM_MISTAKES]


def _surest_right(p: Predictions) -> np.ndarray:
    """The right answers with the highest confidence, one of each class as far as there is room."""
    right = np.flatnonzero(p.predicted == p.label)
    surest = right[np.argsort(-p.calibrated[right], kind="stable")]
    _, firsts = np.unique(p.label[surest], return_index=True)
    return surest[np.sort(firsts)][:NUM_RIGHT]


def _examples(
    chosen: np.ndarray, p: Predictions, split: Split, views: Views, classes: Sequence[str], chain: Chain | None
) -> list[dict[str, Any]]:
    """Answers with their evaluation views in base64: as a PNG, and, where the network found its answer, as a JPEG."""
    images = [views.view(int(position), 0) for position in p.position[chosen]]
    maps = None
    if chain is not None and images:
        device = next(chain.parameters()).device
        maps = saliency(chain, torch.stack(images).to(device), torch.from_numpy(p.predicted[chosen]).to(device))
    examples = []
    for n, (i, image) in enumerate(zip(chosen, images, strict=True)):
        pixels_HWC = image.permute(1, 2, 0).numpy()
        seen = {} if maps is None else {"lit": _encoded(lit(pixels_HWC, maps[n].numpy()), "JPEG")}
        answer = {"id": split.ids[p.position[i]], "label": classes[p.label[i]], "predicted": classes[p.predicted[i]]}
        examples.append({**answer, "confidence": float(p.calibrated[i]), "png": _encoded(pixels_HWC, "PNG"), **seen})
    return examples


def _seen(views: Views, position: int) -> np.ndarray:
    """uint8 (H, W, 3): the evaluation view of an image."""
    return views.view(int(position), 0).permute(1, 2, 0).numpy()


def _encoded(pixels_HWC: np.ndarray, form: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format=form)
    return base64.b64encode(buffer.getvalue()).decode()


def test_line(figures: Mapping[str, Any], seconds: float) -> str:
    """The line on the terminal for the metrics of the test split, after so many seconds of training."""
    if "map" in figures:
        shown = {"mAP": "map", "F1": "f1_macro", "exact sets": "subset_accuracy"}
        shares = [f"{name} {100 * figures[key]:.2f} %" for name, key in shown.items() if figures[key] is not None]
        return f"test    {', '.join(shares)} of {figures['n']:,} images, {duration(seconds)}"
    return (
        f"test    top-1 {100 * figures['top1']:.2f} % of {figures['n']:,} images, F1 {100 * figures['f1_macro']:.2f} % (macro), "
        f"calibration error {100 * figures['ece']:.1f} %, {duration(seconds)}"
    )


def differs_from_test(path: Path, figures: Mapping[str, Any], key: str = "top1") -> list[str]:
    """A note if the accuracy on the same images differs from the run's own test by more than rounding. key: the share that is right."""
    earlier = run_dir.test_metrics(path)
    if earlier is None:
        return []
    n = figures["n"]
    right, was_right = (round(test[key] * test["n"]) for test in (figures, earlier))
    if n == earlier["n"] and abs(right - was_right) <= max(1, ROUNDING * n):
        return []
    return [
        f"the run's own test had {was_right:,} of {earlier['n']:,} right, and this evaluation has {right:,} of {n:,} on the same images: "
        "the weights, the device, the precision or the package versions have changed since"
    ]
