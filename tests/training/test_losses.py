"""Objectives against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tltrain.training.losses.cross_entropy import cross_entropy
from tltrain.training.losses.distillation import distillation


def test_distillation_equals_a_hand_computed_value() -> None:
    # Two classes, T = 2. Teacher logits (2 ln 3, 0): softened (3/4, 1/4). Student logits (0, 0): (1/2, 1/2).
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2); times T^2 = 4.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    by_hand = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-12)


def test_distillation_is_batchmean_and_not_the_mean_over_elements() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    expected = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    torch.testing.assert_close(distillation(student, teacher, 4.0).mean(), expected)


def test_distillation_vanishes_for_equal_logits_and_keeps_half_precision_out() -> None:
    logits = torch.randn(3, 10).to(torch.bfloat16)
    loss = distillation(logits, logits, 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)


def test_cross_entropy_is_one_value_a_sample_with_class_weights_on_the_whole_term() -> None:
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([1.0, 2.0, 0.5])
    plain = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, labels, 0.1), plain)
    torch.testing.assert_close(cross_entropy(logits, labels, 0.1, weights), plain * weights[labels])
