"""What tests change or spoil inside the processes of a world, by name."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch


def after_steps(num_steps: int, act: Callable[[], None]) -> None:
    """Call `act` once this process has taken `num_steps` optimizer steps."""
    taken = iter(range(1, 10**9))

    def on_step(stage: str, step: int) -> None:
        if next(taken) == num_steps:
            act()

    run: Any = import_module("tltrain.training.run")
    run.train = partial(run.train, on_step=on_step)


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def signal_after(num_steps: int, rank: int = 0, name: str = "SIGTERM") -> None:
    """A signal to one rank alone, after a number of its steps."""
    if own_rank() == rank:
        after_steps(num_steps, lambda: os.kill(os.getpid(), getattr(signal, name)))


def record_ids(folder: str) -> None:
    """Write the sample ids of every micro-batch this rank trains on, as stage, step, index."""
    from tltrain.training import loop

    train = loop._TrainLoop.train

    def recorded(self: Any, progress: Any, batches: Any) -> Any:
        def tapped() -> Any:
            for batch in batches:
                with open(f"{folder}/ids.{os.getpid()}.{own_rank()}", "a") as file:
                    kept = batch["position"][batch["weight"] > 0].tolist()
                    file.writelines(f"{progress.stage} {progress.step} {i}\n" for i in kept)
                yield batch

        return train(self, progress, iter(_Lazy(tapped())))

    loop._TrainLoop.train = recorded  # type: ignore[method-assign]


class _Lazy:
    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.source)


def say_gloo() -> None:
    """Give Accelerate a backend without saying that it runs on CPUs: it makes a world, and then does not use it."""
    runtime: Any = import_module("tltrain.distributed.runtime")
    made = runtime.InitProcessGroupKwargs
    runtime.InitProcessGroupKwargs = lambda **named: made(**(named | {"backend": "gloo"}))


def record_and_stop(folder: str, num_steps: int) -> None:
    record_ids(folder)
    signal_after(num_steps)


def fill_head(original: Callable[..., Any], *arguments: Any) -> Any:
    """Around experiment.open_nets: a student in float64 whose head is not zero, so that its first step is as telling as any other."""
    student, teacher = original(*arguments)
    chain = student.chain.double()
    generator = torch.Generator().manual_seed(7)
    for _, parameter in chain.parameters_of(len(chain.blocks) - 1):
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    if teacher is not None:
        teacher.chain.double()
    return student, teacher


def begin_with_a_head() -> None:
    wrap(import_module("tltrain.training.experiment"), "open_nets", fill_head)


def record_masks(file: str) -> None:
    """Append a line for each call of dropout in training: the hash of what it dropped."""
    original = torch.nn.functional.dropout

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        mask = original(torch.ones_like(x), p, training)
        if training:
            with open(f"{file}.rank{own_rank()}", "a") as lines:
                lines.write(f"{tuple(x.shape)} {hashlib.sha256(mask.numpy().tobytes()).hexdigest()}\n")
        return x * mask

    torch.nn.functional.dropout = dropout  # type: ignore[assignment]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace owner.name by a function that calls around(original, *arguments)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: around(original, *arguments, **named))


def after_train(num_steps: int, act: Callable[[Any], None]) -> None:
    """Call `act` with the loop's Spread once this process has taken `num_steps` optimizer steps, before anything is checked."""
    from tltrain.training import loop

    taken = iter(range(1, 10**9))

    def around(train: Any, self: Any, progress: Any, batches: Any) -> Any:
        progress = train(self, progress, batches)
        if next(taken) == num_steps:
            act(self.ctx.spread)
        return progress

    wrap(loop._TrainLoop, "train", around)


def count_units(file: str) -> None:
    """Append a line for each stage: the names of the blocks, and the modules that FSDP made units of."""
    from torch.distributed.fsdp import FSDPModule

    from tltrain.training import stage as staging

    def around(original: Any, *arguments: Any) -> Any:
        spreaded = original(*arguments)
        units = [name for name, module in spreaded.model.named_modules() if isinstance(module, FSDPModule)]
        with open(file, "a") as lines:
            lines.write(json.dumps({"blocks": [b.name for b in spreaded.chain.blocks], "units": units}) + "\n")
        return spreaded

    if own_rank() == 0:
        wrap(staging, "spread", around)


def look_for_leftovers(file: str) -> None:
    """Append a line after each stage: what Accelerate still tracks, and which objects of the stage are still alive."""
    from tltrain.training import run
    from tltrain.training import stage as staging

    made: list[tuple[str, Any]] = []

    def build(original: Any, *arguments: Any) -> Any:
        spreaded = original(*arguments)
        for what in ("model", "chain", "optimizer"):
            made.append((what, weakref.ref(getattr(spreaded, what))))
        made.append(("net", weakref.ref(spreaded.chain.net)))
        return spreaded

    def around(original: Any, this_run: Any, *arguments: Any) -> Any:
        out = original(this_run, *arguments)
        gc.collect()
        tracked = this_run.runtime.accelerator
        alive = [what for what, reference in made if reference() is not None]
        row = {"models": len(tracked._models), "optimizers": len(tracked._optimizers), "made": len(made), "alive": alive}
        with open(f"{file}.rank{own_rank()}", "a") as lines:
            lines.write(json.dumps(row) + "\n")
        return out

    wrap(staging, "_spread", build)
    wrap(run, "run_stage", around)


def record_replicas(folder: str) -> None:
    """At the end of each stage, the checksum of every parameter and buffer as it lies on this rank, and of its fp32 master under ZeRO."""
    from tltrain.distributed.strategies import Strategy, Zero

    def around(original: Any, self: Any) -> None:
        lines = []
        for name, tensor in self.chain.net.state_dict(keep_vars=True).items():
            kept = [tensor.detach()]
            if isinstance(self, Zero) and tensor.requires_grad:
                kept.append(self._full(tensor))
            lines.append(" ".join([name, *(hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest() for t in kept)]))
        with open(f"{folder}/replica.rank{own_rank()}", "a") as file:
            file.writelines(f"{line}\n" for line in lines)
        original(self)

    wrap(Strategy, "close", around)


def trace_places(folder: str) -> None:
    """Keep the place where this rank is, and whether a checkpoint is being written, in a file that outlives a SIGKILL."""
    from tltrain.distributed import watchdog
    from tltrain.runs import checkpoint
    from tltrain.training import run
    from tltrain.training import stage as staging

    file = open(f"{folder}/place.rank{own_rank()}", "wb+", buffering=0)  # noqa: SIM115 (it stays open as long as the process)
    saving = {"now": False}

    def put(place: str) -> None:
        os.pwrite(file.fileno(), f"{place + (' saving' if saving['now'] else ''):60}".encode(), 0)

    def at(original: Any, self: Any, stage: str, step: int, call: str) -> None:
        original(self, stage, step, call)
        put(f"{stage} {step} {call}")

    def save(original: Any, *arguments: Any) -> Any:
        saving["now"] = True
        try:
            return original(*arguments)
        finally:
            saving["now"] = False

    def between(original: Any, *arguments: Any) -> Any:
        put("- - change of stage")
        return original(*arguments)

    put("- 0 start")
    wrap(run, "save_stage_weights", between)
    wrap(staging, "_chain", between)
    wrap(watchdog.Watch, "at", at)
    wrap(checkpoint, "save", save)


def count_reads(folder: str, silent: str = "") -> None:
    """Each file that this rank's scan reads is a line in read.RANK; opened.RANK is there if it opens the data set. So is the cache.

    silent: a class whose files never answer. Then results are kept four at a time, and rank 1 gets SIGTERM once some are.
    """
    from pathlib import Path

    from tltrain.data.sources import scan

    setup: Any = import_module("tltrain.training.setup")
    os.environ["TLTRAIN_CACHE"] = f"{folder}/cache"
    lock, read, opened = threading.Lock(), scan._read, setup.open_images

    def noted(path: Any, white: int | None) -> Any:
        if path.parent.name == silent:
            threading.Event().wait()
        with lock, open(f"{folder}/read.{own_rank()}", "a") as file:
            file.write(f"{path}\n")
        return read(path, white)

    def open_noted(*arguments: Any, **options: Any) -> Any:
        Path(folder, f"opened.{own_rank()}").touch()
        return opened(*arguments, **options)

    def stop_when_kept() -> None:
        while not list(Path(folder, "cache").glob("scans/*.scan")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    scan._read, setup.open_images = noted, open_noted
    if silent:
        scan.KEPT = 4
        if own_rank() == 1:
            threading.Thread(target=stop_when_kept, daemon=True).start()
