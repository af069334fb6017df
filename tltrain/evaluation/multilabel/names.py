"""Labels of other images brought under the classes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tltrain.core.errors import UserError, some


def under_classes(label_NJ: np.ndarray, theirs: Sequence[str], classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(labels (N, K) of a run's classes, notes) from labels (N, J) of other images, matched by name; their order does not matter.

    Raises UserError where an image has a label that the run does not know.
    """
    had = [name for name, num in zip(theirs, label_NJ.sum(0).tolist(), strict=True) if num]
    if unknown := [name for name in had if name not in classes]:
        raise UserError(f"images have labels that the run does not know: {some(unknown)}; leave them out. Its own: {some(list(classes))}")
    label_NK = np.zeros((len(label_NJ), len(classes)), dtype=np.uint8)
    for name in had:
        label_NK[:, list(classes).index(name)] = label_NJ[:, list(theirs).index(name)]
    missing = [name for name in classes if name not in had]
    return label_NK, [f"no image here has the labels {some(missing)}; means over labels go over the others"] if missing else []
