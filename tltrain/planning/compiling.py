"""Whether --compile pays in a run: what its faster steps save, against the seconds that each stage takes to compile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tltrain.cache.cost_model import why_not_cacheable
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.measure import Machine, time_frozen, timed
from tltrain.cache.planner import CHUNK
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import duration
from tltrain.core.stage_plan import StagePlan
from tltrain.models.factory import Loaded

GAIN = {"no": 1.21, "bf16": 1.36, "fp16": 1.36}
"""Speed of a compiled training step against one that is not. bf16: the geometric mean of ResNet-50 (1.45) and ViT-B/16 (1.28), as
`python -m benchmarks.gpu` measured them on an H200 with torch 2.11; fp16 is taken for the same. fp32: not measured by us, the mean over 163
networks on an A100 that PyTorch published for its 2.0 (pytorch.org/get-started/pytorch-2-x)."""
COMPILE_S = 55.0
"""Seconds to compile a whole network for training, nothing compiled before: the same command, ResNet-50 69 s, ViT-B/16 42 s, four such
processes at once on 16 cores. What stands in torch's cache already takes 2 to 4 s."""
TRAINING = 3
"""A training step takes about so many times its forward pass."""


@dataclass(frozen=True)
class Estimate:
    """One stage."""

    steps_s: float
    """Seconds of what would be compiled, over all of its steps, without compiling it."""
    share: float
    """Of the network's blocks, those that would be compiled."""

    def saved_s(self, precision: str) -> float:
        """Seconds that compiling saves; negative where it costs more."""
        return self.steps_s * (1 - 1 / GAIN.get(precision, GAIN["no"])) - COMPILE_S * self.share


def estimates(student: Loaded, planned: Sequence[StagePlan], machine: Machine, world: int) -> list[Estimate]:
    """Of each stage, by forward passes that are timed on this machine's device."""
    chain = timed(student.chain, machine.device)
    chunk, num_blocks = CHUNK.get(machine.device.type, 64), len(chain.blocks)

    def forward_s(stop: int | None) -> float:
        return (
            0.0
            if stop == 0
            else time_frozen(FrozenModel(chain, stop, None, chunk, machine.autocast), student.preprocess.size, machine.device)[0]
        )

    whole_s, found = forward_s(None), []
    for stage in planned:
        first = 0 if chain.runs_whole else stage.first_trainable_block
        frozen_s = forward_s(first)
        # what could be stored runs beside the model in any case, and is not compiled
        beside = first > 0 and why_not_cacheable(stage) is None
        image_s = TRAINING * max(0.0, whole_s - frozen_s) + (0.0 if beside else frozen_s)
        images = stage.num_steps * stage.batch / world
        found.append(Estimate(images * image_s, (num_blocks - first if beside else num_blocks) / num_blocks))
    return found


def note(start: RunFlags, student: Loaded, planned: Sequence[StagePlan], machine: Machine, world: int = 1) -> str:
    """A line of the plan; empty where nothing is known: on a CPU, and where --compile is refused: beside --recompute, under DeepSpeed."""
    if machine.device.type != "cuda" or start.recompute or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return ""
    return line(estimates(student, planned, machine, world), machine.precision, start.compile)


def line(found: Sequence[Estimate], precision: str, compiled: bool) -> str:
    saved_s = sum(estimate.saved_s(precision) for estimate in found)
    why = f"about {duration(sum(e.steps_s for e in found))} of steps, {GAIN.get(precision, GAIN['no']):g} times as fast, "
    why += f"against {duration(COMPILE_S * sum(e.share for e in found))} of compiling"
    if saved_s > 0:
        return f"compile {'it' if compiled else '--compile would'} save{'s' * compiled} about {duration(saved_s)}: {why}"
    return f"compile {'it costs' if compiled else 'does not pay: --compile would cost'} about {duration(-saved_s)} more: {why}"
