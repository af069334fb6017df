"""Proof, while it runs, that a stage trains what it says and that replicas are one network.

The bugs this catches give no error of their own: a parameter that DDP does not synchronise drifts apart silently, and
one that an optimizer does not know is silently never trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tltrain.core.stage_plan import StagePlan
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.strategies import OptimizerState, Strategy
from tltrain.models.chain import Chain

SURE = 64
"""How many times larger than rounding a step must be to count as one that changes a weight: Adam's corrections for young averages take
at most a factor of 7 from it, and a gradient may have come when the learning rate was already lower than at its highest."""


class ConsistencyError(RuntimeError):
    """What trains is not what the stage says, or not the same on all processes."""


class Guard:
    """One stage's checks. Built before its first step."""

    def __init__(self, runtime: Runtime, spread: Strategy) -> None:
        self.runtime, self.spread, self.chain = runtime, spread, spread.chain
        self.frozen = _checksums(self.chain, trained=False)
        self.buffers = _checksums(self.chain, trained=True, parameters=False)
        self.scale = self._scale()

    def replicas(self, step: int) -> None:
        """Raise Broken, on every process, where what each of them has whole of a training block differs between processes: its
        parameters, unless they are sharded, and its buffers, which no strategy shards. Collective."""
        if self.runtime.world == 1:
            return
        sums_RN2 = self.runtime.gather(_checksums(self.chain, trained=True, parameters=self.spread.replicated).unsqueeze(0))
        differs_N = (sums_RN2 != sums_RN2[:1]).any(2).any(0)
        if differs_N.any():
            block = self.chain.blocks[int(differs_N.nonzero()[0])].name
            ranks = (sums_RN2 != sums_RN2[:1]).any(2).any(1).nonzero().flatten().tolist()
            raise ConsistencyError(f"after step {step} block {block} is not the same on all processes (ranks {ranks} differ from rank 0)")

    def finish(self, last: dict[str, Tensor], stage: StagePlan, steps: range) -> None:
        """At the end of a stage: frozen tensors are untouched, statistics that do not train as well, and every block that should train
        has changed. Collective.

        last: the weights after the `steps` of this start (complete on process 0). A block may stay as it was where the optimizer's
        state says that its gradients were zero, or that its steps drown in rounding. SGD without momentum keeps no such state.
        """
        self.spread.reshard()
        changed = (_checksums(self.chain, trained=False) != self.frozen).any(1)
        if changed.any():
            block = self.chain.blocks[int(changed.nonzero()[0])].name
            raise ConsistencyError(f"block {block} is frozen in this stage, and changed")
        moved = (_checksums(self.chain, trained=True, parameters=False) != self.buffers).any(1)
        if moved.any() and not self.chain.norm_stats:
            block = self.chain.blocks[int(moved.nonzero()[0])].name
            raise ConsistencyError(f"the statistics of block {block} are frozen in this stage, and changed")
        knows = stage.spec.optimizer == "adamw" or stage.spec.momentum > 0
        still = self.runtime.share(self._unchanged(last) if knows and steps else [])
        if not still or self._left_out(len(steps)):
            return
        state, lr = self.spread.optimizer_state(), stage.spec.lr * max(map(stage.lr_factor, steps))
        for i in self.runtime.share([i for i in still if self._must_move(i, last, state, lr * stage.scales[i])]):
            raise ConsistencyError(f"block {self.chain.blocks[i].name} should train in this stage, and not one of its tensors changed")

    def _scale(self) -> float | None:
        """The loss scale of fp16, where there is one."""
        scaler = self.runtime.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def _left_out(self, num_steps: int) -> bool:
        """Whether fp16 has left out every step of this start: the loss scale was too large, and made smaller, that many times."""
        if self.scale is None:
            return False
        return self._scale() == self.scale * float(self.runtime.accelerator.scaler.get_backoff_factor()) ** num_steps

    def _unchanged(self, last: dict[str, Tensor]) -> list[int]:
        given = self.spread.initial_weights
        return [
            i
            for i in range(self.chain.training_from, len(self.chain.blocks))
            if self.runtime.is_main and all(torch.equal(last[name], given[name].cpu()) for name, _ in self.chain.parameters_of(i))
        ]

    def _must_move(self, block: int, last: dict[str, Tensor], state: OptimizerState, lr: float) -> bool:
        """Whether the optimizer does not know a parameter of a block, or has a step for it that rounding could not swallow."""
        if not self.runtime.is_main:
            return False
        steps = {name: _direction(state[name]) if name in state else None for name, _ in self.chain.parameters_of(block)}
        return any(d is None or not torch.equal(last[name] - lr / SURE * d, last[name]) for name, d in steps.items())


def _direction(state: dict[str, Tensor]) -> Tensor:
    """A step of AdamW or SGD, but for the learning rate and Adam's corrections for young averages."""
    momentum = state.get("momentum_buffer")
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8) if momentum is None else momentum


def _checksums(chain: Chain, trained: bool, parameters: bool = True) -> Tensor:
    """(blocks, 2) int64: of each block's trained (or frozen) tensors as they lie on this process, two sums over their bits, the
    second weighted by position so that swapped values show. Zero for a block with none. parameters: False for its buffers alone."""
    rows = []
    for i in range(len(chain.blocks)):
        total = torch.zeros(2, dtype=torch.int64, device=next(chain.parameters()).device)
        if (i >= chain.training_from) == trained:
            buffers = (b for name, module in chain.modules_of(i) for b in module.buffers(recurse=False))
            for tensor in (*(p for _, p in chain.parameters_of(i) if parameters), *buffers):
                total = total + _sums(_local(tensor))
        rows.append(total)
    return torch.stack(rows)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this process."""
    if hasattr(tensor, "ds_tensor"):
        sharded: Tensor = tensor.ds_tensor.detach()
        return sharded
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _sums(tensor: Tensor) -> Tensor:
    """Sum of the bits of each value, and sum of bits times position: by rows and columns, so that no copy in int64 is made."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(whole)
    width = 1024 if bits.numel() >= 1024 else 1
    body, tail = bits[: bits.numel() // width * width].view(-1, width), bits[bits.numel() // width * width :].to(torch.int64)
    rows_R, columns_C = body.sum(1, dtype=torch.int64), body.sum(0, dtype=torch.int64)
    weighted = width * (rows_R * _counted(0, rows_R)).sum() + (columns_C * _counted(1, columns_C)).sum()
    return torch.stack([columns_C.sum() + tail.sum(), weighted + (tail * _counted(body.numel() + 1, tail)).sum()])


def _counted(first: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + len(like), device=like.device)
