"""A run in the words of a paper's methods section, and the works to cite for what it used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import yaml

from tltrain.core.recipe import Recipe, Stage
from tltrain.runs.record import RunRecord, number
from tltrain.runs.report.formatting import grouped, interval, metric_name, percent, plural

SOLVED = {"ridge": "ridge regression", "logistic": "multinomial logistic regression", "nearest_mean": "class means"}
TRAINED = {
    "all": "",
    "biases_and_norms": ", of which only biases and normalisation layers trained (BitFit)",
    "lora": ", by low-rank updates (LoRA)",
}
TAUGHT = {"features": "pooled features", "tokens": "features at each place of the last map"}
AUGMENTED = {
    "light": "random crops with padding and flips",
    "strong": "random resized crops, flips, rotation and colour jitter",
    "trivial": "TrivialAugment",
    "rand": "RandAugment",
}


def paragraph(run: RunRecord) -> str:
    """The methods paragraph, ready to copy."""
    recipe = run.recipe
    said = [_began(run), *(_stage(stage) for stage in recipe.stages), _common(recipe), _distilled(run), _result(run), _software(run)]
    return " ".join(sentence for sentence in said if sentence)


def _began(run: RunRecord) -> str:
    data, backbone, env = run.recipe.data, run.recipe.backbone, run.env.get("data") or {}
    start = f"weights {backbone.weights}" if backbone.weights else "random weights"
    network = f"{backbone.name} ({start})" if backbone.name else f"the network of {backbone.weights}"
    sizes = [f"{env[name]:,} for {use}" for name, use in (("train", "training"), ("val", "validation"), ("test", "testing")) if name in env]
    images = f"{' and '.join([', '.join(sizes[:-1]), sizes[-1]]) if len(sizes) > 1 else ''.join(sizes)}" or "the images"
    classes = f" in {env['classes']} classes" if "classes" in env else ""
    size = f", at {data.size} by {data.size} pixels" if data.size else ""
    verb = "trained" if backbone.weights is None else "fine-tuned"
    return f"We {verb} {network} on images of {data.source}{classes}: {images} (split with seed {data.seed}){size}."


def _stage(stage: Stage) -> str:
    what = {"head": "the head", "all": "the whole network"}.get(stage.unfreeze, f"everything from {stage.unfreeze} on")
    if stage.solve is not None:
        return f"In stage {stage.name}, the head was worked out from the frozen features by {SOLVED[stage.solve]}."
    length = plural(stage.steps, "step") if stage.steps is not None else f"{stage.epochs:g} {'epoch' if stage.epochs == 1 else 'epochs'}"
    optimizer = {"sgd": f"SGD (momentum {stage.momentum:g})", "adamw": "AdamW"}[stage.optimizer]
    rate = f"peak learning rate {stage.lr:g}, {stage.schedule} schedule"
    rate += f", {stage.warmup:.0%} warm-up" if stage.warmup else ""
    rate += f", multiplied by {stage.layer_decay:g} for each layer below the head" if stage.layer_decay < 1 else ""
    rate += f", weight decay {stage.weight_decay:g}" if stage.weight_decay else ""
    regular = [f"label smoothing {stage.label_smoothing:g}"] if stage.label_smoothing else []
    regular += [f"{name} (alpha {value:g})" for name, value in (("mixup", stage.mixup), ("CutMix", stage.cutmix)) if value]
    regular += [AUGMENTED[stage.augment]] if stage.augment != "none" else []
    regular += [f"random erasing with probability {stage.erasing:g}"] if stage.erasing else []
    regular += [f"an exponential moving average of the weights (decay {stage.ema:g})"] if stage.ema else []
    regular += [f"gradients clipped to norm {stage.clip:g}"] if stage.clip else []
    with_ = f", with {', '.join(regular)}" if regular else ""
    return f"In stage {stage.name}, {what} trained for {length} with {optimizer} ({rate}){TRAINED[stage.trains]}{with_}."


def _common(recipe: Recipe) -> str:
    balance = {"weights": ", classes weighted by inverse frequency", "sampler": ", classes drawn equally often", "none": ""}
    chosen = f" Weights were chosen by validation {metric_name(recipe.select)}." if any(s.carry != "last" for s in recipe.stages) else ""
    return f"The batch held {plural(recipe.batch, 'image')}{balance[recipe.data.balance]}.{chosen}"


def _distilled(run: RunRecord) -> str:
    if (spec := run.recipe.distill) is None:
        return ""
    named = ", ".join([str(spec.teacher.weights or spec.teacher.name), *spec.ensemble])
    whose = f"an ensemble of {len(spec.teachers)} teachers, {named}" if spec.ensemble else f"the teacher {named}"
    num = (run.env.get("data") or {}).get("unlabelled")
    beside = f", and those alone of {num:,} further images of {spec.unlabelled}, without labels" if num else ""
    if run.recipe.matches_features:
        return (
            f"Before it saw labels, in stage {run.recipe.stages[0].name}, the network learned the {TAUGHT[spec.target]} of {whose} through "
            f"a linear map that was then left out ({spec.loss} loss){beside}."
        )
    kept, classes = spec.top_k, (run.env.get("data") or {}).get("classes")
    short = f", over the {kept} likeliest classes and all others as one" if kept and (classes is None or kept < classes) else ""
    return (
        f"The network also learned the softened answers of {whose} ({spec.loss} loss{short}, temperature {spec.temperature:g}, "
        f"weight {spec.weight:g}){beside}."
    )


def _result(run: RunRecord) -> str:
    if run.test is None:
        return ""
    if "per_label" in run.test:
        each = ", ".join(f"{name} {percent(number(run.test, key))}" for name, key in (("mAP", "map"), ("macro F1", "f1_macro")))
        return f"Each class was a label of its own (binary cross entropy). On {plural(int(run.test['n']), 'test image')}: {each}."
    n, share = int(run.test["n"]), number(run.test, "top1")
    f1 = percent(number(run.test, "f1_macro"))
    accuracy = f"{percent(share)} (95 % interval {interval(share, n, run.test)})"
    return f"On {plural(n, 'test image')}{grouped(run.test)} accuracy was {accuracy} and macro F1 {f1}."


def _software(run: RunRecord) -> str:
    versions, env = run.env.get("versions") or {}, run.env
    names = {"tltrain": "tltrain", "torch": "PyTorch", "torchvision": "torchvision", "transformers": "transformers", "timm": "timm"}
    used = [
        f"{title} {versions[name]}"
        for name, title in names.items()
        if name in versions and (name not in ("transformers", "timm") or USED[name](run))
    ]
    device, processes = (env.get("hardware") or {}).get("device"), (env.get("accelerate") or {}).get("processes", 1)
    where = f", on {plural(int(processes), 'process')} ({device})" if device else ""
    return f"We used {', '.join(used)}{where}; the random seed was {run.recipe.seed}." if used else ""


def bibtex(run: RunRecord) -> str:
    """BibTeX entries of the software, the network, and the methods that the run used."""
    known = entries()
    return "\n".join(known[name] for name, used in USED.items() if used(run))


def entries() -> dict[str, str]:
    """The BibTeX entry of each name of USED."""
    text = (files("tltrain.runs.pages") / "references.yaml").read_text(encoding="utf-8")
    return {str(name): str(entry) for name, entry in yaml.safe_load(text).items()}


def _any(uses: Callable[[Stage], Any]) -> Callable[[RunRecord], bool]:
    return lambda run: any(uses(stage) for stage in run.recipe.stages)


def _network(*parts: str) -> Callable[[RunRecord], bool]:
    """Whether a part of the network's name, or of its weights', is one of these."""

    def named(run: RunRecord) -> bool:
        text = f"{run.recipe.backbone.name} {run.recipe.backbone.weights}".lower().replace("-", "").replace("_", "")
        return any(part in text for part in parts)

    return named


def _package(*names: str) -> Callable[[RunRecord], bool]:
    return lambda run: any(f"{name}:" in str(run.recipe.backbone.name) for name in names)


USED: dict[str, Callable[[RunRecord], bool]] = {
    "tltrain": lambda run: True,
    "pytorch": lambda run: True,
    "accelerate": lambda run: True,
    "scikit-learn": lambda run: run.test is not None,
    "torchvision": lambda run: not _package("timm", "hf")(run),
    "transformers": lambda run: _package("hf")(run) or _network("vit")(run),
    "timm": _package("timm"),
    "resnet": _network("resnet"),
    "vit": _network("vit", "deit", "dino"),
    "efficientnet": _network("efficientnet"),
    "convnext": _network("convnext"),
    "swin": _network("swin"),
    "mobilenetv3": _network("mobilenetv3"),
    "dinov2": _network("dinov2"),
    "adamw": _any(lambda stage: stage.lr is not None and stage.optimizer == "adamw"),
    "cosine": _any(lambda stage: stage.lr is not None and stage.schedule == "cosine"),
    "layer_decay": _any(lambda stage: stage.layer_decay < 1),
    "label_smoothing": _any(lambda stage: stage.label_smoothing),
    "mixup": _any(lambda stage: stage.mixup),
    "cutmix": _any(lambda stage: stage.cutmix),
    "trivial": _any(lambda stage: stage.augment == "trivial"),
    "rand": _any(lambda stage: stage.augment == "rand"),
    "erasing": _any(lambda stage: stage.erasing),
    "lora": _any(lambda stage: stage.trains == "lora"),
    "bitfit": _any(lambda stage: stage.trains == "biases_and_norms"),
    "blend": _any(lambda stage: stage.carry == "blend"),
    "distillation": lambda run: run.recipe.distill is not None and not run.recipe.matches_features,
    "calibration": lambda run: bool((run.test or {}).get("calibration")),
    "gradcam": lambda run: any("lit" in item for item in run.mistakes),
}
"""Reference to whether a run used it."""
