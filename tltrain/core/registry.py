"""The registry of extension points: model families, data sources, losses, metrics, trackers, exporters, launch targets.

Each entry is one file, one line here and one test. A value is "module:object". It is imported on first use, so that the command line
starts quickly. Another package registers its own objects by entry points:

    [project.entry-points."tltrain.families"]
    toy = "toy_package:FAMILY"
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import AfterValidator, ValidationInfo, WithJsonSchema

from tltrain.core import registry
from tltrain.core.errors import UserError

KINDS: dict[str, dict[str, str]] = {
    "families": {
        "resnet": "tltrain.models.families.resnet:FAMILY",
        "vit": "tltrain.models.families.vit:FAMILY",
        "torchvision": "tltrain.models.families.torchvision:FAMILY",
        "timm": "tltrain.models.families.timm:FAMILY",
        "hf": "tltrain.models.families.transformers_hub:FAMILY",
        "module": "tltrain.models.families.own:FAMILY",
    },
    "sources": {
        "cifar10": "tltrain.data.sources.arrays:CIFAR10",
        "cifar100": "tltrain.data.sources.arrays:CIFAR100",
        "digits": "tltrain.data.sources.arrays:DIGITS",
        "printed": "tltrain.data.sources.printed:PRINTED",
        "folder": "tltrain.data.sources.folder:FOLDER",
        "csv": "tltrain.data.sources.csv_file:CSV",
        "zip": "tltrain.data.containers.archives:ZIP",
        "tar": "tltrain.data.containers.archives:TAR",
        "parquet": "tltrain.data.containers.parquet:PARQUET",
        "hf": "tltrain.data.containers.hugging_face:HF",
        "webdataset": "tltrain.data.containers.webdataset:WEBDATASET",
        "lmdb": "tltrain.data.containers.lmdb:LMDB",
        "torchvision": "tltrain.data.published.torchvision_sets:TORCHVISION",
    },
    "losses": {"cross_entropy": "tltrain.training.losses.cross_entropy:cross_entropy"},
    "distill_losses": {
        "kd": "tltrain.training.losses.distillation:LOSS",
        "dist": "tltrain.training.losses.dist:LOSS",
        "dkd": "tltrain.training.losses.dkd:LOSS",
        "cosine": "tltrain.training.matching.losses:COSINE",
        "smooth_l1": "tltrain.training.matching.losses:SMOOTH_L1",
    },
    "metrics": {
        "loss": "tltrain.evaluation.metrics:LOSS",
        "top1": "tltrain.evaluation.metrics:TOP1",
        "top5": "tltrain.evaluation.metrics:TOP5",
        "precision_macro": "tltrain.evaluation.metrics:PRECISION_MACRO",
        "recall_macro": "tltrain.evaluation.metrics:RECALL_MACRO",
        "f1_macro": "tltrain.evaluation.metrics:F1_MACRO",
        "precision_weighted": "tltrain.evaluation.metrics:PRECISION_WEIGHTED",
        "recall_weighted": "tltrain.evaluation.metrics:RECALL_WEIGHTED",
        "f1_weighted": "tltrain.evaluation.metrics:F1_WEIGHTED",
        "ece": "tltrain.evaluation.metrics:ECE",
        "map": "tltrain.evaluation.multilabel.metrics:MAP",
        "f1_micro": "tltrain.evaluation.multilabel.metrics:F1_MICRO",
        "auroc_macro": "tltrain.evaluation.multilabel.metrics:AUROC",
        "subset_accuracy": "tltrain.evaluation.multilabel.metrics:SUBSET",
    },
    "trackers": {
        "wandb": "tltrain.runs.trackers.wandb:WandbTracker",
        "tensorboard": "tltrain.runs.trackers.tensorboard:TensorBoardTracker",
        "mlflow": "tltrain.runs.trackers.mlflow:MlflowTracker",
        "trackio": "tltrain.runs.trackers.trackio:TrackioTracker",
    },
    "exporters": {
        "hf": "tltrain.evaluation.exporters.hf:EXPORTER",
        "torchvision": "tltrain.evaluation.exporters.torchvision:EXPORTER",
        "timm": "tltrain.evaluation.exporters.timm:EXPORTER",
        "onnx": "tltrain.evaluation.exporters.onnx:EXPORTER",
        "torch-export": "tltrain.evaluation.exporters.torch_export:EXPORTER",
    },
    "targets": {
        "local": "launcher.local:TARGET",
        "slurm": "launcher.slurm.target:TARGET",
    },
}
"""Kind to name to "module:object". Other packages use the entry point group tltrain.KIND."""


def names(kind: str) -> tuple[str, ...]:
    """The names of a kind: ours in the order of KINDS, then those of other packages, sorted."""
    return tuple(dict.fromkeys([*KINDS[kind], *sorted(_others(kind))]))


def check(kind: str, name: str, what: str) -> None:
    """Raise UserError for an unknown name, as `find` does. Imports nothing."""
    if name not in KINDS[kind] and name not in _others(kind):
        near = get_close_matches(name, names(kind), n=1)
        raise UserError(f"{what}; " + (f"did you mean {near[0]}?" if near else f"it can be {', '.join(names(kind))}"))


def find(kind: str, name: str, what: str) -> Any:
    """Import and return the object of this kind and name. Our names take precedence over those of other packages.

    what: the beginning of the error message, which states the value: "data.source is 'x'".
    Raises UserError for an unknown name, with the nearest known one, and for an entry point that cannot be imported.
    """
    own = KINDS[kind].get(name)
    if own is not None:
        module, _, attribute = own.partition(":")
        return getattr(import_module(module), attribute)
    check(kind, name, what)
    other = _others(kind)[name]
    try:
        return other.load()
    except Exception as error:  # importing foreign code may raise anything
        raise UserError(f"{what}, which {other.value} of another package provides, and it cannot be imported: {error}") from error


@cache
def _others(kind: str) -> dict[str, Any]:
    """Name to entry point, of other packages. Cached: searching all installed packages takes about 10 ms."""
    return {point.name: point for point in entry_points(group=f"tltrain.{kind}")}


def named(kind: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Pydantic annotations for a string that must be a registered name of this kind. The JSON schema lists only our names.

    With `kept` in the validation context, any name is accepted: the recipe belongs to an existing run, whose packages may be gone.
    """

    def known(name: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get("kept"):
            registry.check(kind, name, f"{name!r} is unknown")
        return name

    return AfterValidator(known), WithJsonSchema({"enum": list(registry.KINDS[kind]), "type": "string"})
