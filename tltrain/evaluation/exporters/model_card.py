"""Model card of an export (README.md): usage, training data, test metrics with confidence intervals, limits, classes and recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tltrain.core.output.escape import markdown, markdown_block, markdown_code
from tltrain.evaluation.trained import TrainedModel
from tltrain.runs import run_dir
from tltrain.runs.record import Predicted, read_predictions
from tltrain.runs.report.formatting import grouped
from tltrain.runs.report.stats import ends_of, f1_interval

FEW = 30  # with fewer test images, the recall of a class is too uncertain


def model_card(trained: TrainedModel, usage: str, fingerprint: str | None) -> str:
    """The model card in Markdown. `usage` shows how to load the export. `fingerprint` is used where the run recorded none."""
    recipe, card = trained.recipe, trained.card
    test = run_dir.test_metrics(trained.path)
    parts = [
        f"# {markdown(recipe.name)}\n\n{markdown(recipe.purpose or 'An image classifier')}: {markdown(card.name)}, "
        f"{len(trained.classes)} classes. Made with tltrain.",
        f"## How to use\n\n{usage}\n\nImages are resized to {card.resize} px at the shorter side ({card.interpolation}) and cropped to the "
        f"middle {card.size} x {card.size} px. Mean {_numbers(card.mean)}, standard deviation {_numbers(card.std)}, of values in [0, 1].",
        *([] if card.thresholds is None else [_labels(trained)]),
        "## Data\n\n" + "\n".join(_data(trained, fingerprint)),
        "## How good it is\n\n" + "\n".join(_figures(trained, test)),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(trained, test)),
        f"## Classes\n\n{', '.join(map(markdown, trained.classes))}",
        f"## Recipe\n\n{markdown_block(recipe.to_yaml(), 'yaml')}",
    ]
    return "\n\n".join(parts) + "\n"


def _labels(trained: TrainedModel) -> str:
    """How logits become labels, where an image may have several."""
    rows = [f"| {markdown(name)} | {t:.4f} |" for name, t in zip(trained.classes, trained.card.thresholds or (), strict=True)]
    table = "\n".join(["| label | threshold |", "|--|--|", *rows])
    return (
        "An image may have several of these labels, or none (`multi_label_classification`). The probability of each is the sigmoid of its "
        f"own logit, `1 / (1 + exp(-logit))`: no softmax. A label is named where it reaches its threshold, fitted on val:\n\n{table}"
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)


def _data(trained: TrainedModel, fingerprint: str | None) -> Iterator[str]:
    known = run_dir.environment(trained.path).get("data", {})
    yield f"- source: {markdown_code(trained.recipe.data.source)}"
    code = markdown_code(str(known.get("fingerprint") or fingerprint or "not known"))
    yield f"- fingerprint (classes, every sample's bytes and label, splits): {code}"
    spec = trained.recipe.backbone
    own = trained.family.weights_in(spec.name) if spec.name is not None else None
    yield f"- weights to start from: {markdown(spec.weights or own or 'random')}"


def _figures(trained: TrainedModel, test: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines of a table of test metrics with 95 % confidence intervals."""
    if test is None:
        yield "This run has no test figures."
        return
    yield f"On {test['n']:,} test images{grouped(test)}, with 95 % intervals over the choice of them:\n"
    yield "| figure | value | interval |\n|--|--|--|"
    if "per_label" in test:
        yield from _label_figures(test)
        return
    predicted = read_predictions(trained.path)
    low, high = ends_of(test, test["top1"], test["n"])
    yield f"| accuracy | {100 * test['top1']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % (Wilson) |"
    if predicted is not None:
        yield f"| F1, mean over classes | {100 * test['f1_macro']:.1f} % | {_f1_interval(predicted)} (bootstrap) |"
    calibration = test.get("calibration")
    if calibration and calibration["temperature"] != 1:
        yield f"| calibration error, as exported | {100 * calibration['ece']:.1f} % | before calibration {100 * test['ece']:.1f} % |"
    else:
        yield f"| calibration error | {100 * test['ece']:.1f} % | not calibrated: the run has no val images |"


def _label_figures(test: Mapping[str, Any]) -> Iterator[str]:
    """`_figures` of several labels: the means, then label by label."""
    low, high = ends_of(test, test["subset_accuracy"], test["n"])
    exact = f"{100 * test['subset_accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % (Wilson)"
    yield f"| images with all labels right | {exact} |"
    for name, key in (("mAP", "map"), ("F1, mean over labels", "f1_macro"), ("AUROC, mean over labels", "auroc_macro")):
        yield f"| {name} | {_share(test[key])} | |"
    yield f"| calibration error, mean over labels | {_share(test['calibration']['ece'])} | |"
    yield "\n| label | test images | AP | AUROC | F1 |\n|--|--|--|--|--|"
    for row in test["per_label"]:
        yield f"| {markdown(row['name'])} | {row['support']:,} | {' | '.join(_share(row[key]) for key in ('ap', 'auroc', 'f1'))} |"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _f1_interval(predicted: Predicted) -> str:
    _, low, high = f1_interval(predicted.label, predicted.predicted, group_N=predicted.group)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _limits(trained: TrainedModel, test: Mapping[str, Any] | None) -> Iterator[str]:
    if trained.card.thresholds is None:
        yield "It always names one of its classes, also for an image that shows none of them."
    yield "The test images come from the same source as the training images: on photos of another kind expect less."
    if (white := trained.recipe.data.white) is not None:
        yield f"Grey images with 16 bits were scaled so that {white} is white (`data.white`); do the same before other tools."
    yield "Transparency is taken as white and a photo's rotation mark is followed in training; other tools may do otherwise."
    if test is None:
        return
    rows = [row for row in test.get("per_label", test.get("per_class", ())) if row["support"]]
    few = [row["name"] for row in rows if row["support"] < FEW]
    if few:
        others = f" and {len(few) - 20} others" if len(few) > 20 else ""
        yield f"Fewer than {FEW} test images each, so that little is known of: {', '.join(map(markdown, few[:20]))}{others}."
    if not rows:
        return
    worst = min(rows, key=lambda row: row["recall"])
    yield f"The class found least often is {markdown(worst['name'])}: {100 * worst['recall']:.0f} % of its {worst['support']} test images."
