"""The loops that benchmarks/gpu.py holds against each other, all on the same random batches in host memory and from the same weights."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers import Normalised
from tltrain import run, staging
from tltrain.blocks import Chain
from tltrain.options import Start
from tltrain.recipe import Recipe
from tltrain.tracking import read_rows

Pair = tuple[Tensor, Tensor]
LR = 1e-4


@dataclass
class Feed(Dataset[Pair]):
    """Random batches in turns. Asking for those of the steps `first` and `last` starts and ends what counts, on all loops alike."""

    batches: Sequence[Pair]
    """(images (B, 3, H, W) uint8, labels (B,)), pinned where there is a GPU."""
    first: int
    last: int
    on: Callable[[bool], None] = lambda begins: None
    """Called as the part that counts begins, and as it ends."""
    marks: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return self.last + 1

    def __getitem__(self, step: int) -> Pair:
        if step == self.last:
            self.on(False)
        if step in (self.first, self.last):
            synchronise()
            self.marks.append(time.perf_counter())
        if step == self.first:
            self.on(True)
        return self.batches[step % len(self.batches)]

    @property
    def seconds(self) -> float:
        return self.marks[1] - self.marks[0]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Task:
    """What a loop of others trains: AdamW without decay at one learning rate, bf16 autocast on a GPU."""

    chain: Chain
    """On the CPU, all its blocks in training."""
    device: torch.device

    def net(self) -> nn.Module:
        """uint8 images to logits, in the layout that its own documentation advises for convolutions."""
        net = _Logits(Normalised(self.chain.net, self.chain.mean, self.chain.std)).to(self.device).train()
        return net.to(memory_format=torch.channels_last) if self.chain.faster_last else net

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.net(x_BCHW)
        return out if isinstance(out, Tensor) else out.logits


def ours(recipe: Recipe, feed: Feed, precision: str, compiled: bool = False) -> float:
    """`tltrain train` itself, without a word, its loader replaced by the feed; every guard, row and checkpoint is there. The last loss."""

    def load(*arguments: Any) -> Iterator[dict[str, Tensor]]:
        for step in range(len(feed)):
            images, labels = feed[step]
            index = torch.arange(len(labels))
            yield {"image": images, "label": labels, "weight": torch.ones(len(labels)), "index": index, "view": torch.zeros_like(index)}

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tltrain-gpu-"))) / "run"
        stack.enter_context(mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION=precision))
        stack.enter_context(mock.patch.object(staging, "train_loader", load))
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        start = Start(folder=folder, max_device_batch=recipe.batch, store="never", store_images="never", compile=compiled, workers=0)
        if run.train(recipe, start)["outcome"] != "finished":
            raise RuntimeError(said.getvalue())
        return float([row["loss"] for row in read_rows(folder) if row["kind"] == "train"][-1])


def bare(task: Task, feed: Feed) -> float:
    """PyTorch alone; no loss is read before the end."""
    net = task.net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loss = torch.zeros(())
    for step in range(len(feed)):
        images, labels = (tensor.to(task.device, non_blocking=True) for tensor in feed[step])
        with task.autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def with_timm(task: Task, feed: Feed) -> float:
    """train_one_epoch of timm's train.py with --amp --amp-dtype bfloat16 --channels-last: it reads a loss only where it logs."""
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    net, losses_m, log_interval = task.net(), AverageMeter(), 50
    optimizer = create_optimizer_v2(net, opt="adamw", lr=LR, weight_decay=0.0, fused=True)
    loss = torch.zeros(())
    optimizer.zero_grad()
    for step in range(len(feed)):
        images, labels = (tensor.to(task.device, non_blocking=True) for tensor in feed[step])
        with task.autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % log_interval == 0:
            losses_m.update(loss.item(), len(images))
    return float(loss.detach())


def with_trainer(task: Task, feed: Feed) -> float:
    """https://huggingface.co/docs/transformers/trainer, with bf16 and the fused optimizer, its data loader overridden."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Fed(Trainer):
        def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(_Named(feed), batch_size=None)

    net = _WithLoss(task.net())
    with tempfile.TemporaryDirectory(prefix="tltrain-trainer-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(feed), learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.0,
            optim="adamw_torch_fused", weight_decay=0.0, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=50,
            bf16=task.device.type == "cuda", use_cpu=task.device.type == "cpu",
        )  # fmt: skip
        trainer = Fed(model=net, args=arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return float(net.loss)


class _WithLoss(nn.Module):
    """A model as transformers' Trainer wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, torch.zeros(())

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        loss = F.cross_entropy(logits, labels)
        self.loss = loss.detach()
        return {"loss": loss, "logits": logits}


class _Named(Dataset[dict[str, Tensor]]):
    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return len(self.feed)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        images, labels = self.feed[step]
        return {"pixel_values": images, "labels": labels}


Loop = Callable[[Task, Feed], float]


def others() -> list[tuple[str, Loop, str]]:
    """(name, loop, its package) of those that are installed."""
    known: list[tuple[str, Loop, str]] = [
        ("bare PyTorch", bare, "torch"),
        ("timm", with_timm, "timm"),
        ("transformers' Trainer", with_trainer, "transformers"),
    ]
    return [each for each in known if importlib.util.find_spec(each[2]) is not None]
