"""Random schedules of freezing and unfreezing: replicas equal, exactly the intended tensors changed, every strategy the same weights."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import trials, world
from benchmarks.world import Trial
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.chain import Chain

WHERE = {
    "resnet-tiny": ("head", "layer4", "layer3", "layer2", "layer1", "all"),
    "vit-tiny": ("head", "block.3", "block.2", "block.1", "block.0", "all"),
}
TOLERANCE = {"fsdp2": 1e-9, "zero2": 1e-3, "zero3": 1e-3}  # relative; ZeRO has no float64


@dataclass(frozen=True)
class Schedule:
    """Stages of one net, each from one block on, in any order: blocks freeze, unfreeze, and freeze again."""

    backbone: str
    stages: tuple[dict[str, Any], ...]
    strategies: tuple[str, ...]
    """Run beside DDP, which all are compared with."""


def draw_schedules(seed: int, num: int) -> list[Schedule]:
    return [_draw(random.Random(f"{seed} {i}"), i) for i in range(num)]


def _draw(draw: random.Random, i: int) -> Schedule:
    """Half of them under FSDP2 in float64 with any optimizer, the rest under ZeRO in fp32 with SGD, under which rounding does not grow."""
    backbone, strategies = ("resnet-tiny", "vit-tiny")[i // 2 % 2], ("fsdp2",) if i % 2 == 0 else ("zero2", "zero3")
    stages = []
    for number in range(draw.randint(2, 4)):
        adam = strategies == ("fsdp2",) and draw.random() < 0.6
        stages.append({
            "name": f"s{number}", "unfreeze": draw.choice(WHERE[backbone]), "carry": "last", "eval_epochs": 10,
            # the head starts at zero: the first step has no gradient below it
            "steps": draw.randint(1, 2) + (number == 0), "optimizer": "adamw" if adam else "sgd", "lr": 0.002 if adam else 0.05,
            "clip": draw.choice((None, 0.5)), "layer_decay": draw.choice((1.0, 0.8)), "weight_decay": draw.choice((0.0, 0.05)),
        })  # fmt: skip
    return Schedule(backbone, tuple(stages), strategies)


def schedule_problems(schedule: Schedule, folder: Path, num: int = 2) -> list[str]:
    """Run a schedule under DDP and its own strategies. Returns what is wrong; empty when all is well."""
    spec = trials.recipe(backbone=trials.NETS[schedule.backbone], stages=list(schedule.stages))
    runs, problems = {}, []
    for strategy in ("ddp", *schedule.strategies):
        path = folder / strategy
        path.mkdir()
        recorded: dict[str, Any] = {"before": "record_replicas", "arguments": (str(path),)} if strategy in ("ddp", "zero2") else {}
        double = schedule.strategies == ("fsdp2",)
        runs[strategy] = world.finish(Trial(spec, str(path / "run"), num, strategy, float64=double, **recorded))
        if recorded and len({(path / f"replica.rank{rank}").read_text() for rank in range(num)}) != 1:
            problems.append(f"{strategy}: replicas differ")
        problems += [f"{strategy}: {problem}" for problem in wrongly_changed(runs[strategy], schedule, double)]
        apart = trials.distance(runs[strategy], runs["ddp"])
        if strategy != "ddp" and not apart < TOLERANCE[strategy]:
            problems.append(f"{strategy}: weights are {apart:.1e} from DDP's")
    return problems


def wrongly_changed(run: Path, schedule: Schedule, double: bool) -> list[str]:
    """Tensors that changed in a stage that froze them, or did not change in one that trains them."""
    loaded = factory.load(Backbone(**trials.NETS[schedule.backbone]), classes=["a"] * 10, size=32, resize=32, head="new", seed=0)
    chain: Chain = loaded.chain.double() if double else loaded.chain
    before, problems = dict(chain.net.state_dict()), []
    for i, stage in enumerate(schedule.stages):
        after = load_file(run / "stages" / f"{i}-{stage['name']}" / "weights.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        trains = range(chain.index(stage["unfreeze"]), len(chain.blocks))
        intended = {name for i in trains for name, _ in chain.parameters_of(i)}
        # softmax takes no notice of a key projection's bias: its gradient is rounding, and may be zero
        wrong = {name for name in changed ^ intended if name in changed - intended or not name.endswith("k_proj.bias")}
        if wrong:
            problems.append(f"stage {stage['name']} ({stage['unfreeze']}): {sorted(wrong)} changed and should not, or the other way round")
        before = after
    return problems


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--trials", type=int, default=100, help="schedules (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="processes of a world (default: 2)")
    arguments = parser.parse_args(words)
    began, num_bad = time.monotonic(), 0
    for i, schedule in enumerate(draw_schedules(arguments.seed, arguments.trials)):
        with tempfile.TemporaryDirectory() as folder:
            problems = schedule_problems(schedule, Path(folder), arguments.processes)
        num_bad += bool(problems)
        where = " > ".join(stage["unfreeze"] for stage in schedule.stages)
        strategies = ", ".join(("ddp", *schedule.strategies))
        print(f"{i:4} {schedule.backbone:12} {strategies:17} {where}: {'; '.join(problems) or 'as intended'}", flush=True)
    print(f"{arguments.trials} schedules, {num_bad} with problems, seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    raise SystemExit(num_bad > 0)


if __name__ == "__main__":
    main()
