"""Out-of-fold logits: each image is predicted by a head that has seen neither it nor its fold or group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.heads.solve import Kind, solve
from tltrain.heads.standardised import one_thread


def out_of_fold(
    kind: Kind,
    features_ND: Tensor,
    label_N: Tensor | np.ndarray,
    fold_N: Tensor | np.ndarray,
    num_classes: int,
    *,
    weight_N: Tensor | np.ndarray | None = None,
    group_N: Tensor | np.ndarray | None = None,
    seed: int = 0,
) -> Tensor:
    """Logits (N, K) in double: each row's by a head that was worked out from the rows of all other folds alone.

    Strength, standardisation and scale are found without the fold too. fold_N: as `tltrain.data.splits.folds` gives them; the rows of
    a group must lie in one fold. Others as in `solve`. Raises UserError for a single fold, and where a group lies in two.
    """
    label_N, fold_N = torch.as_tensor(label_N).cpu(), torch.as_tensor(fold_N).cpu()
    names = torch.unique(fold_N).tolist()
    if len(names) < 2:
        raise UserError(
            f"{len(label_N)} images lie in {len(names)} fold, and a head must not see the images it is asked about; make 2 or more"
        )
    groups = None if group_N is None else torch.as_tensor(group_N).cpu()
    if groups is not None and len(torch.unique(torch.stack([groups, fold_N]), dim=1).T) > len(torch.unique(groups)):
        raise UserError(
            "a group lies in two folds, so that a head would see what it is asked about; keep the images of a group in one fold"
        )
    weights = None if weight_N is None else torch.as_tensor(weight_N).cpu()
    logits_NK = torch.empty(len(label_N), num_classes, dtype=torch.float64)
    for fold in names:
        rest_N = fold_N != fold
        head = solve(
            kind, features_ND[rest_N], label_N[rest_N], num_classes, seed=seed,
            weight_N=None if weights is None else weights[rest_N], group_N=None if groups is None else groups[rest_N],
        )  # fmt: skip
        with one_thread():
            logits_NK[~rest_N] = head.logits(features_ND[~rest_N].detach().cpu())
    return logits_NK
