"""What heads and neighbours say of images that they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tltrain.core.errors import UserError
from tltrain.data.splits import folds
from tltrain.heads import neighbours as near
from tltrain.heads.neighbours import near_pairs, nearest, neighbours
from tltrain.heads.out_of_fold import out_of_fold
from tltrain.heads.solve import solve


def _clouds(num: int = 90, columns: int = 12, apart: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    label_N = np.arange(num) % 3
    return torch.from_numpy(random.normal(size=(num, columns)) + apart * random.normal(size=(3, columns))[label_N]), torch.from_numpy(
        label_N
    )


def test_out_of_fold_is_a_head_that_has_not_seen_the_fold() -> None:
    x_ND, label_N = _clouds()
    fold_N = folds(label_N.numpy(), np.arange(90), 3, 0)
    weight_N = torch.linspace(0.5, 2, 90, dtype=torch.float64)
    mine_NK = out_of_fold("ridge", x_ND, label_N, fold_N, 3, weight_N=weight_N)
    rest_N = torch.from_numpy(fold_N != 1)
    by_hand = solve("ridge", x_ND[rest_N], label_N[rest_N], 3, weight_N=weight_N[rest_N])
    torch.testing.assert_close(mine_NK[~rest_N], by_hand.logits(x_ND[~rest_N]), rtol=0, atol=1e-12)
    changed_N = torch.where(torch.from_numpy(fold_N == 1), (label_N + 1) % 3, label_N)  # its own labels are not looked at
    torch.testing.assert_close(
        out_of_fold("ridge", x_ND, changed_N, fold_N, 3, weight_N=weight_N)[~rest_N], mine_NK[~rest_N], rtol=0, atol=0
    )


def test_noise_is_not_learned_by_heart() -> None:
    x_ND = torch.randn(120, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label_N = torch.arange(120) % 2
    fold_N = folds(label_N.numpy(), np.arange(120), 5, 0)
    for kind in ("ridge", "logistic", "nearest_mean"):
        logits_NK = out_of_fold(kind, x_ND, label_N, fold_N, 2)
        assert float((logits_NK.argmax(1) == label_N).double().mean()) < 0.65
        assert float(torch.nn.functional.cross_entropy(logits_NK, label_N)) < 0.85, "a head that knows nothing is not sure"


def test_folds_that_leak_are_refused() -> None:
    x_ND, label_N = _clouds(9)
    with pytest.raises(UserError, match="1 fold"):
        out_of_fold("ridge", x_ND, label_N, torch.zeros(9), 3)
    with pytest.raises(UserError, match="two folds"):
        out_of_fold("ridge", x_ND, label_N, torch.arange(9) % 2, 3, group_N=torch.arange(9) // 2)


@pytest.mark.parametrize("numbers", [2**24, 200], ids=["whole", "blocks"])
def test_neighbours_are_the_nearest_by_cosine(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "NUMBERS", numbers)
    x_ND, _ = _clouds(50)
    unit_ND = (x_ND - x_ND.mean(0)) / (x_ND - x_ND.mean(0)).norm(dim=1, keepdim=True)
    cosine_NN = (unit_ND @ unit_ND.T).fill_diagonal_(-3)
    found = nearest(x_ND, 4)
    assert torch.equal(found.index_Nk, cosine_NN.topk(4, 1).indices)
    fold_N = torch.arange(50) % 5
    across = nearest(x_ND, 4, fold_N=fold_N)
    assert not bool((fold_N[across.index_Nk] == fold_N[:, None]).any())
    few = nearest(x_ND[:3], 5)
    assert few.index_Nk[:, 2:].eq(-1).all()
    assert few.index_Nk[:, :2].ge(0).all()
    pairs = near_pairs(x_ND, 0.5, centred=True)
    expected = {(i, j) for i in range(50) for j in range(i + 1, 50) if cosine_NN[i, j] >= 0.5}
    assert set(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True)) == expected
    assert pairs.cosine_P.tolist() == sorted(pairs.cosine_P.tolist(), reverse=True)
    assert near_pairs(x_ND, 0.5, most=3, centred=True).cosine_P.tolist() == pairs.cosine_P[:3].tolist()


def test_votes_are_of_other_folds_and_sane_without_any() -> None:
    x_ND, label_N = _clouds(90, apart=2.0)
    votes_NK = neighbours(x_ND, label_N, 3, 5, fold_N=torch.arange(90) % 3)  # a fold is a class here: nobody of one's own class votes
    assert not bool((votes_NK.argmax(1) == label_N).any())
    assert float((neighbours(x_ND, label_N, 3).argmax(1) == label_N).double().mean()) > 0.95
    alone_NK = neighbours(x_ND[:2], label_N[:2], 3, fold_N=torch.zeros(2))
    assert bool(torch.isfinite(alone_NK).all())
    assert torch.equal(alone_NK[:, 0], alone_NK[:, 1])
