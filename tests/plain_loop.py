"""What a recipe means, in plain PyTorch and float64: a loop to compare runs with. Nothing here is ours but the pixels it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainBatch:
    """One global batch as pixels."""

    pixels: Tensor
    """uint8 (B, 3, H, W)."""
    labels: Tensor
    """int64 (B,); negative: without a label."""
    partner_pixels: Tensor | None = None
    partner_labels: Tensor | None = None
    lams: tuple[float, ...] = ()
    """Share of each sample itself."""
    boxes: tuple[tuple[int, int, int, int] | None, ...] = ()
    """cutmix: top, left, bottom, right of the partner's pixels; None: mixup."""

    def images(self) -> Tensor:
        """fp32 in [0, 1], mixed."""
        x_BCHW = self.pixels.float() / 255
        if self.partner_pixels is None:
            return x_BCHW
        other_BCHW = self.partner_pixels.float() / 255
        for i, (lam, box) in enumerate(zip(self.lams, self.boxes, strict=True)):
            if box is None:
                x_BCHW[i] = torch.tensor(lam) * x_BCHW[i] + (1 - torch.tensor(lam)) * other_BCHW[i]
            else:
                top, left, bottom, right = box
                x_BCHW[i, :, top:bottom, left:right] = other_BCHW[i, :, top:bottom, left:right]
        return x_BCHW


@dataclass(frozen=True)
class PlainNet:
    """A network with the mean and standard deviation of its own weights."""

    net: nn.Module
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """fp32 in [0, 1] to logits (B, K)."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        out = self.net(((images_BCHW - mean) / std).double())
        return out if isinstance(out, Tensor) else out.logits


@dataclass(frozen=True)
class PlainLoss:
    """Cross entropy and distillation as their papers have them."""

    smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    teacher: PlainNet | None = None
    temperature: float = 1.0
    weight: float = 0.0
    """Share of the distillation term."""
    teacher_dtype: torch.dtype = torch.float32
    term: Callable[..., Tensor] | None = None
    """(student's logits, teacher's, labels, temperature) -> the distillation term, a number. None: KL."""

    def __call__(self, student: PlainNet, batch: PlainBatch) -> Tensor:
        """The mean over the global batch."""
        images = batch.images()
        logits = student(images)
        loss_B = self._cross_entropy(logits, batch.labels)
        if batch.partner_labels is not None:
            lam_B = torch.tensor(batch.lams)
            loss_B = lam_B * loss_B + (1 - lam_B) * self._cross_entropy(logits, batch.partner_labels)
        if self.teacher is not None:
            with torch.no_grad():
                teacher_BK = self.teacher(images).to(self.teacher_dtype).double()
            if self.term is not None:
                taught = self.term(logits, teacher_BK, batch.labels, self.temperature)
                return (1 - self.weight) * loss_B.mean() + self.weight * taught
            q_BK, t = (teacher_BK / self.temperature).softmax(1), self.temperature
            kl_B = (q_BK * (q_BK.log() - (logits / t).softmax(1).log())).sum(1)
            loss_B = (1 - self.weight) * loss_B + self.weight * t * t * kl_B
        return loss_B.sum() / len(loss_B)

    def _cross_entropy(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        num_classes = logits_BK.shape[1]
        target_BK = torch.full(logits_BK.shape, self.smoothing / num_classes, dtype=torch.float64)
        target_BK[torch.arange(len(labels_B)), labels_B] += 1 - self.smoothing
        target_BK[labels_B < 0] = 0
        loss_B = -(target_BK * logits_BK.softmax(1).log()).sum(1)
        return loss_B if self.class_weights is None else loss_B * torch.tensor(self.class_weights)[labels_B]


def authors_dist(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """DIST as its authors' code has it, with beta = gamma = 1 (github.com/hunto/DIST_KD)."""

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    y_s, y_t = (student_BK / temperature).softmax(dim=1), (teacher_BK / temperature).softmax(dim=1)
    inter = temperature**2 * (1 - pearson(y_s, y_t).mean())
    intra = temperature**2 * (1 - pearson(y_s.transpose(0, 1), y_t.transpose(0, 1)).mean())
    return inter + intra


def authors_dkd(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
    """DKD as its authors' code has it, with alpha = 1 and beta = 8 (github.com/megvii-research/mdistiller)."""
    label = torch.zeros_like(student_BK).scatter_(1, labels_B.unsqueeze(1), 1)

    def two(logits_BK: Tensor) -> Tensor:
        p_BK = (logits_BK / temperature).softmax(1)
        return torch.stack([(p_BK * label).sum(1), (p_BK * (1 - label)).sum(1)], 1)

    def others(logits_BK: Tensor) -> Tensor:
        return (logits_BK / temperature - 1000.0 * label).softmax(1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.where(q > 0, q * (q.clamp_min(1e-300).log() - p.clamp_min(1e-300).log()), 0).sum() / len(labels_B) * temperature**2

    return 1.0 * kl(two(student_BK), two(teacher_BK)) + 8.0 * kl(others(student_BK), others(teacher_BK))


def plain_stage(
    student: PlainNet,
    batches: Sequence[PlainBatch],
    loss: PlainLoss,
    groups: list[dict[str, Any]],
    optimizer: Callable[..., torch.optim.Optimizer],
    clip: float | None = None,
    schedule: str = "constant",
) -> tuple[list[float], list[float]]:
    """One stage, one step a batch. groups: of the parameters that train, each with its peak `lr`; all others stay frozen.

    Returns the losses and the factors of the learning rate, one a step.
    """
    for parameter in student.net.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for group in groups for parameter in group["params"]]
    for parameter in trained:
        parameter.requires_grad_(True)
    student.net.eval()  # BatchNorm keeps its statistics, and nothing drops out
    peaks, made = [group["lr"] for group in groups], optimizer(groups)
    losses, factors = [], []
    for step, batch in enumerate(batches):
        factors.append(0.5 * (1 + math.cos(math.pi * step / len(batches))) if schedule == "cosine" else 1.0)
        for group, peak in zip(made.param_groups, peaks, strict=True):
            group["lr"] = peak * factors[-1]
        value = loss(student, batch)
        made.zero_grad()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        made.step()
        losses.append(value.item())
    return losses, factors
