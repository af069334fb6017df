"""Strategies: how one stage's network and optimizer are distributed over processes.

Three small classes share one interface: one process or DDP, FSDP2, and DeepSpeed's ZeRO. Each returns full tensors under the network's
own names on process 0. A checkpoint therefore loads under any strategy and any number of processes.
"""

from __future__ import annotations

import torch
from accelerate.utils import DynamoBackend

from tltrain.core.errors import UserError
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.strategies.ddp import OptimizerState, Strategy
from tltrain.distributed.strategies.deepspeed import Zero
from tltrain.distributed.strategies.fsdp2 import Fsdp2
from tltrain.models.chain import Chain

__all__ = ["Fsdp2", "OptimizerState", "Strategy", "Zero", "check", "is_sharded", "spread"]


def is_sharded(runtime: Runtime) -> bool:
    """Whether the strategy shards or rounds the network that is passed to it."""
    return _kind(runtime) is not Strategy


def _kind(runtime: Runtime) -> type[Strategy]:
    classes: dict[str, type[Strategy]] = {"FSDP": Fsdp2, "DEEPSPEED": Zero}
    return classes.get(str(runtime.accelerator.distributed_type.value), Strategy)


def spread(runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None, compiled: bool = False) -> Strategy:
    """Wrap a stage's chain and optimizer in the strategy that the accelerate configuration names.

    chain: already frozen for the stage. clip: largest norm of the gradient, or None.
    """
    return _kind(runtime)(runtime, chain, optimizer, clip, compiled)


def check(runtime: Runtime, trains_statistics: bool, compiled: bool) -> None:
    """Raises UserError where the strategy does not support a choice. trains_statistics: a stage has `norm_stats: train`."""
    kind, chosen = str(runtime.accelerator.distributed_type.value), _kind(runtime)
    plugin = getattr(runtime.accelerator.state, "fsdp_plugin", None)  # there only under FSDP
    if plugin is not None and plugin.activation_checkpointing:
        raise UserError(
            "the accelerate configuration sets fsdp_activation_checkpointing; remove it and pass --recompute: it works under any strategy"
        )
    backend = runtime.accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise UserError(
            f"the accelerate configuration sets dynamo_backend to {backend.value}; remove it (and ACCELERATE_DYNAMO_BACKEND): "
            "--compile alone decides whether a network is compiled"
        )
    if compiled and chosen is Zero:
        raise UserError("--compile does not work under DeepSpeed: its hooks gather weights inside a graph; drop it, or use ddp.yaml")
    if chosen is not Strategy and trains_statistics:
        raise UserError(
            f"norm_stats: train does not work under {kind}: BatchNorm statistics would differ from those of one batch; "
            "use accelerate_configs/ddp.yaml, or norm_stats: frozen"
        )
