"""Works out a linear head from features: ridge regression, logistic regression, or class means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tltrain.core.errors import UserError
from tltrain.data.splits import folds
from tltrain.heads import logistic, means, ridge
from tltrain.heads.logistic import Logistic
from tltrain.heads.ridge import WithoutFold
from tltrain.heads.scale import fit_lines, fit_scale
from tltrain.heads.standardised import Basis, Scaling, one_thread

Kind = Literal["ridge", "logistic", "nearest_mean"]
FOLDS = 5
ONE_FOLD_FROM = 10_000
"""Rows from which logistic regression chooses its strength on one fold of `FOLDS` in place of all: 2,000 images tell strengths apart."""
USUAL = {"ridge": 1.0, "logistic": 0.1}
"""Strength by image where there is nothing to choose it by: a single group."""


@dataclass(frozen=True)
class SolvedHead:
    """A linear head in double precision, for plain features: standardisation is part of it."""

    weight_KD: Tensor
    bias_K: Tensor
    strength: float | None
    """The penalty on the squared weights of standardised features: scikit-learn's alpha of ridge, 1 / C of logistic. None: class means."""
    notes: tuple[str, ...]
    """Notes: how the regularisation strength and the scale were found, and oddities of the features."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """(N, K) in double."""
        return features_ND.double() @ self.weight_KD.T + self.bias_K


@dataclass(frozen=True)
class _Problem:
    """Rows, classes that have rows, weights, and folds where rows belong together. None: each row is left out by itself."""

    features_ND: Tensor
    label_N: Tensor
    target_NK: Tensor
    weight_N: Tensor
    fold_N: Tensor | None
    num_groups: int
    seed: int
    alive: Callable[[], None]

    @property
    def total(self) -> float:
        return float(self.weight_N.sum())

    @property
    def several(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.label_N.ndim == 2


def solve(
    kind: Kind,
    features_ND: Tensor,
    label_N: Tensor | np.ndarray,
    num_classes: int,
    *,
    weight_N: Tensor | np.ndarray | None = None,
    group_N: Tensor | np.ndarray | None = None,
    seed: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> SolvedHead:
    """A linear head for features (N, D) of any float type, with labels (N,) from 0 to num_classes - 1. A function of its arguments.

    Several labels (N, K), 1 where a row has one: ridge on these ones and zeros, or a logistic regression for each; not nearest_mean.
    A label's probability is then the sigmoid of its logit.

    weight_N: what each row counts, such as class weights. A row of weight 0 is not seen. group_N: rows that belong together, such as
    several views of an image; they are left out together while the strength is chosen. seed: of those folds. alive: called now and then;
    what it raises ends the work.

    One thread of one process works, so that the bits do not depend on their number. The largest thing in memory is one copy of the
    features in double. Raises UserError for features that are not finite, and for no rows.
    """
    label_N, weight_N = torch.as_tensor(label_N).cpu(), _weights(weight_N, len(label_N))
    kept_N = weight_N > 0
    if not bool(kept_N.any()):
        raise UserError("a head cannot be worked out from no images; give it some, with weights above 0")
    groups = torch.arange(len(label_N)) if group_N is None else torch.as_tensor(group_N).cpu()
    features_ND = features_ND.detach().cpu()
    if not bool(kept_N.all()):
        features_ND, label_N, weight_N, groups = features_ND[kept_N], label_N[kept_N], weight_N[kept_N], groups[kept_N]
    if not bool(torch.isfinite(features_ND).all()):
        raise UserError("features hold values that are not finite, so that no head can be worked out; use fp32, or other weights")
    with one_thread(), torch.no_grad():
        if label_N.ndim == 2:
            return _of_labels(kind, features_ND, label_N, weight_N, groups, seed, alive)
        present_K, own_N = torch.unique(label_N, return_inverse=True)
        problem = _problem(features_ND, own_N, len(present_K), weight_N, groups, seed, alive)
        found = _solved(kind, problem)
        return _with_absent(found, present_K, num_classes, len(features_ND))


def _weights(weight_N: Tensor | np.ndarray | None, num: int) -> Tensor:
    return torch.ones(num, dtype=torch.float64) if weight_N is None else torch.as_tensor(weight_N).detach().cpu().double()


def _problem(
    features_ND: Tensor, label_N: Tensor, num_classes: int, weight_N: Tensor, group_N: Tensor, seed: int, alive: Callable[[], None]
) -> _Problem:
    target_NK = label_N.double() if label_N.ndim == 2 else F.one_hot(label_N, num_classes).double()
    num_groups = len(torch.unique(group_N))
    fold_N = None
    if 1 < num_groups < len(group_N):
        fold_N = torch.from_numpy(folds(label_N.numpy(), group_N.numpy(), min(FOLDS, num_groups), seed))
    return _Problem(features_ND, label_N, target_NK, weight_N, fold_N, num_groups, seed, alive)


def _solved(kind: Kind, problem: _Problem) -> SolvedHead:
    """The head of the classes that have rows."""
    scaling = Scaling.of(problem.features_ND, problem.weight_N)
    odd = (
        ()
        if bool(scaling.inverse_D.any())
        else ("the features of all images are the same, so that the head knows no more than how many there are",)
    )
    if kind == "nearest_mean":
        return _nearest_mean(problem, scaling, odd)
    basis = Basis.of(problem.features_ND, scaling, problem.weight_N)
    if kind == "logistic":
        return _logistic(problem, scaling, basis, odd)
    return _ridge(problem, scaling, basis, odd)


def _ridge(problem: _Problem, scaling: Scaling, basis: Basis, odd: tuple[str, ...]) -> SolvedHead:
    """Strength by the squared error of unseen rows; scale by their log loss."""
    target_NK, weight_N = problem.target_NK, problem.weight_N
    strength, score_NK, how = USUAL["ridge"] * problem.total, None, "usual: there is one group, and so nothing unseen"
    if problem.num_groups > 1:
        strength, score_NK, how = _unseen_by_ridge(problem, basis)
    weight_KD, bias_K = scaling.folded(*ridge.coefficients(basis, target_NK, weight_N, strength))
    told = f"ridge of strength {strength:.3g} ({how})"
    if problem.several:
        slope_K, offset_K, line = _lines(score_NK, problem)
        return SolvedHead(slope_K[:, None] * weight_KD, slope_K * bias_K + offset_K, strength, (*odd, told, line))
    factor, said = _scale(score_NK, problem)
    notes = (*odd, told, *said)
    return SolvedHead(factor * weight_KD, factor * bias_K, strength, notes)


def _unseen_by_ridge(problem: _Problem, basis: Basis) -> tuple[float, Tensor, str]:
    """(strength, what ridge of that strength says of each row without having seen it, how it was found)."""
    target_NK, weight_N, score_NK = problem.target_NK, problem.weight_N, torch.empty_like(problem.target_NK)
    by_image = torch.tensor(ridge.STRENGTHS, dtype=torch.float64)
    error_S = torch.zeros(len(by_image), dtype=torch.float64)
    if problem.fold_N is None:
        strengths = by_image * problem.total
        for at, unseen_SBK in ridge.left_out(basis, target_NK, weight_N, strengths):
            problem.alive()
            error_S += (unseen_SBK - target_NK[at]).square().sum(2) @ weight_N[at]
        best = _least(error_S)
        for at, unseen_SBK in ridge.left_out(basis, target_NK, weight_N, strengths[best : best + 1]):
            score_NK[at] = unseen_SBK[0]
        return float(strengths[best]), score_NK, "leave-one-out"
    parts = []
    for fold in range(int(problem.fold_N.max()) + 1):
        held_N = (problem.fold_N == fold).nonzero().squeeze(1)
        problem.alive()
        parts.append((held_N, WithoutFold.of(basis, target_NK, weight_N, held_N)))
    for held_N, fit in parts:
        for i, strength in enumerate(by_image.tolist()):
            wrong_BK = fit.scores(basis.rows_NR[held_N], strength * float(fit.total)) - target_NK[held_N]
            error_S[i] += weight_N[held_N] @ wrong_BK.square().sum(1)
    best = _least(error_S)
    for held_N, fit in parts:
        score_NK[held_N] = fit.scores(basis.rows_NR[held_N], float(by_image[best] * fit.total))
    return float(by_image[best] * problem.total), score_NK, f"{len(parts)} folds of whole groups"


def _logistic(problem: _Problem, scaling: Scaling, basis: Basis, odd: tuple[str, ...]) -> SolvedHead:
    """Strength by the log loss of unseen rows."""
    by_image, how = USUAL["logistic"], "usual: there is one group, and so nothing unseen"
    if problem.num_groups > 1 and (problem.several or problem.target_NK.shape[1] > 1):
        by_image, how = _strength_of_logistic(problem, basis)
    fit = Logistic(basis, problem.target_NK, problem.weight_N, problem.alive, problem.several)
    fit.fit(by_image * problem.total, logistic.FINE)
    weight_KD, bias_K = scaling.folded(*fit.coefficients())
    strength = by_image * problem.total
    return SolvedHead(weight_KD, bias_K, strength, (*odd, f"logistic regression of strength {strength:.3g} ({how})"))


def _strength_of_logistic(problem: _Problem, basis: Basis) -> tuple[float, str]:
    """(strength by image, how it was found).

    From strong to weak, each fit begins where the one before it ended, until the loss has risen twice."""
    fold_N, label_N = problem.fold_N, problem.label_N
    if fold_N is None:
        fold_N = torch.from_numpy(folds(label_N.numpy(), np.arange(len(label_N)), min(FOLDS, len(label_N)), problem.seed))
    num = 1 if len(label_N) >= ONE_FOLD_FROM else int(fold_N.max()) + 1
    fits = []
    for fold in range(num):
        weight_N = torch.where(fold_N == fold, 0.0, problem.weight_N)
        held_N = fold_N == fold
        if not problem.several:
            held_N &= (weight_N @ problem.target_NK > 0)[label_N]  # of a class that the others lack there is nothing to learn
        fits.append((held_N.nonzero().squeeze(1), Logistic(basis, problem.target_NK, weight_N, problem.alive, problem.several)))
    losses: list[float] = []
    for by_image in logistic.STRENGTHS:
        losses.append(0.0)
        for held_N, fit in fits:
            fit.fit(by_image * float(fit.total), logistic.COARSE)
            losses[-1] += float(problem.weight_N[held_N] @ fit.loss(held_N))
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    kept = "whole groups" if problem.fold_N is not None else "images"
    how = f"{num} folds of {kept}" if num > 1 else f"one fold of {FOLDS}, of {kept}"
    return logistic.STRENGTHS[losses.index(min(losses))], how


def _nearest_mean(problem: _Problem, scaling: Scaling, odd: tuple[str, ...]) -> SolvedHead:
    """Standardised features, Euclid's distance; the scale by the log loss of unseen rows."""
    rows_ND = scaling(problem.features_ND)
    score_NK, seen_N = means.left_out(rows_ND, problem.target_NK, problem.weight_N)
    if problem.fold_N is not None:
        for fold in range(int(problem.fold_N.max()) + 1):
            held_N, rest_N = problem.fold_N == fold, torch.where(problem.fold_N == fold, 0.0, problem.weight_N)
            weight_KD, bias_K = means.coefficients(rows_ND, problem.target_NK, rest_N)
            known_K = rest_N @ problem.target_NK > 0
            score_NK[held_N] = torch.where(known_K, rows_ND[held_N] @ weight_KD.T + bias_K, 0.0)
            seen_N[held_N] = known_K.all()
    factor, said = _scale(score_NK[seen_N], problem, seen_N)
    weight_KD, bias_K = scaling.folded(*means.coefficients(rows_ND, problem.target_NK, problem.weight_N))
    return SolvedHead(factor * weight_KD, factor * bias_K, None, (*odd, "class means of standardised features, Euclid's distance", *said))


def _scale(score_NK: Tensor | None, problem: _Problem, at_N: Tensor | None = None) -> tuple[float, tuple[str, ...]]:
    """The factor that makes logits of scores of unseen rows, and a note about it."""
    if score_NK is None or len(score_NK) == 0:
        return 1.0, ("its scores are taken as logits: nothing unseen to scale them by",)
    at_N = torch.ones(len(problem.label_N), dtype=torch.bool) if at_N is None else at_N
    factor = fit_scale(score_NK, problem.label_N[at_N], problem.weight_N[at_N])
    if factor is not None:
        return factor, (f"its scores times {factor:.3g} are logits: the least log loss of what it says of unseen images",)
    largest = float((score_NK - score_NK.mean(1, keepdim=True)).abs().max())
    return 1 / max(largest, 1.0), ("of unseen images it knows no more than a guess, and so its probabilities are nearly even",)


def _lines(score_NK: Tensor | None, problem: _Problem) -> tuple[Tensor, Tensor, str]:
    """(slope (K,), offset (K,), a note) that make logits of scores of several labels, whose targets are 0 and 1."""
    if score_NK is None:
        num = problem.target_NK.shape[1]
        return torch.full((num,), 4.0).double(), torch.full((num,), -2.0).double(), "a score of 0.5 is even: nothing unseen to scale it by"
    lines = fit_lines(score_NK, problem.target_NK, problem.weight_N)
    return *lines, "each label's scores become logits by a line: the least log loss of what it says of unseen images"


def _of_labels(
    kind: Kind, features_ND: Tensor, label_NK: Tensor, weight_N: Tensor, groups: Tensor, seed: int, alive: Callable[[], None]
) -> SolvedHead:
    """The head of several labels. One that each row has, or none, has no weights: its logit is log(N + 1), or its negative."""
    assert kind != "nearest_mean"  # recipes and flags refuse it
    num, count_K = len(label_NK), label_NK.long().sum(0)
    varies_K = (count_K > 0) & (count_K < num)
    weight_KD = torch.zeros(len(count_K), features_ND.shape[1], dtype=torch.float64)
    bias_K = torch.where(count_K == 0, -1.0, 1.0).double() * float(np.log(num + 1))
    if not bool(varies_K.any()):
        return SolvedHead(weight_KD, bias_K, None, ("no label that some images have and others lack, so that there is nothing to learn",))
    found = _solved(kind, _problem(features_ND, label_NK[:, varies_K], len(count_K), weight_N, groups, seed, alive))
    weight_KD[varies_K], bias_K[varies_K] = found.weight_KD, found.bias_K
    return SolvedHead(weight_KD, bias_K, found.strength, found.notes)


def _least(error_S: Tensor) -> int:
    """The strongest of those with the least error, up to rounding."""
    return int((error_S <= error_S.min() * (1 + 1e-12)).nonzero()[-1])


def _with_absent(found: SolvedHead, present_K: Tensor, num_classes: int, num_rows: int) -> SolvedHead:
    """The head with all classes. One without rows is never predicted: its logit is the mean of the others', less log(N + 1)."""
    weight_KD = found.weight_KD.mean(0).expand(num_classes, -1).clone()
    bias_K = (found.bias_K.mean() - float(np.log(num_rows + 1))).expand(num_classes).clone()
    weight_KD[present_K], bias_K[present_K] = found.weight_KD, found.bias_K
    return SolvedHead(weight_KD, bias_K, found.strength, found.notes)
