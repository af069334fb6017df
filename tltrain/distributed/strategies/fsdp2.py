"""FSDP2: shards weights, gradients and optimizer state, one unit for each block."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tltrain.distributed.strategies.ddp import Strategy
from tltrain.models.chain import Chain, unit_classes


class Fsdp2(Strategy):
    """PyTorch's fully sharded data parallelism. Each block that is one module is one unit."""

    replicated = False
    channels_last = False
    fuses_sgd = False

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        # Accelerate reads the class names of units from this attribute. Without it, it wraps the root alone.
        chain._no_split_modules = unit_classes(chain)  # type: ignore[assignment]
        return self.runtime.accelerator.prepare(chain, optimizer)

    def warm_up(self, size: int) -> None:
        """Does nothing: FSDP2 has no buckets."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def reshard(self) -> None:
        """Reshard all units. After a forward pass without backward, the root still holds unsharded parameters, which are other objects."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def forget(self, first: int) -> None:
        """Does nothing: a process holds its shard only, and the units keep views of it."""

    def _full(self, tensor: Tensor, everywhere: bool = False) -> Tensor:
        whole = tensor.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        return whole.to("cpu", copy=True) if self.runtime.is_main or everywhere else torch.empty(0)

    def _like(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if key == "step" or not isinstance(parameter, DTensor):
            return super()._like(value, parameter, key)
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
