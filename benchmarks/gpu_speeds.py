"""Full fine-tuning: the contestants of benchmarks/gpu_loops.py in turns, images a second, and what the host waits for."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.gpu_loops import CHANGES, LOG_STEPS, LR, Loop, Task, contestants, hooked, ours
from benchmarks.gpu_turns import Failed, Pair, Racer
from benchmarks.timing import Case, Contestant, turns
from tltrain.core.recipe import Backbone, Recipe, validate
from tltrain.models import factory
from tltrain.models.chain import Chain

CLASSES = tuple("0123456789")
SYNC = "called a synchronizing CUDA operation"  # what torch's sync debug mode says
TOLERANCE = 0.1
"""Of the mean loss of the first steps, in bf16: further apart two loops do not train the same."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    nets: dict[str, tuple[int, int]]
    """Backbone to images a step and steps a lap: a lap takes about a second."""
    size: int
    warm_steps: int
    matrix: int
    precision: str
    head: tuple[str, int, int]
    """Backbone, images, epochs of the head stage."""
    suffix: dict[str, str]
    """Backbone to the first block that trains."""
    num_images: int
    """Of suffix stages and of distillation."""
    num_steps: int
    """Of those stages."""
    num_photos: int
    memory_batch: int

    def only(self, names: Sequence[str]) -> Scale:
        return replace(self, nets={name: self.nets[name] for name in names}, suffix={name: self.suffix[name] for name in names})


@dataclass(frozen=True)
class Choice:
    """What of it is asked for."""

    num_rounds: int
    also: Sequence[str]
    only: str
    """A regular expression; empty for all."""


def recipe(net: str, scale: Scale, **changes: Any) -> Recipe:
    """Full fine-tuning at one learning rate; its images come from elsewhere. `changes` are of the stage."""
    data = {"source": "digits", "size": scale.size, "resize": scale.size, "flip": False, "val_fraction": 0, "test_fraction": 0}
    stage = {"name": "all", "unfreeze": "all", "steps": 100 * LOG_STEPS, "lr": LR, "views": 1, "carry": "last", "schedule": "constant"}
    raw = {"name": f"gpu-{net}", "batch": scale.nets[net][0], "data": data, "backbone": {"name": net}, "deterministic": False}
    return validate(raw | {"stages": [stage | {"norm_stats": "train", "weight_decay": 0.0} | changes]}, "gpu")


def chain_of(net: str, size: int) -> Chain:
    chain = factory.load(Backbone(name=net), classes=CLASSES, size=size, resize=None, head="new", seed=0).chain
    return chain.freeze(0, norm_stats=True).train()


def random_batches(batch: int, size: int, device: torch.device) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, len(CLASSES), (batch,), generator=generator)
        made.append((images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (images, labels))
    return made


ALSO = ("deterministic", *CHANGES)
"""tltrain with one default changed: contestants for whoever asks."""


def racers(net: str, scale: Scale, device: torch.device, choice: Choice) -> tuple[list[tuple[str, Loop]], list[str]]:
    """((name, loop) of each contestant, packages that are absent)."""
    made = recipe(net, scale)
    found, absent = contestants(made, Task(partial(chain_of, net, scale.size), device))
    for name in choice.also:
        changed = made.model_copy(update={"deterministic": name == "deterministic"})
        found.append((f"tltrain, {name}", partial(ours, changed, False, change=name)))
    return [(name, loop) for name, loop in found if re.search(choice.only, name)], absent


def compile_only(net: str, name: str, scale: Scale, device: torch.device) -> str:
    """In a process of its own: fill the cache of compiled graphs, so that the race finds them. What it took, to print."""
    found, _ = racers(net, scale, device, Choice(1, [], ""))
    with hooked(scale.precision, device):
        racer = Racer(name, dict(found)[name], random_batches(scale.nets[net][0], scale.size, device))
        seconds = racer.warm_up(scale.warm_steps)
        return f"{seconds:.1f}"


@contextlib.contextmanager
def compiling(scale: Scale, device: torch.device, wanted: bool, choice: Choice) -> Iterator[dict[tuple[str, str], Any]]:
    """Processes that compile ahead, all at once: by net and contestant. They take the GPU for some steps, and no time of a race."""
    started = {}
    nets = list(scale.nets)[: None if device.type == "cuda" else 1]
    for net in nets if wanted else ():
        for name, _ in racers(net, scale, device, replace(choice, also=[]))[0]:
            if "compile" in name:
                words = [
                    sys.executable,
                    "-m",
                    "benchmarks.gpu",
                    "--compile-only",
                    net,
                    name,
                    *(["--dry-run"] if device.type == "cpu" else []),
                ]
                started[net, name] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def _compiled(book: Any, compilers: dict[tuple[str, str], Any]) -> None:
    for (net, name), process in compilers.items():
        try:
            out, err = process.communicate(timeout=max(1.0, min(120.0, book.left() - 100)))
        except subprocess.TimeoutExpired:
            book.row("compile", f"{net}: {name}: not compiled ahead: out of time", net=net, loop=name, cold_s=None)
            process.kill()
            continue
        seconds = float(out.split()[-1]) if process.returncode == 0 else None
        said = f"started in {seconds:.1f} s, nothing compiled before" if seconds is not None else f"failed: {err.strip()[-300:]}"
        book.row("compile", f"{net}: {name}: {said}", net=net, loop=name, cold_s=seconds)


def speeds(book: Any, scale: Scale, rate: float, choice: Choice, compilers: dict[tuple[str, str], Any], words: Sequence[str]) -> None:
    """Each net's race in a process of its own: a framework that takes its process down, and torch 2.11 does where a second network is
    compiled in threads, costs the others nothing; then it goes once more without what compiles. words: further ones of the command."""
    _compiled(book, compilers)
    for number, net in enumerate(scale.nets):
        seconds = (book.left() - 5) / (len(scale.nets) - number)
        if not _process(book, net, rate, choice, words, seconds) and "compile" not in choice.only:
            _process(book, net, rate, replace(choice, only="^((?!compile).)*$"), words, seconds / 2)


def _process(book: Any, net: str, rate: float, choice: Choice, words: Sequence[str], seconds: float) -> bool:
    """Whether it ended well. Its rows come through a file beside the book's, which stays where this process is killed."""
    with tempfile.TemporaryDirectory(prefix="tltrain-race-") as folder:
        rows = book.file.with_suffix(f".{net}.json") if book.file is not None else Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--race", net, str(rate), "--rounds", str(choice.num_rounds), *words]
        rows.unlink(missing_ok=True)
        command += ["--also", ",".join(choice.also), "--only", choice.only, "--budget-s", str(seconds), "--json", str(rows)]
        try:
            code: Any = subprocess.run(command, timeout=None if seconds == float("inf") else seconds + 30, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        for part, found in json.loads(rows.read_text(encoding="utf-8")).items() if rows.exists() else ():
            book.values.setdefault(part, []).extend(found)
        if code != 0:
            book.row("errors", f"{net}: its race ended early: exit {code}", net=net)
            return False
        book.write()
        return True


def race(book: Any, net: str, scale: Scale, device: torch.device, rate: float, choice: Choice) -> None:
    """In a process of its own. A row for each contestant as it starts, then the figures."""
    with hooked(scale.precision, device, choice.also):
        _race(book, net, scale, device, rate, choice)


def _race(book: Any, net: str, scale: Scale, device: torch.device, rate: float, choice: Choice) -> None:
    batch, lap_steps = scale.nets[net]
    found, absent = racers(net, scale, device, choice)
    for package in absent:
        book.row("absent", f"{net}: {package} is not installed here", package=package)
    batches = random_batches(batch, scale.size, device)
    racing = [Racer(name, loop, batches) for name, loop in found]
    try:
        racing = [racer for racer in reversed(racing) if _starts(book, net, racer, scale.warm_steps)]
        racing.reverse()
        for number in range(choice.num_rounds):
            began = time.monotonic()
            racing = _round(book, net, racing, lap_steps)
            if book.left() < time.monotonic() - began + 10 and number + 1 < choice.num_rounds:
                print(f"{net}: {number + 1} rounds of {choice.num_rounds}: no time for more", flush=True)
                break
        _show(book, net, scale, device, rate, racing)
        for racer in racing:
            if racer.name.startswith("tltrain"):
                _host_waits(book, net, racer, lap_steps, device)
    finally:
        for racer in racing:
            racer.close()
        racing.clear()
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _round(book: Any, net: str, racing: list[Racer], num_steps: int) -> list[Racer]:
    """There and back. Returns those that are still in the race."""
    out: list[Racer] = []
    for racer in (racing[i] for i in turns(len(racing))):
        try:
            if racer not in out:
                racer.lap(num_steps)
        except Failed as error:
            out.append(racer)
            book.row("errors", f"{net}: {racer.name} gives up: {error}", net=net, loop=racer.name)
    return [racer for racer in racing if racer not in out]


def _starts(book: Any, net: str, racer: Racer, num_steps: int) -> bool:
    try:
        seconds = racer.warm_up(num_steps)
    except Failed as error:
        book.row("errors", f"{net}: {racer.name} does not start: {error}", net=net, loop=racer.name)
        return False
    book.row("start", f"{net}: {racer.name} starts in {seconds:.1f} s", net=net, loop=racer.name, start_s=seconds)
    return True


def _show(book: Any, net: str, scale: Scale, device: torch.device, rate: float, racing: Sequence[Racer]) -> None:
    batch, lap_steps = scale.nets[net]
    per_image = flops(net, scale.size)
    num = min(20, *(len(racer.feed.losses) for racer in racing))
    losses = [torch.stack(racer.feed.losses[:num]).float().mean().item() for racer in racing]
    middle = statistics.median(losses)
    title = f"{net}, {batch} images of {scale.size} px a step, {'bf16' if device.type == 'cuda' else 'fp32'}"
    case = Case(title, [Contestant(racer.name, lambda: None) for racer in racing], "speed", TOLERANCE, lap_steps)  # type: ignore[arg-type, return-value]
    result = timing.summarise(case, [racer.laps for racer in racing], losses)
    print(f"\n{timing.show(result)}\n", flush=True)
    for row in result.rows:
        images_per_s = lap_steps * batch / row.median
        differs = abs(row.loss / middle - 1) > TOLERANCE
        text = f"{net}: {row.name}: {images_per_s:,.0f} images/s, {100 * images_per_s * per_image / rate:.1f} % of the matrix rate"
        figures = {"laps": row.laps, "loss": row.loss, "differs": differs, "fraction": images_per_s * per_image / rate, "ratio": row.ratio}
        said = f"; its loss {row.loss:.4f} IS NOT THAT OF THE OTHERS, {middle:.4f}: it does not train the same" if differs else ""
        book.row("speeds", text + said, net=net, loop=row.name, images_per_s=images_per_s, batch=batch, **figures)


def flops(net: str, size: int) -> float:
    """Floating point operations of a training step an image."""
    chain = chain_of(net, size)
    return count(lambda: chain(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)).sum().backward()) / 2


def count(work: Callable[[], Any]) -> int:
    """Floating point operations, as torch counts them: it knows none of attention's fused kernels on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _host_waits(book: Any, net: str, racer: Racer, num_steps: int, device: torch.device) -> None:
    """How often the host waited for the device in one more lap. A row's own wait falls into it where a row does."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            racer.lap(num_steps)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if SYNC in str(w.message) and not w.filename.endswith("gpu_turns.py")]  # the clock's own are none
    num_rows = sum(step % LOG_STEPS == 0 for step in range(len(racer.feed.losses) - num_steps + 1, len(racer.feed.losses) + 1))
    where = sorted({f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in waits})
    text = (
        f"{net}: {racer.name}: the host waited for the device {len(waits)} times in {num_steps} steps, {num_rows} of which ended with a row"
    )
    book.row(
        "host_waits", text + (f" ({', '.join(where)})" if where else ""), net=net, loop=racer.name, waits=len(waits), num_rows=num_rows
    )
