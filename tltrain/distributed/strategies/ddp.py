"""One process, or DDP; and what every strategy shares: plain tensors come out under the net's own names, and go in again."""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.distributed.runtime import Runtime
from tltrain.models.chain import Chain

OptimizerState = dict[str, dict[str, Tensor]]
"""The optimizer's state of each parameter, by the net's own name; groups and learning rates follow from the recipe."""


class Strategy:
    """One process, or DDP: every process holds all weights."""

    replicated = True
    channels_last = True
    """Whether weights lie as images do, so that convolutions need not turn them in every step; what is sharded must be contiguous."""
    fuses_sgd = True
    """Whether torch has a fused SGD for the tensors of this strategy."""

    def __init__(
        self, runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None, compiled: bool = False
    ) -> None:
        """chain: frozen as the stage wants it; it is wrapped here for good, and never used again without its wrapper.

        compiled: by torch.compile, in place, so that no name changes; a graph for each shape of a batch, whatever came before it.
        """
        self.runtime, self.chain, self.clip = runtime, chain, clip
        # Kept in host memory: the device has none to spare.
        self.initial_weights = {name: t.detach().to("cpu", copy=True) for name, t in chain.net.state_dict().items()}
        self.forgotten: set[str] = set()
        chain.to(memory_format=chain.layout if self.channels_last else torch.contiguous_format)
        if isinstance(optimizer, torch.optim.SGD) and (runtime.accelerator.scaler is not None or not self.fuses_sgd):
            optimizer = _plain(optimizer)
        self.model, self.optimizer = self._prepare(chain, optimizer)
        self.compiled = compiled
        if compiled:
            chain.compile(dynamic=False, options={"fallback_random": True})  # dropout draws what it draws uncompiled
        if runtime.accelerator.scaler is not None:
            runtime.accelerator.scaler.load_state_dict(runtime.fresh_scaler)  # a stage inherits nothing from the last one
            runtime.accelerator.scaler._per_optimizer_states.clear()  # nor from a step that an error of memory broke off

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers, which the oldest we support lacks
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.runtime.accelerator.prepare(chain, optimizer)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: gradients are summed over processes in the last one only."""
        return contextlib.nullcontext() if last else self.runtime.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.runtime.accelerator.scaler is None:
            loss.backward()  # all that Accelerate would do here, without its looking for packages in every step
        else:
            self.runtime.accelerator.backward(loss)

    def step(self) -> Tensor | float | None:
        """Clip, step, forget the gradients. Returns the gradient's norm before clipping, where it is clipped."""
        norm = None
        if self.clip is not None:
            norm = self.runtime.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        optimizer = self._raw_optimizer() if self.runtime.accelerator.scaler is None else self.optimizer  # as in backward
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def warm_up(self, size: int) -> None:
        """One backward whose gradients are thrown away: DDP orders its buckets anew after its first, and a resumed run would add up
        in another order than one that was never stopped. In eval mode, so that no statistic moves."""
        if self.runtime.world == 1:
            return
        self.model.eval()
        images = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=self.runtime.device)
        (self.model(images).float().sum() * 0).backward()
        self.model.zero_grad(set_to_none=True)
        self.model.train()

    def reshard(self) -> None:
        """Bring every parameter into the form it has between steps."""

    def weights(self) -> dict[str, Tensor]:
        """A copy of the net's state dict in host memory. Collective; complete on process 0, on others it may be empty.

        A frozen tensor is the one that the stage was given: no strategy's cast has touched it.
        """
        self.reshard()
        out = dict(self.initial_weights)
        for name, parameter in self.chain.net.named_parameters():
            if parameter.requires_grad:
                out[name] = self._full(parameter)
        for name, buffer in self.chain.net.named_buffers():
            if name in out and name not in self.forgotten:
                out[name] = _on_host(buffer)
        return out

    def forget(self, first: int) -> None:
        """Free the weights of the frozen blocks before `first` on the device: all that could be asked of them is stored."""
        for i in range(first):
            buffers = ((f"{name}.{key}", b) for name, module in self.chain.modules_of(i) for key, b in module.named_buffers(recurse=False))
            for name, tensor in (*self.chain.parameters_of(i), *buffers):
                tensor.data = tensor.data.new_empty(0)
                self.forgotten.add(name)

    def optimizer_state(self) -> OptimizerState:
        """Copies in host memory. Collective; complete on process 0."""
        self.reshard()
        return {
            name: {key: self._full(value) if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}
            for name, parameter in self.chain.net.named_parameters()
            if (state := self._raw_optimizer().state.get(parameter))
        }

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Put saved state in. Every process gives the whole of it."""
        optimizer = self._raw_optimizer()
        for name, parameter in self.chain.net.named_parameters():
            if name in saved:
                optimizer.state[parameter] = {key: self._like(value, parameter, key) for key, value in saved[name].items()}

    def extra(self) -> dict[str, Any]:
        """The loss scale of fp16, where there is one."""
        scaler = self.runtime.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def load_extra(self, saved: dict[str, Any]) -> None:
        if "scaler" in saved and self.runtime.accelerator.scaler is not None:  # it may go on in another precision
            self.runtime.accelerator.scaler.load_state_dict(saved["scaler"])

    def close(self) -> None:
        """Leave nothing of this stage behind in Accelerate: a second prepare beside a first would track both."""
        del self.model, self.optimizer, self.chain
        if self.compiled:
            torch.compiler.reset()  # what is compiled holds the network
        if self.runtime.device.type == "cuda" or type(self) is not Strategy:
            self.runtime.accelerator.free_memory()
        else:  # its collection of garbage goes through all that was ever imported, and host memory can wait for the next one
            gc.freeze()
            self.runtime.accelerator.free_memory()
            gc.unfreeze()

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def _full(self, tensor: Tensor) -> Tensor:
        return _on_host(tensor) if self.runtime.is_main else torch.empty(0)

    def _like(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        """Saved state as the optimizer keeps it: a moment lies in memory as its parameter does, which fused kernels demand."""
        if key == "step":
            return step_like(value, parameter, self._raw_optimizer())
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _plain(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Not fused: where fp16's loss scale is too large for the first step, torch's fused SGD leaves its momentum uninitialised."""
    groups = [group | {"fused": False} for group in optimizer.param_groups]
    return torch.optim.SGD(groups, lr=optimizer.defaults["lr"], fused=False)


def step_like(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A saved count of steps as the optimizer keeps it: beside its parameter where it is fused, else in host memory."""
    return value.to(parameter.device if optimizer.defaults["fused"] else "cpu", copy=True)


def _on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy, as files and other programs expect it."""
    return tensor.detach().to("cpu", copy=True).contiguous()
