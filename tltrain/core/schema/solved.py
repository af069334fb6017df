"""What a stage may say whose head is worked out, not trained."""

from __future__ import annotations

from typing import Any

from tltrain.core.schema.data import set_beside


def check_solved(stage: Any, usual_loss: str) -> None:
    """A solved stage takes no steps: what says how they are taken would do nothing. usual_loss: the default. Raises ValueError."""
    told = f"solve: {stage.solve}"
    if stage.unfreeze != "head":
        raise ValueError(f"{told} works out the head alone, and unfreeze is {stage.unfreeze}; set unfreeze: head, or leave solve out")
    idle = {
        "epochs": None, "steps": None, "lr": None, "mixup": 0, "cutmix": 0, "loss": usual_loss, "label_smoothing": 0, "ema": None,
        "patience": None, "clip": None, "warmup": 0, "trains": "all",
    }  # fmt: skip
    if given := set_beside(stage, idle):
        each = "them" if len(given) > 1 else "it"
        raise ValueError(f"{told} takes no optimizer steps, so that {', '.join(given)} would do nothing; leave {each} out")
    if stage.carry in ("ema", "blend"):
        raise ValueError(f"{told} has no path of weights that carry: {stage.carry} could take from; set carry: best, or last")
