"""What the loop does not do: wait for the device between two rows, keep a backbone that nobody asks, leave a stage's memory behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, HEAD, made_recipe
from gpu_device import DEVICES, DEVICES_SLOW, on_gpu, trained
from torch import Tensor, nn

from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.training import loop as engine
from tltrain.training import stage as staging

LOOP = (
    "loop.py", "stage.py", "objective.py", "cross_entropy.py", "distillation.py", "evaluator.py", "frozen.py", "feature_table.py",
    "mixing.py", "precision.py", "chain.py", "ddp.py",
)  # fmt: skip
"""Files through which every step goes, and which see tensors of the device."""
ASKS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__index__")
"""What makes the host wait for a number."""


class Waits:
    """The places in the loop that asked for a number of the device, while `on`."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.on, self.found, self.num_rows, self.num_steps = device, False, set[str](), 0, 0
        for name in ASKS if device == "cpu" else ():
            monkeypatch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))
        self._around("train", True, monkeypatch)
        self._around("_log_row", False, monkeypatch)

    def set(self, on: bool) -> None:
        self.on = on
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def _around(self, name: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Inside this part of the loop, waits are seen, or not."""
        original = getattr(engine._TrainLoop, name)

        def part(loop: Any, *arguments: Any) -> Any:
            before = self.on
            self.num_steps, self.num_rows = self.num_steps + on, self.num_rows + (not on)
            self.set(on)
            try:
                return original(loop, *arguments)
            finally:
                self.set(before)

        monkeypatch.setattr(engine._TrainLoop, name, part)

    def _counted(self, original: Any) -> Any:
        def asked(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            caller = sys._getframe(1).f_code
            if self.on and Path(caller.co_filename).name in LOOP and "tltrain" in caller.co_filename:
                self.found.add(f"{caller.co_name} in {caller.co_filename}")
            return original(tensor, *arguments, **named)

        return asked


def recipe(stages: list[dict[str, Any]], teacher: Path | None = None, **changes: Any) -> Recipe:
    distill = {} if teacher is None else {"distill": {"teacher": {"weights": str(teacher)}, "weight": 0.5}}
    return made_recipe(stages=[stage | {"carry": "last", "eval_epochs": 10} for stage in stages], **distill, **changes)


ONCE = HEAD | {"views": 1}
MIXED = ALL | {"steps": 8, "mixup": 0.2, "clip": 1.0, "label_smoothing": 0.1, "augment": "light"}


@pytest.mark.parametrize(("device", "precision"), [("cpu", "no"), *(on_gpu("cuda", precision) for precision in ("no", "bf16"))])
@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        pytest.param(MIXED, {"max_device_batch": 6}, id="images"),
        pytest.param(MIXED | {"optimizer": "sgd"}, {"recompute": True}, id="recomputed"),
        pytest.param(ONCE | {"steps": 8}, {"cache": "always"}, id="on-device"),
        pytest.param(ONCE | {"steps": 8}, {"cache": "always", "cache_device_gb": 0.0}, id="in-memory"),
    ],
)
def test_between_two_rows_the_host_waits_for_nothing(
    device: str, precision: str, stage: dict[str, Any], flags: dict[str, Any],
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(StagePlan, "log_steps", property(lambda stage: 4))
    waits = Waits(device, monkeypatch)
    spec = recipe([stage], finished_run if stage["name"] == "all" else None, data={"balance": "weights"})
    trained(spec, tmp_path / "run", device, precision, **flags)
    assert (waits.num_steps, waits.num_rows) == (8, 2)
    assert not waits.found


def test_a_wait_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: a loop that looks at each loss is caught."""
    original = engine._TrainLoop._watch

    def impatient(loop: Any, step: int, share: Tensor) -> None:
        if waits.on:
            read(share)
        original(loop, step, share)

    read = eval(compile("lambda share: float(share)", engine.__file__, "eval"))  # a line of the loop, as far as Python knows
    monkeypatch.setattr(engine._TrainLoop, "_watch", impatient)
    waits = Waits("cpu", monkeypatch)
    trained(recipe([HEAD]), tmp_path / "run", "cpu")
    assert waits.found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """At each step: (bytes of the network that is there to train, bytes allocated on the GPU)."""
    rows: list[tuple[int, int]] = []
    original = engine._TrainLoop._watch

    def watch(loop: Any, *arguments: Any) -> None:
        original(loop, *arguments)
        rows.append((sum(t.numel() * t.element_size() for t in _tensors(loop.ctx.spread.chain)), _allocated()))

    monkeypatch.setattr(engine._TrainLoop, "_watch", watch)
    gc.collect()
    return rows


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_stage_from_the_store_holds_no_backbone(device: str, seen: list[tuple[int, int]], tmp_path: Path) -> None:
    """Its weights leave the device once all that is asked of them is stored; and the run is the same, bit for bit."""
    runs = [trained(recipe([ONCE]), tmp_path / store, device, cache=store) for store in ("never", "always")]
    (whole, allocated), (head, left) = seen[3], seen[-1]
    assert len(seen) == 8
    assert whole > 1_000_000, "resnet-tiny in fp32"
    assert head < 0.01 * whole
    if device == "cuda":
        assert allocated - left > 0.8 * whole
    assert (runs[0] / "weights.safetensors").read_bytes() == (runs[1] / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_ten_stages_take_the_memory_of_one(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage held is given back when it is over, and not when the next one was built."""
    after: list[tuple[int, int]] = []

    def run_stage(*arguments: Any) -> Any:
        out = staging.run_stage(*arguments)
        allocated = _allocated()
        gc.collect()
        after.append((sum(type(thing) is nn.Parameter for thing in gc.get_objects()), allocated))
        return out

    monkeypatch.setattr("tltrain.training.run.run_stage", run_stage)
    kinds = [ALL, HEAD, ALL | {"unfreeze": "layer3", "clip": 1.0}, ONCE, ALL | {"optimizer": "sgd", "norm_stats": "train"}]
    stages = [kind | {"name": f"stage{i}", "steps": 1} for i, kind in enumerate(2 * kinds)]
    trained(recipe(stages), tmp_path / "run", device, "bf16" if device == "cuda" else "no")
    assert len(after) == 10
    assert max(num for num, _ in after[1:]) <= after[0][0]
    growth = [allocated - after[0][1] for _, allocated in after]
    assert max(growth) < 64 * 1024, f"bytes on the device after each stage, beside those after the first: {growth}"
