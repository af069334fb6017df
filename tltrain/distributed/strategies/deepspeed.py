"""DeepSpeed's ZeRO: shards optimizer state and gradients, and in stage 3 also weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.distributed.strategies.ddp import OptimizerState, Strategy, step_like
from tltrain.models.chain import Chain


class Zero(Strategy):
    """DeepSpeed's ZeRO. Its last backward call also clips and steps, and its optimizer holds fp32 master weights."""

    channels_last = False

    def _prepare(self, chain: Chain, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        accelerator = self.runtime.accelerator
        # The configuration is complete only now: the recipe owns the batch and the clipping, and each stage may clip otherwise.
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed requires it, for its log only
        settings["gradient_clipping"] = self.clip or 0.0
        self.stage = int(settings["zero_optimization"]["stage"])
        self.replicated = self.stage < 3  # ZeRO-1 and 2 keep all weights, rounded from sharded fp32 masters
        model, prepared = accelerator.prepare(chain, optimizer)
        self._restore(chain, model)
        return model, prepared

    def _restore(self, chain: Chain, engine: nn.Module) -> None:
        """Undo two effects of DeepSpeed's set-up: weights rounded to its dtype, and an optimizer step on zero gradients."""
        # Trained weights live in sharded fp32 masters: those get the exact values, and the rounded copies follow from them.
        for name, parameter in chain.net.named_parameters():
            if parameter.requires_grad:
                self._put(parameter, self.initial_weights[name].to(self.runtime.device, torch.float32), None)
        # Buffers have no masters. Batch-norm statistics must not be rounded: val is evaluated with them.
        for name, module in chain.net.named_modules():
            for key, buffer in module._buffers.items():
                path = f"{name}.{key}" if name else key
                if buffer is not None and path in self.initial_weights:
                    module._buffers[key] = self.initial_weights[path].to(self.runtime.device, copy=True)
        # DeepSpeed allocates the moments by a step on zero gradients. It is undone here.
        for state in self._inner(engine.optimizer).state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0

    def warm_up(self, size: int) -> None:
        """Does nothing: a backward pass would also update the weights."""

    def forget(self, first: int) -> None:
        """Does nothing: in stage 3 a process holds its shard only, and in stages 1 and 2 DeepSpeed keeps views of the weights."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass. For the last micro-batch it also clips and updates the weights."""
        # The engine counts micro-batches of its own; sync_gradients tells it instead which one is the last of the step.
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
                out[name] = {key: value.detach().to("cpu", copy=True).view(self.initial_weights[name].shape) for key, value in full.items()}
                if "step" in first:
                    out[name]["step"] = torch.as_tensor(float(first["step"]))
        return out

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        zero: Any = self._raw_optimizer()
        inner, example = self._inner(zero), next(iter(saved.values()), {})
        # State that the optimizer has not made yet begins as zeros. Below it is filled, parameter by parameter.
        flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3; ZeRO-1 and 2 keep them in the groups
        for flat in flats or [flat for group in inner.param_groups for flat in group["params"]]:
            state = inner.state[flat]
            for key, value in example.items():
                state[key] = step_like(value, flat, inner) if key == "step" else state.get(key, torch.zeros_like(flat))
        self._link()
        for name, parameter in self.chain.net.named_parameters():
            for key, value in saved.get(name, {}).items():
                if key != "step":
                    self._put(parameter, value.to(self.runtime.device), key)

    def _master_weights(self) -> list[Tensor]:
        """The flat shards of the fp32 masters. Those of parameters, gathered in any form, are only rounded copies."""
        zero: Any = self._raw_optimizer()
        shards: list[Tensor] = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return [shard.detach() for shard in shards]

    def refresh(self) -> None:
        """Round the masters into the network's weights, as DeepSpeed does at the end of a step."""
        zero: Any = self._raw_optimizer()
        if self.stage < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones stay gathered between steps
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _set(self, parameter: Tensor, value: Tensor) -> None:
        self._put(parameter, value.to(self.runtime.device, torch.float32), None)

    def close(self) -> None:
        super().close()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

            parameter_offload.FWD_MODULE_STACK.clear()  # a global list that still holds the network
            coordinator: Any = partitioned_param_coordinator.PartitionedParameterCoordinator
            cached = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
            for cell in getattr(cached, "__closure__", None) or ():
                getattr(cell.cell_contents, "cache_clear", int)()  # a method's cache that keeps every stage's engine alive

    def _link(self) -> None:
        """Link parameters to their optimizer state again: ZeRO-1 and 2 do so after the first group's step, too early for later groups."""
        zero: Any = self._raw_optimizer()
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _put(parameter: Any, value: Tensor, key: str | None) -> None:
        """Set this process's shard of a parameter's fp32 master (key None) or of one of its moments."""
        if not hasattr(parameter, "ds_id"):
            parameter.set_full_hp_param(value, key)
            return
        # ZeRO-3's own setter fails where a parameter's size is no multiple of the number of processes.
        zero = parameter._z3_optimizer
        part, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        own = getattr(zero, "_get_param_partition_rank", None)  # of later versions, which can part each parameter in its own way
        begin = part.numel() * (own(parameter) if own is not None else torch.distributed.get_rank(zero.dp_process_group))
        piece = value.flatten()[begin : begin + part.numel()]
        part.data[: piece.numel()].copy_(piece)

    def _full(self, tensor: Tensor, everywhere: bool = False) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(tensor)
        return whole.detach().to("cpu", copy=True).view(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape)

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _inner(self, optimizer: Any) -> Any:
        """The torch optimizer inside ZeRO's."""
        return getattr(optimizer, "optimizer", optimizer)
