"""Estimates whether --compile pays: the time saved by faster steps against the time to compile each stage."""

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
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded

GAIN = {"no": 1.21, "bf16": 1.36, "fp16": 1.36}
"""Speed-up of a training step by compiling, by precision.

bf16: the geometric mean of ResNet-50 (1.45) and ViT-B/16 (1.28), measured by `python -m benchmarks.gpu` on an H200 with torch 2.11.
fp16: assumed equal to bf16. fp32 (`no`): not measured here. It is the mean over 163 networks on an A100, as published for PyTorch 2.0
(pytorch.org/get-started/pytorch-2-x).
"""
COMPILE_S = 55.0
"""Seconds to compile a whole network for training with an empty compile cache.

Measured by the same command: ResNet-50 69 s, ViT-B/16 42 s, with four such processes at once on 16 cores. With a warm cache it takes 2
to 4 s.
"""
TRAINING = 3
"""Time of a training step in forward passes (approximate)."""


@dataclass(frozen=True)
class CompileCost:
    """The cost of one stage without compiling, and the part of it that compiling affects."""

    steps_s: float
    """Seconds, over all steps, in the blocks that would be compiled. Measured uncompiled."""
    share: float
    """Fraction of the network's blocks that would be compiled."""

    def saved_s(self, precision: str) -> float:
        """Seconds that compiling saves. Negative if it costs more than it saves."""
        return self.steps_s * (1 - 1 / GAIN.get(precision, GAIN["no"])) - COMPILE_S * self.share


def forward_s(chain: Chain, stop: int | None, size: int, machine: Machine) -> float:
    """Seconds per image of a forward pass, timed. chain: on the machine's device. stop: the block to end before. None: the whole network.

    size: side of an image, pixels.
    """
    frozen = FrozenModel(chain, stop, None, CHUNK.get(machine.device.type, 64), machine.autocast)
    return time_frozen(frozen, size, machine.device)[0]


def compile_costs(student: Loaded, planned: Sequence[StagePlan], machine: Machine, world: int) -> list[CompileCost]:
    """One estimate per stage, from forward passes timed on this machine's device. world: number of processes."""
    chain = timed(student.chain, machine.device)
    num_blocks, size = len(chain.blocks), student.preprocess.size
    whole_s, costs = forward_s(chain, None, size, machine), []
    for stage in planned:
        first = 0 if chain.runs_whole else stage.first_trainable_block
        frozen_s = forward_s(chain, first, size, machine) if first > 0 else 0.0
        # a prefix whose outputs can be cached runs outside the model and is not compiled
        beside = first > 0 and why_not_cacheable(stage) is None
        image_s = TRAINING * max(0.0, whole_s - frozen_s) + (0.0 if beside else frozen_s)
        images = 0 if stage.spec.solve else stage.num_reads / world
        costs.append(CompileCost(images * image_s, (num_blocks - first if beside else num_blocks) / num_blocks))
    return costs


def note(start: RunFlags, student: Loaded, planned: Sequence[StagePlan], machine: Machine, world: int = 1) -> str:
    """The line of the plan about compiling. Empty on a CPU, and where --compile is refused: with --recompute or DeepSpeed."""
    if machine.device.type != "cuda" or start.recompute or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return ""
    return line(compile_costs(student, planned, machine, world), machine.precision, start.compile)


def line(costs: Sequence[CompileCost], precision: str, compiled: bool) -> str:
    """The costs as a line of the plan. compiled: whether --compile is on."""
    saved_s = sum(cost.saved_s(precision) for cost in costs)
    why = f"about {duration(sum(e.steps_s for e in costs))} of steps, {GAIN.get(precision, GAIN['no']):g} times as fast, "
    why += f"against {duration(COMPILE_S * sum(e.share for e in costs))} of compiling"
    if saved_s > 0:
        return f"compile {'it' if compiled else '--compile would'} save{'s' * compiled} about {duration(saved_s)}: {why}"
    return f"compile {'it costs' if compiled else 'does not pay: --compile would cost'} about {duration(-saved_s)} more: {why}"
