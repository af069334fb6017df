"""The same training loop in other frameworks, each as its own documentation writes it, fed with the same batches from memory.

Nobody clips, evaluates, saves or shows a bar; what a framework does by default in each step beyond that, it does here as well.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

Pair = tuple[Tensor, Tensor]


@dataclass
class Batches(Dataset[Pair]):
    """Batches in memory, in order. Asking for the first and for the last batch of the part that is measured starts and stops the clock:
    so it is the same clock for every framework, whatever it reads ahead."""

    batches: Sequence[Pair]
    """(images (B, 3, H, W) uint8, labels (B,)) of each step."""
    first: int
    last: int
    marks: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Pair:
        if step in (self.first, self.last):
            self.marks[step] = time.perf_counter()
        return self.batches[step]

    @property
    def seconds(self) -> float:
        return self.marks[self.last] - self.marks[self.first]

    def loader(self) -> DataLoader[Pair]:
        return DataLoader(self, batch_size=None)


@dataclass(frozen=True)
class Task:
    """What all of them train: AdamW without decay, a cosine from `lr` to zero."""

    net: nn.Module
    """uint8 images to logits, with the weights to start from."""
    batches: Batches
    lr: float

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def fresh(self) -> nn.Module:
        torch.use_deterministic_algorithms(False)  # a run of ours asks for slower kernels, and they stay asked for
        return copy.deepcopy(self.net).train()

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=0.0, fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.factor)

    def factor(self, step: int) -> float:
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.num_steps, dtype=torch.float64)).item())


class Normalised(nn.Module):
    """A net that takes uint8 images, and computes in one memory layout."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, mean: Sequence[float], std: Sequence[float], layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        super().__init__()
        self.net, self.layout = net.to(memory_format=layout), layout
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.net(((x_BCHW.float() / 255 - self.mean) / self.std).contiguous(memory_format=self.layout))


Losses = list[Tensor]


def bare(task: Task) -> Losses:
    """PyTorch alone. No loss is read before the end."""
    net = task.fresh()
    optimizer = task.optimizer(net)
    scheduler = task.schedule(optimizer)
    losses = []
    for step in range(task.num_steps):
        images, labels = task.batches[step]
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        losses.append(loss.detach())
    return losses


def with_accelerate(task: Task) -> Losses:
    """https://huggingface.co/docs/accelerate/basic_tutorials/migration"""
    accelerator = Accelerator()
    net = task.fresh()
    optimizer = task.optimizer(net)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, task.batches.loader(), task.schedule(optimizer))
    losses = []
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return losses


def with_timm(task: Task) -> Losses:
    """train_one_epoch of timm's train.py, with its optimizer, scheduler, task and meters."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask
    from timm.utils import AverageMeter

    net, loader = task.fresh(), task.batches.loader()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=task.lr, weight_decay=0.0, fused=True)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader))
    training = ClassificationTask(net, criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
    update_time_m, data_time_m, losses_m = AverageMeter(), AverageMeter(), AverageMeter()
    losses: Losses = []
    data_start = update_start = time.time()
    optimizer.zero_grad()
    for step, (images, labels) in enumerate(loader):
        data_time_m.update(time.time() - data_start)
        loss = training(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses_m.update(loss.item(), len(images))
        optimizer.zero_grad()
        update_time_m.update(time.time() - update_start)
        update_start = time.time()
        scheduler.step_update(num_updates=step + 1, metric=losses_m.avg)
        losses.append(loss.detach())
        data_start = time.time()
    return losses


class WithLoss(nn.Module):
    """A model as transformers' Trainer wants it: it computes its loss where it is given labels, and appends it to `losses`."""

    def __init__(self, net: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.net, self.losses = net, losses

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        loss = F.cross_entropy(logits, labels)
        self.losses.append(loss.detach())
        return {"loss": loss, "logits": logits}


class Named(Dataset[dict[str, Tensor]]):
    """Batches with the names that transformers' models give their arguments."""

    def __init__(self, batches: Any) -> None:  # (images, labels) at each index
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        images, labels = self.batches[step]
        return {"pixel_values": images, "labels": labels}


def with_trainer(task: Task) -> Losses:
    """https://huggingface.co/docs/transformers/trainer, with its data loader overridden as `get_train_dataloader` says."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Fed(Trainer):
        def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(Named(task.batches), batch_size=None)

    net = WithLoss(task.fresh(), [])
    with tempfile.TemporaryDirectory(prefix="tltrain-trainer-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=task.num_steps, learning_rate=task.lr, lr_scheduler_type="cosine", max_grad_norm=0.0,
            optim="adamw_torch_fused", weight_decay=0.0, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Fed(model=net, args=arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return net.losses


def with_lightning(task: Task, callbacks: Sequence[Any] = ()) -> Losses:
    """https://lightning.ai/docs/pytorch/stable/starter/introduction.html"""
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric"):  # no word of devices and of what else could be installed
        logging.getLogger(name).setLevel(logging.ERROR)
    net = task.fresh()
    losses: Losses = []

    class Module(lightning.LightningModule):  # type: ignore[misc] # mypy does not look into it
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Pair, step: int) -> Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.net(images), labels)
            losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = task.optimizer(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": task.schedule(optimizer), "interval": "step"}}

    with tempfile.TemporaryDirectory(prefix="tltrain-lightning-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what is switched off on purpose
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, callbacks=list(callbacks), enable_checkpointing=bool(callbacks),
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Module(), task.batches.loader())
    return losses


def with_finetuning_scheduler(task: Task) -> Losses:
    """https://finetuning-scheduler.readthedocs.io: Lightning with a schedule, here of one phase that trains everything."""
    from finetuning_scheduler import FinetuningScheduler

    names = [f"net.{name}" for name, _ in task.net.named_parameters()]
    schedule = {0: {"params": names, "max_transition_epoch": 1}}
    with tempfile.TemporaryDirectory(prefix="tltrain-lightning-") as folder:
        callback = FinetuningScheduler(schedule, epoch_transitions_only=True, log_dir=folder, logging_level=logging.ERROR)
        return with_lightning(task, [callback])


def with_fastai(task: Task) -> Losses:
    """https://docs.fast.ai/examples/migrating_pytorch.html, with PyTorch's optimizer in fastai's wrapper."""
    from fastai.basics import DataLoaders, Learner, OptimWrapper
    from fastai.callback.schedule import ParamScheduler, SchedCos

    losses: Losses = []

    def loss_func(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        loss = F.cross_entropy(logits_BK, labels_B)
        losses.append(loss.detach())
        return loss

    loaders = DataLoaders(task.batches.loader(), DataLoader([task.batches.batches[0]], batch_size=None))  # type: ignore[arg-type]
    opt_func = functools.partial(OptimWrapper, opt=functools.partial(torch.optim.AdamW, weight_decay=0.0, fused=True))
    learner = Learner(loaders, task.fresh(), loss_func=loss_func, opt_func=opt_func)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, task.lr, cbs=ParamScheduler({"lr": SchedCos(task.lr, 0.0)}))
    return losses[: task.num_steps]


@dataclass(frozen=True)
class Peer:
    name: str
    train: Callable[[Task], Losses]
    package: str

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


PEERS = (
    Peer("Accelerate", with_accelerate, "accelerate"),
    Peer("transformers' Trainer", with_trainer, "transformers"),
    Peer("timm", with_timm, "timm"),
    Peer("Lightning", with_lightning, "lightning"),
    Peer("Lightning, finetuning-scheduler", with_finetuning_scheduler, "finetuning_scheduler"),
    Peer("fastai", with_fastai, "fastai"),
)
