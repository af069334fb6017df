"""The loops that benchmarks/gpu.py holds against each other, all on the same random batches in host memory and from the same weights."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.gpu_turns import HERE, Feed, Pair
from benchmarks.peers import Named, Normalised, WithLoss
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.distributed.signals import StopSignal
from tltrain.models.chain import Chain
from tltrain.training import loop as engine
from tltrain.training import optim, run, stage

LR = 1e-4
LOG_STEPS = 50
"""Steps between two readings of a loss, as timm's train.py has it; the others are told the same."""


@dataclass(frozen=True)
class Task:
    """What a loop of others trains: AdamW without decay at one learning rate, bf16 autocast on a GPU."""

    make: Callable[[], Chain]
    """On the CPU, all its blocks in training."""
    device: torch.device

    def net(self) -> nn.Module:
        """uint8 images to logits, in the layout that its own documentation advises for convolutions."""
        chain = self.make()
        net = _Logits(Normalised(chain.net, chain.mean, chain.std)).to(self.device).train()
        return net.to(memory_format=torch.channels_last) if self.device.type in chain.faster_last else net

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.net(x_BCHW)
        return out if isinstance(out, Tensor) else out.logits


@contextlib.contextmanager
def hooked(precision: str, device: torch.device, also: Collection[str] = ()) -> Iterator[None]:
    """Inside, `tltrain train` runs in threads, without a word, on the batches of its thread's feed; every guard and row is there.

    also: names of CHANGES that a thread of ours may make for itself, in HERE.
    """

    def load(*arguments: Any) -> Iterator[dict[str, Tensor]]:
        feed: Feed = HERE.feed
        same: dict[int, dict[str, Tensor]] = {}  # what the loader would send along, once for each of the few batches
        for images, labels in feed:
            if id(images) not in same:
                position = torch.arange(len(labels))
                more = {"weight": torch.ones(len(labels)), "position": position, "view": torch.zeros_like(position)}
                same[id(images)] = {name: tensor.pin_memory() if labels.is_pinned() else tensor for name, tensor in more.items()}
            yield {"image": images, "label": labels, **same[id(images)]}

    watch = engine._TrainLoop._watch

    def watched(loop: Any, step: int, share: Tensor) -> None:
        HERE.feed.losses.append(share)
        watch(loop, step, share)

    def compiled(chain: Chain, **options: Any) -> None:
        nn.Module.compile(chain, dynamic=False, backend=backend(device))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION=precision))
        stack.enter_context(mock.patch.object(stage, "train_loader", load))
        stack.enter_context(mock.patch.object(engine._TrainLoop, "_watch", watched))
        stack.enter_context(mock.patch.object(run, "Console", return_value=Console(False)))
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(Chain, "compile", compiled))
        for name in also:
            if name in CHANGES:
                stack.enter_context(CHANGES[name]())
        # signals are the main thread's alone
        stack.enter_context(mock.patch.object(StopSignal, "listening", lambda stop: contextlib.nullcontext(stop)))
        yield


def _optimizer() -> Any:
    own = optim.make_optimizer

    def made(groups: Any, spec: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=spec.lr, foreach=True) if HERE.change == "foreach" else own(groups, spec)

    return mock.patch.object(optim, "make_optimizer", made)


def _layout() -> Any:
    own = Chain.channels_last.fget  # type: ignore[attr-defined]
    return mock.patch.object(Chain, "channels_last", property(lambda chain: getattr(HERE, "change", "") != "contiguous" and own(chain)))


CHANGES: dict[str, Callable[[], Any]] = {"foreach": _optimizer, "contiguous": _layout}
"""One default of ours changed, in the threads that say so: what it is worth on this card."""


def ours(recipe: Recipe, compiled: bool, feed: Feed, change: str = "") -> None:
    """`tltrain train` itself, inside `hooked`."""
    HERE.change = change
    with tempfile.TemporaryDirectory(prefix="tltrain-gpu-", ignore_cleanup_errors=True) as folder:
        start = RunFlags(Path(folder) / "run", recipe.batch, cache="never", cache_images="never", compile=compiled, workers=0)
        # without the race and the lock that lets one run go on at a time: contestants take turns, each with torch's switches
        ended = run.train.__wrapped__.__wrapped__(recipe, start)  # type: ignore[attr-defined]
        raise RuntimeError(f"{ended['outcome']}: {ended.get('error', '')}")


def bare(task: Task, compiled: bool, feed: Feed) -> None:
    """PyTorch alone, with cudnn.benchmark as its tuning guide says; no loss is read."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    net = task.net()
    if compiled:
        net.compile(dynamic=False, backend=backend(task.device))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    for batch in feed:
        images, labels = (tensor.to(task.device, non_blocking=True) for tensor in batch)
        with task.autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        feed.losses.append(loss.detach())


def backend(device: torch.device) -> str:
    """In miniature on a CPU the graphs are found, and run as they are: to write and build C++ for them takes a minute."""
    return "inductor" if device.type == "cuda" else "eager"


def with_timm(task: Task, feed: Feed) -> None:
    """train_one_epoch of timm's train.py with --amp --amp-dtype bfloat16 --channels-last: it reads a loss only where it logs."""
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    torch.backends.cudnn.benchmark = True  # as its train.py does
    net, losses_m = task.net(), AverageMeter()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=LR, weight_decay=0.0, fused=True)
    optimizer.zero_grad()
    for step, batch in enumerate(feed):
        images, labels = (tensor.to(task.device, non_blocking=True) for tensor in batch)
        with task.autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_STEPS == 0:
            losses_m.update(loss.item(), len(images))
        feed.losses.append(loss.detach())


def with_trainer(task: Task, feed: Feed) -> None:
    """https://huggingface.co/docs/transformers/trainer, with bf16 and the fused optimizer, its data loader overridden."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Fed(Trainer):
        def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(Named(feed), batch_size=None)

    with tempfile.TemporaryDirectory(prefix="tltrain-trainer-", ignore_cleanup_errors=True) as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(feed), learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.0,
            optim="adamw_torch_fused", weight_decay=0.0, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=LOG_STEPS, bf16=task.device.type == "cuda", use_cpu=task.device.type == "cpu",
        )  # fmt: skip
        trainer = Fed(model=WithLoss(task.net(), feed.losses), args=arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def with_lightning(task: Task, feed: Feed) -> None:
    """https://lightning.ai/docs/pytorch/stable/starter/introduction.html, with precision="bf16-mixed"."""
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric"):  # no word of devices and of what else could be installed
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(lightning.LightningModule):  # type: ignore[misc] # mypy does not look into it
        def __init__(self) -> None:
            super().__init__()
            self.net = task.net()

        def training_step(self, batch: Pair, step: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.net(images), labels)
            feed.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=LR, weight_decay=0.0, fused=True)

    on_gpu = task.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="tltrain-lightning-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what is switched off on purpose
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="gpu" if on_gpu else "cpu", devices=1, precision="bf16-mixed" if on_gpu else "32-true",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            benchmark=True,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(feed, batch_size=None))


Loop = Callable[[Feed], None]


def contestants(recipe: Recipe, task: Task) -> tuple[list[tuple[str, Loop]], list[str]]:
    """((name, loop) of each, ours first; the packages that are not here)."""
    known: list[tuple[str, Loop, str]] = [
        ("tltrain", partial(ours, recipe, False), "torch"),
        ("tltrain --compile", partial(ours, recipe, True), "torch"),
        ("bare PyTorch", partial(bare, task, False), "torch"),
        ("bare PyTorch, compiled", partial(bare, task, True), "torch"),
        ("timm", partial(with_timm, task), "timm"),
        ("transformers' Trainer", partial(with_trainer, task), "transformers"),
        ("Lightning", partial(with_lightning, task), "lightning"),
    ]
    here = [importlib.util.find_spec(package) is not None for _, _, package in known]
    found = [(name, loop) for (name, loop, _), is_here in zip(known, here, strict=True) if is_here]
    return found, [package for (_, _, package), is_here in zip(known, here, strict=True) if not is_here]
