"""Objectives against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from plain_loop import authors_dist, authors_dkd
from torch import Tensor
from torch.nn import functional as F

from tltrain.training.losses.cross_entropy import cross_entropy
from tltrain.training.losses.dist import relations
from tltrain.training.losses.distillation import distillation
from tltrain.training.losses.dkd import decoupled
from tltrain.training.losses.over_batch import Together


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


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_dkd_equals_a_hand_computed_value() -> None:
    # T = 1, the label is class 1. Teacher (3/8, 1/2, 1/8), student (3/8, 1/4, 3/8).
    # Label against rest: KL of (1/2, 1/2) from (1/4, 3/4). Among the rest: (3/4, 1/4) from (1/2, 1/2).
    teacher, student = double([0.375, 0.5, 0.125]).log(), double([0.375, 0.25, 0.375]).log()
    label = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    rest = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert decoupled(student, teacher, 1.0, torch.tensor([1])).item() == pytest.approx(label + 8 * rest, rel=1e-12)


def test_dist_equals_a_hand_computed_value() -> None:
    # T = 1. Two images, two classes. Teacher (3/4, 1/4) and (1/4, 3/4), student (3/5, 2/5) and (9/10, 1/10).
    # Of two numbers a correlation is 1 or -1. Over classes: 1 for the first image, -1 for the second. Over images: -1 for both classes.
    teacher, student = double([0.75, 0.25], [0.25, 0.75]).log(), double([0.6, 0.4], [0.9, 0.1]).log()
    torch.testing.assert_close(relations(student, teacher, 1.0, torch.ones(2)), torch.tensor([0.0 + 2.0, 2.0 + 2.0], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_and_dkd_are_their_authors(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher, labels = 2 * torch.randn(9, 5, dtype=torch.float64), 3 * torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    ours = {"dist": relations(student, teacher, temperature, torch.ones(9)), "dkd": decoupled(student, teacher, temperature, labels)}
    theirs = {name: formula(student, teacher, labels, temperature) for name, formula in (("dist", authors_dist), ("dkd", authors_dkd))}
    for name, loss in ours.items():
        assert loss.mean().item() == pytest.approx(theirs[name].item(), rel=1e-6), name  # 1e-8 beside a norm is theirs


def test_kd_is_dkd_with_the_teachers_doubt_in_place_of_beta() -> None:
    """Zhao et al. 2022, equation 7."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4
    far = teacher.scatter(1, labels[:, None], -1e9)  # without the label
    rest = distillation(student.scatter(1, labels[:, None], -1e9), far, 1.0)
    doubt = 1 - teacher.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(distillation(student, teacher, 1.0), decoupled(student, teacher, 1.0, labels) - 8 * rest + doubt * rest)


def test_dist_of_a_head_of_zeros_has_a_gradient_that_an_optimizer_can_take() -> None:
    torch.manual_seed(0)
    student = torch.zeros(64, 10, requires_grad=True)
    relations(student, 3 * torch.randn(64, 10), 4.0, torch.ones(64)).mean().backward()
    assert student.grad is not None
    assert 1e-4 < student.grad.norm() < 100, "the authors' 1e-8 gives 1e7"


@pytest.mark.parametrize("sizes", [(13,), (5, 4, 4), (1, 0, 2)], ids=str)
def test_a_loss_over_the_batch_is_the_same_on_any_number_of_processes(sizes: tuple[int, ...]) -> None:
    """Each computes it with the rows of all, and the gradient through its own. A process without images has one of weight 0."""
    torch.manual_seed(0)
    student, teacher = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randn(sum(sizes), 5, dtype=torch.float64)
    whole = student.clone().requires_grad_()
    expected = authors_dist(whole, teacher, torch.zeros(0), 2.0)
    expected.backward()

    def part_of(x: Tensor) -> list[Tensor]:
        return [part if len(part) else torch.full((1, *x.shape[1:]), 7.0, dtype=x.dtype) for part in x.split(sizes)]

    weights = [torch.full((max(size, 1),), float(size > 0)) for size in sizes]
    columns = [part_of(student), part_of(teacher), weights]
    losses, grads = [], []
    for rank, weight in enumerate(weights):
        asked = iter(columns)  # the student's rows, the teacher's, the weights

        def gather(own: Tensor, rank: int = rank, asked: object = asked) -> Tensor:
            parts = next(asked)  # type: ignore[call-overload]
            assert own[: len(parts[rank])].equal(parts[rank])
            return torch.cat([torch.cat([part, part.new_zeros((len(own) - len(part), *part.shape[1:]))]) for part in parts])

        own = columns[0][rank].clone().requires_grad_()
        loss_B = Together(gather, rank, max(sizes))(relations, own, columns[1][rank], 2.0, weight)
        share = (loss_B * weight).sum() / sum(sizes)
        share.backward()
        assert own.grad is not None
        losses.append(share.item())
        grads.append(own.grad[: sizes[rank]])
    assert sum(losses) == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat(grads), whole.grad, rtol=1e-5, atol=1e-8)
