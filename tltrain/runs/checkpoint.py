"""Checkpoints: save, verify and load the state of a run.

A checkpoint is a folder that is renamed to its final name once it is complete. Its manifest holds the checksum of every file, since
torch.load and safetensors do not notice flipped bits. Loading one cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tltrain.core import files
from tltrain.core.errors import MachineError, UserError
from tltrain.core.metric import is_better

MANIFEST = "manifest.json"
LOWER = 1e-4
"""Share by which a val loss must fall to count as lower, as in torch's ReduceLROnPlateau. Less is rounding."""


@dataclass(frozen=True)
class Best:
    """The value of the `select` metric for the best weights of the run so far, and the position where they were evaluated."""

    value: float
    stage: int
    step: int
    loss: float | None = None
    """Their val loss, which decides between equal values. None in checkpoints of older versions."""

    def figures(self, select: str) -> dict[str, float | None]:
        return {"loss": self.loss, select: self.value}


@dataclass(frozen=True)
class Progress:
    """A position in a run. Sample order, views, mixing and dropout are functions of it, so no random state is saved."""

    stage: int = 0
    step: int = 0
    evaluated: bool = False
    """Whether val was evaluated at this step."""
    best: Best | None = None
    stale: int = 0
    """Evaluations in this stage since the last improvement, of the best value in the run or of the val loss in this stage."""
    losses: tuple[float, ...] = ()
    """Loss over the global batch of each step since the last training row."""
    seconds: float = 0.0
    """Seconds of training so far, over all starts."""
    lowest_loss: float | None = None
    """Lowest val loss in this stage."""

    def after_evaluation(self, figures: Mapping[str, Any], select: str) -> tuple[Progress, bool]:
        """Returns (the position once val was evaluated with these figures, whether the evaluated weights are the best so far).

        Patience counts an evaluation as stale if neither `select` nor the val loss improves. A loss that falls by a smaller share
        than `LOWER` has not improved. The first evaluation is of an untrained head, which is never the best: it says nothing, and where it
        is right as often as a trained one, its loss is lower.
        """
        untrained = self.step == 0 and self.best is None
        better = not untrained and is_better(figures, self.best.figures(select) if self.best else None, select)
        loss, best = figures["loss"], Best(figures[select], self.stage, self.step, figures["loss"]) if better else self.best
        lower = self.lowest_loss is None or loss < self.lowest_loss * (1 - LOWER)
        improved = lower or (better and self.best is not None and figures[select] != self.best.value)
        stale, lowest_loss = 0 if improved else self.stale + 1, loss if lower else self.lowest_loss
        return replace(self, evaluated=True, best=best, stale=stale, lowest_loss=lowest_loss), better

    def next_stage(self) -> Progress:
        return replace(self, stage=self.stage + 1, step=0, evaluated=False, stale=0, lowest_loss=None, losses=())

    @property
    def order(self) -> tuple[int, int, bool]:
        return (self.stage, self.step, self.evaluated)


@dataclass
class State:
    """Everything that a run needs to resume."""

    progress: Progress
    weights: dict[str, Tensor]
    """The network's own state dict, in host memory. In a stage with trains: lora, its low-rank updates stand in it unmerged."""
    best: dict[str, Tensor] | None = None
    """The best weights so far; None before the first evaluation, or without a val split."""
    optimizer: dict[str, Any] | None = None
    """The optimizer's state dict; None at the start of a stage."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further state of the strategy, such as the loss scale of fp16."""
    ema: dict[str, Tensor] | None = None
    """The exponential moving average of what the stage trains; None where it keeps none, and at the start of a stage."""


def save(folder: Path, state: State, generation: int, keep: int) -> Path:
    """Write a checkpoint under `folder`, then delete all but the newest `keep`. Returns its path. Raises UserError if the write fails."""
    p = state.progress
    name = f"{generation:06d}-{p.stage:02d}-{p.step:08d}-{int(p.evaluated)}"
    final, temporary = folder / name, folder / f".{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # no parents: a run folder that was renamed meanwhile is not begun anew under its old name
        _write(temporary, state)
        if final.exists():
            files.remove_folder(final)
        files.commit_folder(temporary, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # on a full disk, safetensors and torch raise errors of their own
        shutil.rmtree(temporary, ignore_errors=True)
        cause = _disk_error(error)
        text = f"checkpoint {name} could not be written to {folder}: {cause}; older checkpoints are untouched. {files.remedy(cause)}"
        raise UserError(text) from error
    for old in committed(folder)[keep:]:
        _remove(old)
    for partial in folder.glob(".[0-9]*"):  # starts were killed while they wrote or deleted these; nothing of this one is under way
        if partial.name[1:7].isdigit() and int(partial.name[1:7]) <= generation:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _remove(old: Path) -> None:
    """Delete a checkpoint that is not kept. Where that fails (another owner, NFS holds a file) the new one stands all the same."""
    try:
        if old.is_symlink():
            old.unlink()  # the link alone: what it leads to may be anybody's
        else:
            files.remove_folder(old)
    except OSError as error:
        sys.stderr.write(f"tltrain: the old checkpoint {old} could not be deleted: {error}; the run goes on, delete it by hand\n")


def _disk_error(error: BaseException) -> BaseException:
    """The OSError that caused an error. torch hides it: it closes its file, fails a second time, and reports that failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


class Saver:
    """Writes checkpoints on a background thread, one at a time. The training loop waits only for the copy to host memory."""

    def __init__(
        self,
        folder: Path,
        generation: int,
        keep: int,
        may_write: Callable[[], bool],
        limit_s: float = 600.0,
        alive: Callable[[], object] = bool,
    ) -> None:
        """may_write: called before each checkpoint. It returns False once a newer start owns the run.

        limit_s: longest wait while no byte is written, seconds. alive: called while bytes are written.
        """
        self.folder, self.generation, self.keep, self.may_write = folder, generation, keep, may_write
        self.limit_s, self.alive = limit_s, alive
        self.pending: Future[None] | None = None

    def submit(self, state: State) -> None:
        """Write a state in the background, after waiting for the write before it. Raises that write's error.

        The state's tensors must not change afterwards.
        """
        self.wait()
        self.pending = Future()
        # A daemon: one that a dead disk holds must not keep the process from ending. Every end of a run waits for it.
        Thread(target=self._write, args=(state, self.pending), daemon=True, name="tltrain-save").start()

    def failed(self) -> bool:
        """Whether the pending checkpoint has failed. `wait` raises its error."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk. Raises UserError if it could not be, MachineError if the disk stands still."""
        pending, self.pending = self.pending, None
        written, since = -1, time.monotonic()
        while pending is not None:
            try:
                return pending.result(timeout=1.0)
            except TimeoutError:
                if pending.done():  # the error of the writer itself
                    raise
            if (now := self._written_bytes()) != written:
                written, since = now, time.monotonic()
                self.alive()
            elif time.monotonic() - since > self.limit_s:
                raise MachineError(
                    f"no byte of a checkpoint was written to {self.folder} for {self.limit_s:.0f} s: its disk does not answer. "
                    "The same command goes on from the newest checkpoint"
                )

    def _written_bytes(self) -> int:
        sizes = 0
        for path in self.folder.glob(f".{self.generation:06d}-*.tmp/*"):
            with suppress(OSError):
                sizes += path.stat().st_size
        return sizes

    def _write(self, state: State, pending: Future[None]) -> None:
        try:
            if self.may_write():
                save(self.folder, state, self.generation, self.keep)
        except BaseException as error:  # `wait` raises it
            pending.set_exception(error)
        else:
            pending.set_result(None)


def committed(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest position first; of equal positions the later generation first."""
    paths = [path for path in folder.glob("[0-9]*-*-*-*") if path.is_dir()] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (path.name.split("-")[1:], path.name), reverse=True)


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint, or None. A damaged one is reported and renamed to damaged-NAME."""
    for path in committed(folder):
        problem = verify(path)
        if problem is None:
            return path
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        say(f"checkpoint {path.name} is damaged ({problem}); it is set aside as {aside.name}, and an older one is taken")
    return None


def verify(path: Path) -> str | None:
    """The problem with a checkpoint, or None. Compares each file with its checksum in the manifest, and the manifest with its own."""
    try:
        manifest = json.loads(files.read_bytes(path / MANIFEST))
        body = json.dumps(manifest["files"], sort_keys=True)
        if manifest["sha256"] != _digest(body):
            return f"{MANIFEST} does not match its own checksum"
        present = {p.name for p in path.iterdir()} - {MANIFEST}
        if present != set(manifest["files"]):
            return f"files {sorted(present ^ set(manifest['files']))} are missing or too many"
        for name, checksum in manifest["files"].items():
            if files.sha256(path / name) != checksum:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    return None


def load(path: Path) -> State:
    """Read a checkpoint. Call `verify` first."""
    raw = json.loads((path / "progress.json").read_text())
    best = Best(**raw["best"]) if raw["best"] else None
    progress = Progress(**{**raw, "best": best, "losses": tuple(raw["losses"])})
    best_file, ema_file, optimizer_file = path / "best.safetensors", path / "ema.safetensors", path / "optimizer.pt"
    saved = torch.load(optimizer_file, map_location="cpu", weights_only=True) if optimizer_file.exists() else {}
    return State(
        progress=progress,
        weights=load_file(path / "weights.safetensors"),
        best=load_file(best_file) if best_file.exists() else None,
        optimizer=saved.get("optimizer"),
        extra=saved.get("extra", {}),
        ema=load_file(ema_file) if ema_file.exists() else None,
    )


def _write(folder: Path, state: State) -> None:
    _write_tensors(folder / "weights.safetensors", state.weights)
    if state.best is not None:
        _write_tensors(folder / "best.safetensors", state.best)
    if state.ema is not None:
        _write_tensors(folder / "ema.safetensors", state.ema)
    if state.optimizer is not None:
        with (folder / "optimizer.pt").open("wb") as file:  # given a path, torch reports a full disk only as an unexpected position
            torch.save({"optimizer": state.optimizer, "extra": state.extra}, file)
    (folder / "progress.json").write_text(json.dumps(asdict(state.progress)))
    checksums = {path.name: files.sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"files": checksums, "sha256": _digest(json.dumps(checksums, sort_keys=True))}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    files.follow_umask(file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
