"""What a recipe may say of its teacher. Features of one are learned in a stage of pre-training, without labels, before the other stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tltrain.core.schema.data import refuse_secrets, set_beside

TEMPERATURE = 4.0
Target = Literal["logits", "features", "tokens"]
FEATURE_LOSS = "cosine"
"""The default. It leaves a feature's length out, which differs between networks: a learning rate does not hang on the teacher."""
FEATURE_LOSSES = (FEATURE_LOSS, "smooth_l1")


def with_defaults(raw: Any) -> Any:
    """The values of `distill`, with those that follow from its target where they are absent."""
    return {"weight": 1.0, "loss": FEATURE_LOSS, **raw} if isinstance(raw, dict) and raw.get("target") in ("features", "tokens") else raw


def check(distill: Any) -> None:
    """Raise ValueError where the values of `distill` do not go together."""
    refuse_secrets(distill.unlabelled or "")
    if distill.unlabelled is not None and distill.weight == 0:
        raise ValueError("unlabelled pictures have the teacher's term alone, and weight is 0; raise weight, or leave unlabelled out")
    if distill.target == "logits":
        return
    told = f"target: {distill.target} is learned without labels"
    if distill.weight != 1:
        losses = " or ".join(FEATURE_LOSSES)
        raise ValueError(f"{told}, and weight: {distill.weight:g} leaves them a share; set weight: 1, and loss: {losses}")
    if distill.temperature != TEMPERATURE:
        softens = f"temperature: {distill.temperature:g} softens logits"
        raise ValueError(f"{softens}, and target: {distill.target} has none; leave temperature out")
    if distill.top_k is not None:
        raise ValueError(f"top_k: {distill.top_k} keeps logits of some classes, and target: {distill.target} has none; leave top_k out")
    if distill.ensemble:
        raise ValueError("ensemble is a mean of answers, and the features of several networks have no mean; leave ensemble out")


def check_pretraining(stages: Sequence[Any], usual_loss: str, target: str) -> None:
    """Raise ValueError unless the first stage can learn features without labels, and a stage behind it learns labels.

    stages: of the recipe. usual_loss: the default of `stages.N.loss`. target: of the recipe's `distill`.
    """
    first = stages[0]
    told = f"stage {first.name} is the first, and learns the teacher's features without labels (distill.target: {target})"
    if len(stages) == 1 and first.schedule != "range":  # whose rate `tltrain lr` looks for: nothing is handed on
        raise ValueError(f"{told}; it is the only one: add stages behind it that learn labels, such as unfreeze: head")
    idle = {"loss": usual_loss, "label_smoothing": 0, "patience": None, "solve": None}
    if first.carry == "last":
        idle["ema"] = None
    if given := set_beside(first, idle):
        raise ValueError(f"{told}; {', '.join(given)} would do nothing there, leave {'them' if len(given) > 1 else 'it'} out")
    if first.carry not in ("last", "ema"):
        raise ValueError(f"{told}; without labels no weights are best by a metric, as carry: {first.carry} asks; set carry: last, or ema")
    if raced := [stage.name for stage in stages if stage.unfreeze == "auto"]:
        raise ValueError(f"stage {raced[0]} has unfreeze: auto, which races depths by labels, and the first stage has none; name the depth")


def of_one_class(distill: Any) -> list[str]:
    """What `distill` says that knows one class an image alone. None: there is no teacher."""
    if distill is None:
        return []
    usual = {"target": "logits", "loss": "kd", "top_k": None, "unlabelled": None}
    return [f"distill.{given}" for given in set_beside(distill, usual)]
