"""The loss of several labels against values computed by hand, and the loss of a recipe with mixing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.training.losses.binary import binary_distillation
from tltrain.training.losses.cross_entropy import cross_entropy
from tltrain.training.losses.objective import Objective, label_loss

LABELS = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.uint8)


def test_it_is_the_mean_over_classes_of_each_image() -> None:
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)], [0.0, 0.0, 0.0]])
    by_hand = [(math.log(4 / 3) + math.log(2) + math.log(4)) / 3, math.log(2)]
    assert cross_entropy(logits, LABELS).tolist() == pytest.approx(by_hand, rel=1e-6)


def test_smoothing_goes_to_the_two_answers_of_each_class() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = F.binary_cross_entropy_with_logits(logits, LABELS * 0.8 + 0.1, reduction="none").mean(1)
    torch.testing.assert_close(cross_entropy(logits, LABELS, 0.2), expected)


def test_weights_are_of_the_images_without_and_with_each_class() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    weights_2K = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    each = F.binary_cross_entropy_with_logits(logits, LABELS.float(), reduction="none")
    expected = (each * torch.tensor([[4.0, 2.0, 6.0], [1.0, 2.0, 3.0]])).mean(1)
    torch.testing.assert_close(cross_entropy(logits, LABELS, 0.0, weights_2K), expected)


def test_mixed_images_have_the_mixture_of_their_labels() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    batch = {"label": LABELS, "partner_label": LABELS.flip(0), "lam": torch.tensor([0.3, 0.9])}
    mixed = torch.tensor([[0.3, 0.0, 0.3], [0.1, 0.0, 0.1]])
    expected = F.binary_cross_entropy_with_logits(logits, mixed, reduction="none").mean(1)
    torch.testing.assert_close(Objective(label_loss("cross_entropy", 3, multilabel=True), 0.0)(logits, batch), expected)


def test_a_teacher_of_labels_is_learned_label_by_label() -> None:
    student, teacher = torch.tensor([[0.0, 0.0], [2.0, -1.0]]), torch.tensor([[2 * math.log(3), 0.0], [2.0, -1.0]])
    # At T = 2 the teacher says 3/4 where the student says 1/2; of the second label, and of the second image, they say the same.
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert binary_distillation(student, teacher, 2.0).tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)


def test_a_loss_that_knows_one_class_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    monkeypatch.setattr(registry, "find", lambda *_: one)
    with pytest.raises(UserError, match="does not take several labels"):
        label_loss("theirs", 3, multilabel=True)
