"""The base strategy: one process or DDP. All strategies share its interface, which exchanges plain tensors by the network's own names."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.distributed.runtime import Runtime
from tltrain.models.chain import Chain, is_batch_norm

OptimizerState = dict[str, dict[str, Tensor]]
"""The optimizer's state of each parameter, by the network's own parameter name. Groups and learning rates follow from the recipe."""


class Strategy:
    """One process, or DDP: every process holds all weights."""

    replicated = True
    """Whether every process holds all weights."""
    channels_last = True
    """Whether weights are kept in the chain's memory format (channels last), which saves a conversion in every convolution. Sharded weights
    must be contiguous."""
    fuses_sgd = True
    """Whether torch's fused SGD supports this strategy's tensors."""

    def __init__(
        self, runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None, compiled: bool = False
    ) -> None:
        """chain: already frozen for the stage. It is wrapped here; do not call it without its wrapper afterwards.

        compiled: whether torch.compile compiles it in place, so that no name changes. Each batch shape gets a graph of its own.
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
            chain.compile(dynamic=False, options={"fallback_random": True})  # dropout masks as in eager mode
        if runtime.accelerator.scaler is not None:
            runtime.accelerator.scaler.load_state_dict(runtime.fresh_scaler)  # each stage starts with a fresh loss scale
            runtime.accelerator.scaler._per_optimizer_states.clear()  # and without the state of a step that ran out of memory

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers; the oldest supported torch lacks the new name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.runtime.accelerator.prepare(chain, optimizer)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one micro-batch. Gradients are reduced over processes in the last one only."""
        return contextlib.nullcontext() if last else self.runtime.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.runtime.accelerator.scaler is None:
            loss.backward()  # as Accelerate does, without its search for installed packages in every step
        else:
            self.runtime.accelerator.backward(loss)

    def step(self) -> Tensor | float | None:
        """Clip the gradient, update the weights, clear the gradients. Returns the norm before clipping; None without `clip`."""
        norm = None
        if self.clip is not None:
            norm = self.runtime.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        optimizer = self._raw_optimizer() if self.runtime.accelerator.scaler is None else self.optimizer  # as in backward
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def warm_up(self, size: int) -> None:
        """Run one backward pass on an image (1, 3, size, size) of zeros and discard the gradients.

        DDP rebuilds its buckets after its first backward pass. Without this, a resumed run would sum gradients in another order than a run
        that was never stopped. The pass runs in eval mode, so that BatchNorm statistics stay as they are.
        """
        if self.runtime.world == 1:
            return
        self.model.eval()
        images = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=self.runtime.device)
        (self.model(images).float().sum() * 0).backward()
        self.model.zero_grad(set_to_none=True)
        self.model.train()

    def reshard(self) -> None:
        """Return every parameter to the form that it has between steps. Only FSDP2 has something to do."""

    def weights(self, everywhere: bool = False) -> dict[str, Tensor]:
        """A copy of the network's state dict in host memory. Collective. It is complete on process 0; tensors on others may be empty.

        Frozen tensors are the stage's initial ones, without any strategy's cast. everywhere: make it complete on every process.
        """
        self.reshard()
        out = dict(self.initial_weights)
        for name, parameter in self.chain.net.named_parameters():
            if parameter.requires_grad:
                out[name] = self._full(parameter, everywhere)
        for name, buffer in self.chain.net.named_buffers():
            if name in out and name not in self.forgotten:
                out[name] = _on_host(buffer)
        return out

    def trained_values(self) -> list[Tensor]:
        """Tensors that the optimizer updates, in this process's own layout, then BatchNorm statistics that train. No copies.

        Change them in place between steps, and call `refresh` afterwards.
        """
        self.reshard()
        return [*self._master_weights(), *self._statistics.values()]

    def refresh(self) -> None:
        """Make the network use the values that `trained_values` has now. Collective. Only ZeRO keeps copies of them."""

    def trained(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a state dict that this stage trains, BatchNorm statistics included."""
        names = [name for name, parameter in self.chain.net.named_parameters() if parameter.requires_grad]
        return {name: weights[name] for name in (*names, *self._statistics)}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Set what this stage trains to the tensors of these names. Every process passes all of them. Collective."""
        self.reshard()
        for name, parameter in self.chain.net.named_parameters():
            if parameter.requires_grad:
                self._set(parameter, weights[name])
        for name, statistic in self._statistics.items():
            statistic.copy_(weights[name])
        self.refresh()

    def _master_weights(self) -> list[Tensor]:
        return [_local(parameter) for parameter in self.chain.net.parameters() if parameter.requires_grad]

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        """The running means and variances that this stage updates, by name. Found once: an average asks for them at each step."""
        chain = self.chain
        if not chain.norm_stats:
            return {}
        modules = [m for i in range(chain.training_from, len(chain.blocks)) for m in chain.modules_of(i) if is_batch_norm(m[1])]
        statistics = ((f"{name}.{key}", b) for name, m in modules for key, b in m.named_buffers(recurse=False) if b.is_floating_point())
        return dict(statistics)

    def _set(self, parameter: Tensor, value: Tensor) -> None:
        _local(parameter).copy_(_local(self._like(value, parameter, "")))

    def forget(self, first: int) -> None:
        """Free the device memory of the frozen blocks before `first`. Call it where their features are all cached."""
        for i in range(first):
            buffers = ((f"{name}.{key}", b) for name, module in self.chain.modules_of(i) for key, b in module.named_buffers(recurse=False))
            for name, tensor in (*self.chain.parameters_of(i), *buffers):
                tensor.data = tensor.data.new_empty(0)
                self.forgotten.add(name)

    def optimizer_state(self) -> OptimizerState:
        """Copies in host memory. Collective. Complete on process 0."""
        self.reshard()
        return {
            name: {key: self._full(value) if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}
            for name, parameter in self.chain.net.named_parameters()
            if (state := self._raw_optimizer().state.get(parameter))
        }

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Load saved state. Every process passes all of it."""
        optimizer = self._raw_optimizer()
        for name, parameter in self.chain.net.named_parameters():
            if name in saved:
                optimizer.state[parameter] = {key: self._like(value, parameter, key) for key, value in saved[name].items()}

    def extra(self) -> dict[str, Any]:
        """State beyond the optimizer's: the loss scale of fp16, or nothing."""
        scaler = self.runtime.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def load_extra(self, saved: dict[str, Any]) -> None:
        if "scaler" in saved and self.runtime.accelerator.scaler is not None:  # a run may resume in another precision
            self.runtime.accelerator.scaler.load_state_dict(saved["scaler"])

    def close(self) -> None:
        """Release the stage's model and optimizer, also from Accelerate, which would otherwise keep them beside the next stage's."""
        del self.model, self.optimizer, self.chain
        if self.compiled:
            torch.compiler.reset()  # compiled graphs keep the network alive
        if self.runtime.device.type == "cuda" or type(self) is not Strategy:
            self.runtime.accelerator.free_memory()
        else:  # Accelerate calls gc.collect(), slow with all imported modules; frozen, it skips them, and a later collection frees the rest
            gc.freeze()
            self.runtime.accelerator.free_memory()
            gc.unfreeze()

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def _full(self, tensor: Tensor, everywhere: bool = False) -> Tensor:
        return _on_host(tensor) if self.runtime.is_main or everywhere else torch.empty(0)

    def _like(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        """Saved state in the optimizer's layout. A moment has its parameter's memory format, as fused kernels require."""
        if key == "step":
            return step_like(value, parameter, self._raw_optimizer())
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _plain(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The same optimizer, not fused. torch's fused SGD leaves its momentum uninitialised where fp16 skips the first step."""
    groups = [group | {"fused": False} for group in optimizer.param_groups]
    return torch.optim.SGD(groups, lr=optimizer.defaults["lr"], fused=False)


def step_like(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A saved step count where the optimizer expects it: on the parameter's device if it is fused, else in host memory."""
    return value.to(parameter.device if optimizer.defaults["fused"] else "cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the whole tensor if it is not sharded. Shares memory, and is no part of autograd."""
    whole: Any = tensor.detach()
    local: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return local


def _on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, as files and other programs expect it."""
    return tensor.detach().to("cpu", copy=True).contiguous()
