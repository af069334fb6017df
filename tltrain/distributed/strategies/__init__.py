"""How one stage's chain and optimizer are spread over processes, and how plain tensors come out of them and go in again.

One process and DDP, FSDP2, and DeepSpeed's ZeRO: three small classes with the same face. What comes out is the same for
all: full tensors under the net's own names, on process 0. So a checkpoint of one world, or of one strategy, is one for all.
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
    """Whether a strategy leaves the network that it is given not whole, or rounded."""
    return _kind(runtime) is not Strategy


def _kind(runtime: Runtime) -> type[Strategy]:
    classes: dict[str, type[Strategy]] = {"FSDP": Fsdp2, "DEEPSPEED": Zero}
    return classes.get(str(runtime.accelerator.distributed_type.value), Strategy)


def spread(runtime: Runtime, chain: Chain, optimizer: torch.optim.Optimizer, clip: float | None, compiled: bool = False) -> Strategy:
    """Spread a stage as the accelerate configuration says."""
    return _kind(runtime)(runtime, chain, optimizer, clip, compiled)


def check(runtime: Runtime, trains_statistics: bool, compiled: bool) -> None:
    """Raises UserError for a pair of strategy and choice that cannot work. trains_statistics: a stage moves BatchNorm's."""
    kind, chosen = str(runtime.accelerator.distributed_type.value), _kind(runtime)
    plugin = getattr(runtime.accelerator.state, "fsdp_plugin", None)  # there only under FSDP
    if plugin is not None and plugin.activation_checkpointing:
        raise UserError(
            "the accelerate configuration sets fsdp_activation_checkpointing; remove it: whether activations are computed again is said by "
            "--recompute, under every strategy"
        )
    backend = runtime.accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise UserError(
            f"the accelerate configuration sets dynamo_backend to {backend.value}; remove it (and ACCELERATE_DYNAMO_BACKEND): "
            "whether a network is compiled is said by --compile"
        )
    if compiled and chosen is Zero:
        raise UserError("--compile under DeepSpeed is refused: its hooks gather weights in the middle of a graph; drop it, or use ddp.yaml")
    if chosen is not Strategy and trains_statistics:
        raise UserError(
            f"norm_stats: train under {kind} is refused: sharded BatchNorm statistics are not those of one batch; "
            "use accelerate_configs/ddp.yaml, or norm_stats: frozen"
        )
