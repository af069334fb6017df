"""BatchNorm over the global batch: training statistics are computed over all processes' images of one micro-batch.

GPUs use torch's SyncBatchNorm, which does not support the CPU. On the CPU, GlobalBatchNorm computes the same mean and variance with a
differentiable all-reduce.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm with training statistics over all processes, on any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape. In eval mode it equals nn.BatchNorm. In training mode it is a collective call."""
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
    """Replace the named BatchNorm modules of `net` with synchronised ones that share their parameters and buffers."""
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
