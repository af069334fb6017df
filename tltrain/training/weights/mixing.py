"""Weighted means of state dicts of one network: what lies between two ends of a stage, or between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def mix(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The mean of state dicts, each with its share. shares: sum to 1. Sums are float64, results have the tensors' own dtype.

    Where a share is 1, and for tensors that are equal in all states, the result is exact. BatchNorm's variance is the square of the mean
    of standard deviations: where activations of the networks go together, as of networks tuned from one, that is the deviation of the
    mean network's activations (Jordan et al. 2022, arXiv 2211.08403). Whole numbers are those of the state with the largest share.
    """
    largest = max(range(len(states)), key=shares.__getitem__)
    used = [(state, share) for state, share in zip(states, shares, strict=True) if share > 0]
    out: dict[str, Tensor] = {}
    for name, tensor in states[largest].items():
        others = [state[name] for state, _ in used]
        if not tensor.is_floating_point() or all(torch.equal(tensor, other) for other in others):
            out[name] = tensor
        elif name.endswith("running_var"):
            out[name] = _mean([other.double().sqrt() for other in others], used).square().to(tensor.dtype)
        else:
            out[name] = _mean([other.double() for other in others], used).to(tensor.dtype)
    return out


def _mean(tensors: Sequence[Tensor], used: Sequence[tuple[Mapping[str, Tensor], float]]) -> Tensor:
    return torch.stack([share * tensor for tensor, (_, share) in zip(tensors, used, strict=True)]).sum(0)
