"""A run folder as an object: figures, predictions, the network, exports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image

from tltrain.core.output import escape, wrapping
from tltrain.core.recipe import Recipe
from tltrain.evaluation.evaluate import Asked
from tltrain.evaluation.exporters import Exported, export
from tltrain.evaluation.predict import BATCH, Picture, Prediction, predict
from tltrain.evaluation.promises.fitted import Wanted, rules_for
from tltrain.evaluation.trained import TrainedModel, load_trained
from tltrain.models.chain import Chain
from tltrain.models.families.own import OwnNetwork, give
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows


class Run:
    """A run folder. Files are read when first needed."""

    def __init__(self, path: str | Path, backbone: OwnNetwork | None = None) -> None:
        """backbone: the module that was trained, where it is one of the caller's. Raises UserError if `path` is not a run folder."""
        self.path = Path(path)
        self._own = backbone
        self._fitted: dict[Wanted, Asked] = {}
        self.recipe: Recipe = run_dir.read_recipe(self.path)
        """The recipe of the run."""

    @overload  # a string is a sequence of strings too; here it is one file
    def predict(  # type: ignore[overload-overlap]
        self, pictures: Picture, *, top: int = 5, batch: int = BATCH, coverage: float | None = None, abstain: float | None = None,
        strangers: bool = False, views: int = 1,
    ) -> Prediction: ...  # fmt: skip
    @overload
    def predict(
        self, pictures: Sequence[Picture], *, top: int = 5, batch: int = BATCH, coverage: float | None = None,
        abstain: float | None = None, strangers: bool = False, views: int = 1,
    ) -> list[Prediction]: ...  # fmt: skip
    def predict(
        self, pictures: Picture | Sequence[Picture], *, top: int = 5, batch: int = BATCH, coverage: float | None = None,
        abstain: float | None = None, strangers: bool = False, views: int = 1,
    ) -> Prediction | list[Prediction]:  # fmt: skip
        """Predict the class of one picture, or of each picture of a list.

        pictures: file paths, PIL images, or tensors (3, H, W), uint8 or float in [0, 1]. Each is resized and cropped as in the
        evaluation of the run. (Pass a batch that is already preprocessed to `model`.)
        top: number of classes listed in each prediction. batch: images in one forward pass.
        coverage, abstain, strangers, views: as --coverage, --abstain, --strangers and --views of `tltrain predict`, fitted on the run's
        val; what they promise is printed to standard error when it is first asked for.
        Returns predictions with `label`, `confidence` (calibrated) and `top`; where they were asked for also `set`, `decision` (answers,
        abstains or stranger) and `strangeness` (above 1 for a stranger). For a file that cannot be read, `problem` is set instead.
        Raises UserError if the run has no weights yet, if a tensor is not an image, and if val is too small for the coverage.
        """
        asked = self._rules(Wanted(coverage, abstain, strangers, views))
        if isinstance(pictures, str | Path | Image.Image | torch.Tensor):
            return next(predict(self._trained, [pictures], top, batch, asked))
        return list(predict(self._trained, pictures, top, batch, asked))

    def _rules(self, wanted: Wanted) -> Asked:
        """The fitted rules for these options (sets, thresholds), computed once per combination."""
        if wanted not in self._fitted:
            self._register_own()
            self._fitted[wanted] = rules_for(self.path, wanted, lambda text: wrapping.say(escape.line(text), sys.stderr))
        return self._fitted[wanted]

    @property
    def model(self) -> Chain:
        """The network as a torch module on the CPU, frozen and in eval mode.

        It maps images (B, 3, size, size), uint8 or float in [0, 1], to logits (B, classes). Normalisation is included. The softmax of the
        logits is calibrated. Raises UserError.
        """
        return self._trained.chain

    @property
    def classes(self) -> tuple[str, ...]:
        """The class name of each logit. Raises UserError."""
        return self._trained.classes

    @property
    def metrics(self) -> dict[str, Any]:
        """The test metrics: top1, f1_macro, ece, per_class, confusion, ... Empty before the test."""
        return run_dir.test_metrics(self.path) or {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row that the run logged, in order: {"kind": "train", "stage": "head", "step": 1, "loss": ...}, ..."""
        return read_rows(self.path)

    @property
    def outcome(self) -> dict[str, Any]:
        """How the run ended: {"outcome": "finished", ...}. Empty if it has not ended."""
        return run_dir.outcome(self.path)

    def export(self, to: str, out: str | Path | None = None, images: Sequence[str | Path] = ()) -> Exported:
        """Write the network in the format of another tool, and compare it with the run's there, as `tltrain export` does.

        to: hf, torchvision, timm, onnx or torch-export. out: a new folder, by default export/TO in the run folder. images: files to compare
        on; none for the run's own. Raises UserError for a network that the tool does not have.
        """
        self._register_own()
        return export(self.path, to, None if out is None else Path(out), [Path(image) for image in images])

    def _register_own(self) -> None:
        if self._own is not None:
            give(self._own)

    @cached_property
    def _trained(self) -> TrainedModel:
        self._register_own()
        return load_trained(self.path)

    def __repr__(self) -> str:
        return f"tltrain.Run({str(self.path)!r}, {self.outcome.get('outcome', 'not finished')})"


def load(path: str | Path, backbone: OwnNetwork | None = None) -> Run:
    """Open the run folder at `path`. Raises UserError if it is not a run folder.

    backbone: `chain(module, ...)` as it was given to `train`, where the run trained a module of yours. No run folder keeps its code.
    """
    return Run(path, backbone)
