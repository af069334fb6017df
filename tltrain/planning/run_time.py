"""Estimates how long a run will take, stage by stage, from what was measured on this machine before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tltrain.cache.cost_model import Choice
from tltrain.cache.measure import Machine, _Meter, timed
from tltrain.cache.planner import Choices, StageChoices
from tltrain.core.output.console import duration
from tltrain.core.recipe import Augment, Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits
from tltrain.heads.cost import solve_s
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded
from tltrain.planning.compiling import TRAINING, forward_s

LEAST, MOST = 0.5, 2.0
"""Parts of the estimate between which a run is likely to end: a forward pass was timed, and not the backward pass, the optimizer, or what
else the machine will have to do."""
BUSY = 1.5
"""Programs a core that want to run, above which a machine is called busy."""
STEP_S = 0.002
"""Seconds of one step beside its images: sampling, the optimizer, the log."""
EVALUATION_S = 0.02
"""Seconds of one evaluation beside its images: the figures, the log brought to the disk, a copy of the best weights. Few images make epochs
of one step, and then most of the time is this."""


@dataclass(frozen=True)
class RunTime:
    """Seconds that a run is expected to take on its processes."""

    stages: tuple[float, ...]
    """Of each stage: what it stores, its steps and its evaluations."""
    rest: float
    """Storing base images, calibration and test."""
    busy: bool = False
    """Whether more programs wanted a processor than it has cores while this was timed."""

    @property
    def total(self) -> float:
        return sum(self.stages) + self.rest

    def after(self, stage: int) -> float:
        """Of the stages behind this one, and of the test."""
        return sum(self.stages[stage + 1 :]) + self.rest

    def line(self, names: Sequence[str]) -> str:
        """The line of the plan."""
        each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in zip(names, self.stages, strict=True))
        parts = f" ({each})" if len(names) > 1 else ""
        likely = f"{duration(LEAST * self.total)} to {duration(MOST * self.total)}"
        busy = ", while other programs kept this machine busy" if self.busy else ""
        return f"time    about {duration(self.total)}{parts}, likely {likely}: by forward passes and views timed here{busy}"


def run_time(
    recipe: Recipe, images: DataSplits, student: Loaded, teacher: Loaded | None, planned: Sequence[StagePlan], machine: Machine,
    choices: Choices, world: int = 1,
) -> RunTime | None:  # fmt: skip
    """The estimate. None where the images cannot be read yet. world: number of processes, which share the work evenly."""
    clock = _Clock(recipe, images, student, teacher, machine, choices)
    if not clock.meter.readable:
        return None
    stages = tuple(clock.stage(stage, chosen) / world + clock.solving(stage) for stage, chosen in zip(planned, choices.stages, strict=True))
    num_last = sum(len(split) for split in (images.test, images.val) if split is not None)
    limit = 2 * recipe.data.eval_limit if recipe.data.eval_limit else num_last
    filled = _filled(choices.images)
    rest = (filled + min(num_last, limit) * (clock.image_s("none") + clock.forward(None))) / world
    return RunTime(stages, rest, os.getloadavg()[0] > BUSY * (os.cpu_count() or 1))


def _filled(choice: Choice | None) -> float:
    return choice.fill_s if choice is not None and choice.place is not None else 0.0


class _Clock:
    def __init__(
        self, recipe: Recipe, images: DataSplits, student: Loaded, teacher: Loaded | None, machine: Machine, choices: Choices
    ) -> None:
        self.recipe, self.images, self.machine = recipe, images, machine
        self.meter = _Meter(images, student, recipe, machine.device, machine.workers)
        self.has_base = choices.images is not None and choices.images.place is not None
        self.chain, self.size = timed(student.chain, machine.device), student.preprocess.size
        self.teacher = None if teacher is None else timed(teacher.chain, machine.device)
        self.known: dict[tuple[int, int | None], float] = {}

    def stage(self, stage: StagePlan, chosen: StageChoices) -> float:
        """Seconds of a stage on one process."""
        cut = 0 if self.chain.runs_whole else stage.first_trainable_block
        frozen_s = self.forward(cut) if cut else 0.0
        trained_s = max(0.0, self.forward(None) - frozen_s)
        spec = stage.spec
        step_s = 0.0 if spec.solve else TRAINING * trained_s
        if _stored(chosen.train):
            seconds = stage.num_reads * step_s
        else:
            seconds = stage.num_reads * self._together(stage.images_per_view * self.image_s(spec.augment), frozen_s + step_s)
        if self.teacher is not None and stage.taught and not _stored(chosen.teacher):
            seconds += stage.num_reads * self.forward(None, teacher=True)
        num_val = 0 if self.images.val is None else min(len(self.images.val), self.recipe.data.eval_limit or len(self.images.val))
        val_s = trained_s if _stored(chosen.val) else self._together(self.image_s("none"), frozen_s + trained_s)
        filled = sum(map(_filled, (chosen.train, chosen.val, chosen.teacher)))
        return filled + seconds + stage.num_steps * STEP_S + stage.num_evaluations * (num_val * val_s + EVALUATION_S)

    def solving(self, stage: StagePlan) -> float:
        """Seconds in which one process works the head out."""
        layers = [module for module in self.chain.net.modules() if isinstance(module, nn.Linear)]
        if stage.spec.solve is None or not layers:
            return 0.0
        return solve_s(stage.spec.solve, stage.num_reads, layers[-1].in_features, len(self.images.classes))

    def image_s(self, augment: Augment) -> float:
        """Seconds of one view, where base images are stored without reading their files."""
        base_s = 0.0 if self.meter.in_memory else self.meter.base_s / max(1, self.machine.workers)
        return max(0.0, self.meter.image_s(augment) - (base_s if self.has_base else 0.0))

    def _together(self, image_s: float, network_s: float) -> float:
        """Seconds of one image: workers make views while a GPU computes; on a CPU both take the same cores."""
        return max(image_s, network_s) if self.machine.device.type != "cpu" else image_s + network_s

    def forward(self, stop: int | None, teacher: bool = False) -> float:
        """Seconds per image of a forward pass to a block, timed once."""
        chain: Chain = self.teacher if teacher and self.teacher is not None else self.chain
        key = (id(chain), stop)
        if key not in self.known:
            self.known[key] = forward_s(chain, stop, self.size, self.machine)
        return self.known[key]


def _stored(choice: Choice | None) -> bool:
    return choice is not None and choice.place is not None
