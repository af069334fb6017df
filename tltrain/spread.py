"""How one stage's chain and optimizer are spread over processes, and how plain tensors come out of them and go in again.

One process and DDP, FSDP2, and DeepSpeed's ZeRO: three small classes with the same face. What comes out is the same for
all: full tensors under the net's own names, on process 0. So a checkpoint of one world, or of one strategy, is one for all.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tltrain.blocks import Chain, is_batch_norm, unit_classes
from tltrain.errors import UserError
from tltrain.runtime import Runtime

OptimizerState = dict[str, dict[str, Tensor]]
"""The optimizer's state of each parameter, by the net's own name; groups and learning rates follow from the recipe."""


class Spread:
    """One process, or DDP: every process holds all weights."""

    replicated = True

    def __init__(self, runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        """chain: frozen as the stage wants it; it is wrapped here for good, and never used again without its wrapper."""
        self.runtime, self.chain, self.clip = runtime, chain, clip
        self.given = {name: t.detach().clone() for name, t in chain.net.state_dict().items()}
        self.model, self.optimizer = self._prepare(chain, optimizer)
        if runtime.accelerator.scaler is not None:
            runtime.accelerator.scaler.load_state_dict(runtime.fresh_scaler)  # a stage inherits nothing from the last one

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers, which the oldest we support lacks
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.runtime.accelerator.prepare(chain, optimizer)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch: gradients are summed over processes in the last one only."""
        return contextlib.nullcontext() if last else self.runtime.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.runtime.accelerator.backward(loss)

    def step(self) -> Tensor | float | None:
        """Clip, step, forget the gradients. Returns the gradient's norm before clipping, where it is clipped."""
        norm = None
        if self.clip is not None:
            norm = self.runtime.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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

    def settle(self) -> None:
        """Bring every parameter into the form it has between steps."""

    def weights(self) -> dict[str, Tensor]:
        """A copy of the net's state dict in host memory. Collective; complete on process 0, on others it may be empty.

        A frozen tensor is the one that the stage was given: no strategy's cast has touched it.
        """
        self.settle()
        out = {name: t.cpu() for name, t in self.given.items()}
        for name, parameter in self.chain.net.named_parameters():
            if parameter.requires_grad:
                out[name] = self._full(parameter)
        for name, buffer in self.chain.net.named_buffers():
            if name in out:
                out[name] = buffer.detach().to("cpu", copy=True)
        return out

    def optimizer_state(self) -> OptimizerState:
        """Copies in host memory. Collective; complete on process 0."""
        self.settle()
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
        if "scaler" in saved:
            self.runtime.accelerator.scaler.load_state_dict(saved["scaler"])

    def close(self) -> None:
        """Leave nothing of this stage behind in Accelerate: a second prepare beside a first would track both."""
        self.runtime.accelerator.free_memory()
        del self.model, self.optimizer, self.chain

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True) if self.runtime.is_main else torch.empty(0)

    def _like(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        return value.clone() if key == "step" else value.to(parameter.device, copy=True)


class Fsdp2(Spread):
    """PyTorch's fully sharded data parallelism: one unit for each block that is one module."""

    replicated = False

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        # Accelerate wraps by class name, read from this attribute; without it only the root is wrapped.
        chain._no_split_modules = unit_classes(chain)  # type: ignore[assignment]
        return self.runtime.accelerator.prepare(chain, optimizer)

    def warm_up(self, size: int) -> None:
        """Nothing to do: there are no buckets."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def settle(self) -> None:
        """After a forward without backward the root still holds whole parameters, which are other objects than the sharded ones."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _full(self, tensor: Tensor) -> Tensor:
        whole = tensor.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        return whole.to("cpu", copy=True) if self.runtime.is_main else torch.empty(0)

    def _like(self, value: Tensor, parameter: Tensor, key: str) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if key == "step" or not isinstance(parameter, DTensor):
            return value.clone()
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class Zero(Spread):
    """DeepSpeed's ZeRO: its backward steps, it clips by its configuration, and fp32 masters stand in its optimizer."""

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        accelerator = self.runtime.accelerator
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # read for its log alone: we feed the micro-batches ourselves
        settings["gradient_clipping"] = self.clip or 0.0
        self.stage = int(settings["zero_optimization"]["stage"])
        self.replicated = self.stage < 3  # ZeRO-1 and 2 hold all weights, rounded from masters of which each process has a part
        model, prepared = accelerator.prepare(chain, optimizer)
        self._restore(chain, model)
        return model, prepared

    def _restore(self, chain: Chain, engine: nn.Module) -> None:
        """DeepSpeed has rounded the weights to its dtype, and taken an optimizer step on zero gradients to make its state. Undo both."""
        for name, parameter in chain.net.named_parameters():
            if parameter.requires_grad:
                self._put(parameter, self.given[name].to(self.runtime.device, torch.float32), None)
        for name, module in chain.net.named_modules():
            for key, buffer in module._buffers.items():
                path = f"{name}.{key}" if name else key
                if buffer is not None and path in self.given:
                    module._buffers[key] = self.given[path].to(self.runtime.device)
        for state in self._inner(engine.optimizer).state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0

    def warm_up(self, size: int) -> None:
        """Nothing to do, and nothing that could be done: its backward steps."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """In the last micro-batch this also clips and steps."""
        wrapped = self.runtime.accelerator.deepspeed_engine_wrapped
        wrapped.backward(loss, sync_gradients=last)

    def step(self) -> Tensor | float | None:
        norm = self.runtime.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
        return None if self.clip is None else norm

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        inner = self._inner(self._raw_optimizer())
        first: dict[str, Any] = next((state for state in inner.state.values() if state), {})
        moments = [key for key in first if key != "step"]
        out: OptimizerState = {}
        for name, parameter in self.chain.net.named_parameters():
            if parameter.requires_grad and first:
                full = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
                out[name] = {key: value.detach().to("cpu", copy=True).view(self.given[name].shape) for key, value in full.items()}
                if "step" in first:
                    out[name]["step"] = torch.as_tensor(float(first["step"]))
        return out

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        zero: Any = self._raw_optimizer()
        inner, example = self._inner(zero), next(iter(saved.values()), {})
        flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3; ZeRO-1 and 2 keep them in the groups
        for flat in flats or [flat for group in inner.param_groups for flat in group["params"]]:
            state = inner.state[flat]
            for key, value in example.items():
                state[key] = value.clone() if key == "step" else state.get(key, torch.zeros_like(flat))
        self._link()
        for name, parameter in self.chain.net.named_parameters():
            for key, value in saved.get(name, {}).items():
                if key != "step":
                    self._put(parameter, value.to(self.runtime.device), key)

    def close(self) -> None:
        super().close()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

            parameter_offload.FWD_MODULE_STACK.clear()  # its bottom is the whole network, which nothing else takes off
            coordinator: Any = partitioned_param_coordinator.PartitionedParameterCoordinator
            cached = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
            for cell in getattr(cached, "__closure__", None) or ():
                getattr(cell.cell_contents, "cache_clear", int)()  # a cache around a method: it keeps every stage's engine alive

    def _link(self) -> None:
        """ZeRO-1 and 2 let parameters find their state once the first group has taken a step, when later groups have none yet."""
        zero: Any = self._raw_optimizer()
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _put(parameter: Any, value: Tensor, key: str | None) -> None:
        """Set a parameter's fp32 master (key None) or one of its moments, where its part lies on this process."""
        if not hasattr(parameter, "ds_id"):
            parameter.set_full_hp_param(value, key)
            return
        # ZeRO-3's own setter fails where the processes do not divide a parameter evenly.
        zero = parameter._z3_optimizer
        part, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        begin = part.numel() * zero._get_param_partition_rank(parameter)
        piece = value.flatten()[begin : begin + part.numel()]
        part.data[: piece.numel()].copy_(piece)

    def _full(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(tensor)
        return whole.detach().to("cpu", copy=True).view(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape)

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _inner(self, optimizer: Any) -> Any:
        """The torch optimizer inside ZeRO's."""
        return getattr(optimizer, "optimizer", optimizer)


def spread(runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None) -> Spread:
    """Spread a stage as the accelerate configuration says. Raises UserError for a pair that cannot work."""
    kind = str(runtime.accelerator.distributed_type.value)
    classes: dict[str, type[Spread]] = {"FSDP": Fsdp2, "DEEPSPEED": Zero}
    chosen = classes.get(kind, Spread)
    trains_statistics = any(m.training and is_batch_norm(m) for m in chain.net.modules())
    if chosen is not Spread and trains_statistics:
        raise UserError(
            f"norm_stats: train under {kind} is refused: sharded BatchNorm statistics are not those of one batch; "
            "use accelerate_configs/ddp.yaml, or norm_stats: frozen"
        )
    return chosen(runtime, chain, optimizer, clip)
