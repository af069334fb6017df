"""What `deterministic: false` gains, one recipe with both in turns, and what it costs: the kernels that differ, and equal bits of two runs.

On a CPU the gain is about 1: torch has hardly a kernel there that does not repeat itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.contestants import ours, setting
from benchmarks.timing import Case, Contestant, Lap, Result
from tltrain.core.recipe import Recipe, validate
from tltrain.training import optim
from tltrain.training.weights import trained

NETS = ("resnet18", "vit-s16")


def main(words: Sequence[str] | None = None) -> list[Result]:
    parser = timing.parser("determinism", __doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help=f"backbones (default: {' '.join(NETS)})")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 20 on a CPU, 200 on a GPU)")
    return timing.command(parser, _cases, words)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    for net in given.nets[:1] if given.smoke else given.nets:
        num_steps = 3 if given.smoke else given.steps or (200 if torch.cuda.is_available() else 20)
        made = recipe(net, num_steps)
        print("\n".join(costs(made)))
        yield case(made, num_steps)


def recipe(net: str, num_steps: int) -> Recipe:
    """Full fine-tuning on digits at 64 px."""
    data = {"source": "digits", "size": 64, "resize": 64, "per_class": 10, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "all", "unfreeze": "all", "steps": num_steps, "lr": 1e-4, "views": 1, "carry": "last", "norm_stats": "train"}
    raw = {"name": f"all-{net}", "batch": 16, "data": data, "backbone": {"name": net}, "stages": [stage | {"optimizer": "sgd"}]}
    return validate(raw, "determinism")


def case(made: Recipe, num_steps: int) -> Case:
    def lap(deterministic: bool) -> Lap:
        done = ours(made.model_copy(update={"deterministic": deterministic}), "never", cache=None, images="never")
        return Lap(done.stage_s, (done.loss,))

    return Case(
        title=f"{made.backbone.name}, {num_steps} steps of {made.batch} images at {made.data.size} px",
        contestants=[Contestant("deterministic: true", lambda: lap(True)), Contestant("deterministic: false", lambda: lap(False))],
        measure="speed",
        tolerance=0.02,
        num_steps=num_steps,
    )


def costs(made: Recipe) -> list[str]:
    """Lines: whether two runs of some steps end at equal bits, with and without, and the kernels that only one of them calls."""
    (names_true, equal_true), (names_false, equal_false) = (_promises(made, deterministic) for deterministic in (True, False))
    differ = [f"  only with true: {name}" for name in sorted(names_true - names_false)]
    differ += [f"  only with false: {name}" for name in sorted(names_false - names_true)]
    words = {True: "equal bits", False: "other bits"}
    return [
        f"{made.backbone.name}: two runs end at {words[equal_true]} with deterministic: true, at {words[equal_false]} with false",
        *(differ or [f"{made.backbone.name}: both call the same {len(names_true)} kernels"]),
    ]


def _promises(made: Recipe, deterministic: bool) -> tuple[set[str], bool]:
    """(names of what a step calls, whether two runs of five steps end at equal bits)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            first = _weights(made, device)
        second = _weights(made, device)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
    return {event.key for event in seen.key_averages()}, torch.equal(first, second)


def _weights(made: Recipe, device: torch.device, num_steps: int = 5) -> torch.Tensor:
    """All weights in a row after some steps on the first batch."""
    of = setting(made)
    chain = of.chain.to(device)
    trained.freeze(chain, of.stage)
    chain.train()
    optimizer = optim.make_optimizer(optim.parameter_groups(chain, of.stage), of.stage.spec)
    images, labels = (tensor[of.order_SB[0]].to(device) for tensor in (of.images_NCHW, of.labels_N))
    for _ in range(num_steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(chain(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat([p.detach().flatten() for p in chain.parameters()])


if __name__ == "__main__":
    main()
