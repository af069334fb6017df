"""BatchNorm over the global batch: with several processes, statistics that train are those of all images that share a step.

On GPUs this is torch's SyncBatchNorm, which refuses a CPU; there, the same mean and variance by a differentiable all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of all processes' images, on any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape. In eval mode, as nn.BatchNorm; in training mode a collective call."""
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        dims = [d for d in range(input.ndim) if d != 1]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = dist_nn.all_reduce(torch.cat([x.sum(dims), (x * x).sum(dims), count]))
        num = sums[-1].detach()
        mean, square = sums[:-1].view(2, -1) / num
        variance = square - mean * mean
        self._track(mean.detach(), variance.detach() * num / (num - 1))
        shape = [1, -1] + [1] * (input.ndim - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        x = (x - mean.view(shape)) * scale.view(shape)
        return (x if self.bias is None else x + self.bias.view(shape)).to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def share_statistics(net: nn.Module, names: list[str], device: torch.device) -> None:
    """Replace the named BatchNorm modules of a net by ones over the global batch, with the same parameters and buffers."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent, old = net.get_submodule(parent_name), net.get_submodule(name)
        assert isinstance(old, _BatchNorm)
        kind = nn.SyncBatchNorm if device.type == "cuda" else GlobalBatchNorm
        new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        new.weight, new.bias = old.weight, old.bias
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(new, buffer, getattr(old, buffer))
        setattr(parent, child, new.train(old.training))
