"""Several trained networks as one: its prediction is the mean of theirs. A student can have it as its teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tltrain.models.chain import Block, Chain
from tltrain.models.factory import Loaded
from tltrain.models.metadata import plain
from tltrain.models.precision import full_precision


class Ensemble(nn.Module):
    """Maps images in [0, 1] (B, 3, H, W) to logits (B, classes) whose softmax at `temperature` is the mean of the members' softmax there.

    Of several labels an image (`several`): whose sigmoid is the mean of the members' sigmoid, label by label.
    The mean is of probabilities, as in deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474), softened as distillation asks.
    """

    def __init__(self, members: Sequence[Chain], temperature: float, several: bool = False) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature = temperature
        self.several = several

    def forward(self, images_B3HW: Tensor) -> Tensor:
        logits_MBK = torch.stack([full_precision(member(images_B3HW)) / self.temperature for member in self.members])
        if self.several:
            return self.temperature * (F.logsigmoid(logits_MBK).logsumexp(0) - F.logsigmoid(-logits_MBK).logsumexp(0))
        return self.temperature * (logits_MBK.log_softmax(2).logsumexp(0) - math.log(len(self.members)))


def ensemble(members: Sequence[Loaded], temperature: float) -> Loaded:
    """The members as one network that runs whole. They know the same classes and get the same views; each normalises for itself."""
    first = members[0]
    chains = [member.chain for member in members]
    net = Ensemble(chains, temperature, several=first.card.thresholds is not None)
    block = Block("ensemble", ("members",), why_whole="it is several networks")
    described = json.loads(json.dumps([plain(member.card) for member in members]))
    card = replace(first.card, name="ensemble", config={"members": described, "temperature": temperature}, mean=(0.0,) * 3, std=(1.0,) * 3)
    chain = Chain(net, [block], card.mean, card.std).eval()
    return replace(first, chain=chain, card=card, origin=" + ".join(member.origin for member in members))
