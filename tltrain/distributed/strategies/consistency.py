"""Run-time checks: frozen tensors unchanged, trainable blocks updated, replicas identical.

They catch bugs that raise no error: a parameter that DDP does not synchronise drifts apart, and one that is missing from the optimizer
is never trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tltrain.core.stage_plan import StagePlan
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.strategies import OptimizerState, Strategy
from tltrain.models.chain import Chain

SURE = 64
"""How many times larger than rounding an update must be before an unchanged weight counts as an error. Adam's bias correction takes at most
a factor of 7, and the learning rate may have been below its peak when the gradient came."""


class ConsistencyError(RuntimeError):
    """A stage trained other tensors than planned, or replicas differ between processes."""


class Guard:
    """The checks of one stage. Create it before the first step: it records checksums of frozen tensors."""

    def __init__(self, runtime: Runtime, strategy: Strategy) -> None:
        self.runtime, self.strategy, self.chain = runtime, strategy, strategy.chain
        self.frozen = _checksums(self.chain, trained=False)
        self.buffers = _checksums(self.chain, trained=True, parameters=False)
        self.scale = self._scale()

    def replicas(self, step: int) -> None:
        """Raise ConsistencyError, on every process, where a trainable block differs between processes. Collective.

        Compares its buffers, which no strategy shards, and its parameters unless they are sharded.
        """
        if self.runtime.world == 1:
            return
        sums_RN2 = self.runtime.gather(_checksums(self.chain, trained=True, parameters=self.strategy.replicated).unsqueeze(0))
        differs_N = (sums_RN2 != sums_RN2[:1]).any(2).any(0)
        if differs_N.any():
            block = self.chain.blocks[int(differs_N.nonzero()[0])].name
            ranks = (sums_RN2 != sums_RN2[:1]).any(2).any(1).nonzero().flatten().tolist()
            raise ConsistencyError(f"after step {step} block {block} is not the same on all processes (ranks {ranks} differ from rank 0)")

    def finish(self, last: dict[str, Tensor], stage: StagePlan, steps: range) -> None:
        """Raise ConsistencyError at the end of a stage where a frozen tensor changed or a trainable block did not. Collective.

        last: the weights after the `steps` of this start, complete on process 0. A trainable block may be unchanged where its gradients
        were zero or its updates smaller than rounding, as the optimizer's state shows. SGD without momentum has no such state, so its
        blocks are not checked.
        """
        self.strategy.reshard()
        changed = (_checksums(self.chain, trained=False) != self.frozen).any(1)
        if changed.any():
            i = int(changed.nonzero()[0])
            what = "block" if i < self.chain.training_from else "a part of block"
            raise ConsistencyError(f"{what} {self.chain.blocks[i].name} is frozen in this stage, but it changed")
        moved = (_checksums(self.chain, trained=True, parameters=False) != self.buffers).any(1)
        if moved.any() and not self.chain.norm_stats:
            block = self.chain.blocks[int(moved.nonzero()[0])].name
            raise ConsistencyError(f"the statistics of block {block} are frozen in this stage, but they changed")
        has_state = not stage.spec.solve and (stage.spec.optimizer == "adamw" or stage.spec.momentum > 0)
        unchanged = self.runtime.share(self._unchanged(last) if has_state and steps else [])
        if not unchanged or self._skipped_all(len(steps)):
            return
        state, lr = self.strategy.optimizer_state(), stage.lr * max(map(stage.lr_factor, steps))
        for i in self.runtime.share([i for i in unchanged if self._must_change(i, last, state, lr * stage.scales[i])]):
            raise ConsistencyError(f"block {self.chain.blocks[i].name} should train in this stage, but none of its tensors changed")

    def _scale(self) -> float | None:
        """The loss scale of fp16, where there is one."""
        scaler = self.runtime.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def _skipped_all(self, num_steps: int) -> bool:
        """Whether fp16 skipped every step of this start: the loss scale was too large, and was reduced that many times."""
        if self.scale is None:
            return False
        return self._scale() == self.scale * float(self.runtime.accelerator.scaler.get_backoff_factor()) ** num_steps

    def _unchanged(self, last: dict[str, Tensor]) -> list[int]:
        initial = self.strategy.initial_weights
        return [
            i
            for i in range(self.chain.training_from, len(self.chain.blocks))
            if self.runtime.is_main and all(torch.equal(last[name], initial[name].cpu()) for name in self._trained(i))
        ]

    def _trained(self, block: int) -> list[str]:
        """Names of the parameters of a block that train. A stage may train only some: biases and norms, or low-rank updates."""
        return [name for name, parameter in self.chain.parameters_of(block) if parameter.requires_grad]

    def _must_change(self, block: int, last: dict[str, Tensor], state: OptimizerState, lr: float) -> bool:
        """Whether a parameter of the block has no optimizer state, or an update that is clearly larger than rounding."""
        if not self.runtime.is_main:
            return False
        steps = {name: _direction(state[name]) if name in state else None for name in self._trained(block)}
        return any(d is None or not torch.equal(last[name] - lr / SURE * d, last[name]) for name, d in steps.items())


def _direction(state: dict[str, Tensor]) -> Tensor:
    """The update of AdamW or SGD, without the learning rate and Adam's bias correction."""
    momentum = state.get("momentum_buffer")
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8) if momentum is None else momentum


def _checksums(chain: Chain, trained: bool, parameters: bool = True) -> Tensor:
    """(blocks, 2) int64: two sums over the bits of each block's trained (or frozen) tensors on this process.

    The second sum is weighted by position, so that it notices swapped values. Both are 0 for a block without such tensors. A block that
    trains may have frozen parameters. Its buffers count as trained. parameters: False for buffers only.
    """
    rows = []
    for i in range(len(chain.blocks)):
        total = torch.zeros(2, dtype=torch.int64, device=next(chain.parameters()).device)
        own: list[Tensor] = [p for _, p in chain.parameters_of(i) if parameters and p.requires_grad == trained]
        if (i >= chain.training_from) == trained:
            own += [b for _, module in chain.modules_of(i) for b in module.buffers(recurse=False)]
        for tensor in own:
            total = total + _sums(_local(tensor))
        rows.append(total)
    return torch.stack(rows)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the whole tensor if it is not sharded."""
    if hasattr(tensor, "ds_tensor"):
        sharded: Tensor = tensor.ds_tensor.detach()
        return sharded
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _sums(tensor: Tensor) -> Tensor:
    """(2,) int64: the sum of the values' bits, and the sum of bits times position. Summed by rows and columns to avoid an int64 copy."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(whole)
    width = 1024 if bits.numel() >= 1024 else 1
    body, tail = bits[: bits.numel() // width * width].view(-1, width), bits[bits.numel() // width * width :].to(torch.int64)
    rows_R, columns_C = body.sum(1, dtype=torch.int64), body.sum(0, dtype=torch.int64)
    weighted = width * (rows_R * _counted(0, rows_R)).sum() + (columns_C * _counted(1, columns_C)).sum()
    return torch.stack([columns_C.sum() + tail.sum(), weighted + (tail * _counted(body.numel() + 1, tail)).sum()])


def _counted(first: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + len(like), device=like.device)
