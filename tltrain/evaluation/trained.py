"""Opens a run from its folder: network, classes, preprocessing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe
from tltrain.data.views import Preprocess
from tltrain.evaluation.evaluator import vector
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.models.family import Family
from tltrain.models.metadata import WeightsMetadata, read_card
from tltrain.runs import run_dir


@dataclass(frozen=True)
class TrainedModel:
    """A run's network with its best weights. Its logits are calibrated: the head's weights are divided by the temperature.

    With `card.thresholds` it names several labels an image: probabilities are sigmoids, and need not sum to 1.
    """

    path: Path
    recipe: Recipe
    card: WeightsMetadata
    family: Family
    chain: Chain
    """On the CPU, in eval mode, frozen."""

    @cached_property
    def placed(self) -> Chain:
        """`chain` on the accelerator if there is one, else on the CPU."""
        device = torch.accelerator.current_accelerator(check_available=True)
        return self.chain if device is None else copy.deepcopy(self.chain).to(device)

    @property
    def classes(self) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.card.classes)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(self.card.size, self.card.resize, self.card.interpolation)


def load_trained(path: Path) -> TrainedModel:
    """Open the run in folder `path`. Raises UserError if it is not a run folder or has no weights yet."""
    recipe, weights = run_dir.read_recipe(path), run_dir.finished_weights(path)
    card = read_card(weights)
    if card is None or card.classes is None:
        raise UserError(f"{weights} does not name its classes; give the folder of a run that `tltrain train` wrote")
    spec = recipe.backbone.model_copy(update={"weights": str(path)})
    loaded = factory.load(spec, classes=card.classes, size=None, resize=None, head="keep", seed=recipe.seed)
    chain = loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False).eval()
    for parameter in (p for head in loaded.family.heads_of(loaded.card) for p in chain.net.get_submodule(head).parameters()):
        parameter.div_(card.temperature)
    return TrainedModel(path, recipe, loaded.card, loaded.family, chain)


@torch.no_grad()
def probabilities_and_features(trained: TrainedModel, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(as `probabilities`, what the head is given (B, D) float32 on the CPU), in one forward pass."""
    given: list[Tensor] = []
    head = trained.placed.net.get_submodule(trained.family.head_of(trained.card))
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        p_BK = probabilities(trained, x_BCHW)
    finally:
        hook.remove()
    return p_BK, vector(given[-1]).float().cpu()


@torch.no_grad()
def probabilities(trained: TrainedModel, x_BCHW: Tensor) -> Tensor:
    """Calibrated probabilities (B, K), float64 on the CPU, computed on the accelerator if there is one. x_BCHW: as `Chain` takes images."""
    device = next(trained.placed.parameters()).device
    logits_BK = trained.placed(x_BCHW.to(device)).cpu().double()
    return logits_BK.softmax(1) if trained.card.thresholds is None else logits_BK.sigmoid()
