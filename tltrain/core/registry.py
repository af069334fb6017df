"""What can be added to tltrain, by kind and name. Each thing is one file, one line here, one test.

A value is "module:object". It is imported when its name is first asked for, so that reading a command stays quick. Another package
adds a thing of its own by an entry point, without a line of ours:

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
    "families": {"resnet": "tltrain.models.families.resnet:FAMILY", "vit": "tltrain.models.families.vit:FAMILY"},
    "sources": {
        "cifar10": "tltrain.data.sources.arrays:CIFAR10",
        "cifar100": "tltrain.data.sources.arrays:CIFAR100",
        "digits": "tltrain.data.sources.arrays:DIGITS",
        "printed": "tltrain.data.sources.printed:PRINTED",
        "folder": "tltrain.data.sources.folder:FOLDER",
        "csv": "tltrain.data.sources.csv_file:CSV",
    },
    "losses": {"cross_entropy": "tltrain.training.losses.cross_entropy:cross_entropy"},
    "distill_losses": {"kd": "tltrain.training.losses.distillation:distillation"},
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
    },
    "trackers": {
        "wandb": "tltrain.runs.trackers.wandb:WandbTracker",
    },
    "exporters": {
        "hf": "tltrain.evaluation.exporters.hf:EXPORTER",
        "torchvision": "tltrain.evaluation.exporters.torchvision:EXPORTER",
        "onnx": "tltrain.evaluation.exporters.onnx:EXPORTER",
        "torch-export": "tltrain.evaluation.exporters.torch_export:EXPORTER",
    },
    "targets": {
        "local": "launcher.local:TARGET",
        "slurm": "launcher.slurm.target:TARGET",
    },
}
"""Kind to name to "module:object"; the entry points of other packages stand in the group tltrain.KIND."""


def names(kind: str) -> tuple[str, ...]:
    """The names of a kind: ours in the order they stand here, then those of other packages, sorted."""
    return tuple(dict.fromkeys([*KINDS[kind], *sorted(_others(kind))]))


def check(kind: str, name: str, what: str) -> None:
    """Raise UserError, as `find` does, for an unknown name. Nothing is imported."""
    if name not in KINDS[kind] and name not in _others(kind):
        near = get_close_matches(name, names(kind), n=1)
        raise UserError(f"{what}; " + (f"did you mean {near[0]}?" if near else f"it can be {', '.join(names(kind))}"))


def find(kind: str, name: str, what: str) -> Any:
    """The thing of a kind with this name, imported. Ours win over another package's of the same name.

    what: the value the name comes from, as a message begins: "data.source is 'x'". Raises UserError for an unknown name, with the
    nearest known one, and for a package whose entry point cannot be imported.
    """
    own = KINDS[kind].get(name)
    if own is not None:
        module, _, attribute = own.partition(":")
        return getattr(import_module(module), attribute)
    check(kind, name, what)
    other = _others(kind)[name]
    try:
        return other.load()
    except Exception as error:  # a package of somebody else: whatever its import meets
        raise UserError(f"{what}, which {other.value} of another package provides, and it cannot be imported: {error}") from error


@cache
def _others(kind: str) -> dict[str, Any]:
    """Name to entry point of other packages. Read once: looking through all that is installed takes some 10 ms."""
    return {point.name: point for point in entry_points(group=f"tltrain.{kind}")}


def named(kind: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations of a string that must name something of a kind. The schema lists our names alone.

    Where the validation's context says kept, the recipe is of a run that was begun, and any name is taken.
    """

    def known(name: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get("kept"):
            registry.check(kind, name, f"{name!r} is unknown")
        return name

    return AfterValidator(known), WithJsonSchema({"enum": list(registry.KINDS[kind]), "type": "string"})
