"""Writes the results of a finished run: test metrics, predictions, the most confident mistakes, the report."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tltrain.core.output import escape
from tltrain.core.output.console import duration
from tltrain.data import Split
from tltrain.data.views import Views
from tltrain.evaluation.metrics import Predictions
from tltrain.runs import run_dir
from tltrain.runs.pages.write import write_report

NUM_MISTAKES = 24


def write_test(path: Path, figures: dict[str, Any], p: Predictions, split: Split, views: Views, classes: Sequence[str]) -> None:
    """Write test_metrics.json, test_predictions.csv and mistakes.json into a run folder. Confidences in the last two are calibrated."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", "confidence"])
    for position, label, predicted, confidence in zip(p.position, p.label, p.predicted, p.calibrated, strict=True):
        writer.writerow([*map(escape.csv_cell, (split.ids[position], classes[label], classes[predicted])), f"{confidence:.6f}"])
    run_dir.write_test(path, figures, text.getvalue().encode("utf-8", "surrogateescape"), _mistakes(p, split, views, classes))


def report(path: Path, say: Callable[[str], None]) -> Path | None:
    """Write report.html. On an error it prints a line and returns None, since the run's weights are already saved."""
    try:
        return write_report(path)
    except Exception as error:  # the run folder holds all data of the page
        say(f"report  could not be written: {type(error).__name__}: {error}; `tltrain report {path}` tries again")
        return None


def _mistakes(p: Predictions, split: Split, views: Views, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The mistakes with the highest confidence, each with its evaluation view as a base64 PNG."""
    wrong = np.flatnonzero(p.predicted != p.label)
    surest = wrong[np.argsort(-p.calibrated[wrong], kind="stable")][:NUM_MISTAKES]
    return [
        {
            "id": split.ids[p.position[i]],
            "label": classes[p.label[i]],
            "predicted": classes[p.predicted[i]],
            "confidence": float(p.calibrated[i]),
            "png": _png(views.view(int(p.position[i]), 0).permute(1, 2, 0).numpy()),
        }
        for i in surest
    ]


def _png(pixels_HWC: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_line(figures: Mapping[str, Any], seconds: float) -> str:
    """The line on the terminal for the metrics of the test split, after so many seconds of training."""
    return (
        f"test    top-1 {100 * figures['top1']:.2f} % of {figures['n']:,} images, F1 {100 * figures['f1_macro']:.2f} % (macro), "
        f"calibration error {100 * figures['ece']:.1f} %, {duration(seconds)}"
    )
