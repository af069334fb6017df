"""Which parameters of the blocks that train have gradients: all, biases and norms, or low-rank updates. The head always trains whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from tltrain.core.errors import UserError
from tltrain.core.stage_plan import StagePlan
from tltrain.data.sampler import derive_seed
from tltrain.models.chain import Chain, under
from tltrain.training.weights import lora


def freeze(chain: Chain, stage: StagePlan) -> None:
    """Freeze the blocks and parameters that a stage does not train, and BatchNorm statistics unless it updates them.

    A stage with trains: lora leaves only the head trainable here. `add_updates` adds what else trains.
    """
    chain.freeze(stage.first_trainable_block, norm_stats=stage.spec.norm_stats == "train")
    for i in range(stage.first_trainable_block, len(chain.blocks)):
        trained = {id(parameter) for _, parameter in _own(chain, i, stage)}
        for _, parameter in chain.parameters_of(i):
            parameter.requires_grad_(id(parameter) in trained)


def add_updates(chain: Chain, stage: StagePlan, seed: int) -> Chain:
    """Attach the low-rank updates of a stage with trains: lora, in place. Returns the same chain. seed: the recipe's."""
    if stage.spec.trains != "lora":
        return chain
    return lora.attach(chain, stage.first_trainable_block, stage.spec, derive_seed(seed, "lora", stage.index), behind_map(chain, stage))


def count(chain: Chain, index: int, stage: StagePlan) -> int:
    """Number of parameters of a block that a stage trains. chain: without low-rank updates, and without a linear map."""
    if index < stage.first_trainable_block:
        return 0
    if stage.features is not None and _is_head(chain, index):
        return stage.features.num_out * (stage.features.num_in + 1)
    has_updates = stage.spec.trains == "lora" and not _is_head(chain, index)
    added = lora.num_parameters(chain, index, stage.spec.lora_rank, behind_map(chain, stage)) if has_updates else 0
    return added + sum(parameter.numel() for _, parameter in _own(chain, index, stage))


def describe(chain: Chain, stage: StagePlan) -> str:
    """A short description of the trainable parameters below the head, for the plan's table. chain: without low-rank updates."""
    if stage.spec.trains != "lora":
        return stage.spec.trains.replace("_", " ")
    num_layers = sum(1 for i in _below_head(chain, stage) for _ in lora.layers(chain, i, behind_map(chain, stage)))
    return f"lora, rank {stage.spec.lora_rank}, {num_layers} layers"


def check(chain: Chain, plan: Sequence[StagePlan]) -> None:
    """Check that each stage has something to train as its `trains` says. Raises UserError."""
    for stage in plan:
        told, blocks = f"stage {stage.spec.name} has trains: {stage.spec.trains}", _below_head(chain, stage)
        if stage.spec.trains == "all":
            continue
        if not blocks:
            raise UserError(f"{told}, and only its head trains, which trains whole; set trains: all, or unfreeze more blocks")
        if not any(count(chain, i, stage) for i in blocks):
            what = "linear layer or 1x1 convolution" if stage.spec.trains == "lora" else "bias or norm"
            raise UserError(f"{told}, and its blocks below the head have no {what}; unfreeze more blocks, or set trains: all")


def behind_map(chain: Chain, stage: StagePlan) -> tuple[str, ...]:
    """Paths of what a stage that learns a teacher's map leaves as it is: what the student's pooled features alone pass."""
    maps = None if stage.features is None or stage.features.side is None else chain.blocks[-2].last_map
    return () if maps is None else maps.behind


def _own(chain: Chain, index: int, stage: StagePlan) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a block that is not frozen which train themselves."""
    behind = behind_map(chain, stage)
    return ((name, parameter) for name, parameter in _as_named(chain, index, stage) if not under(name, behind))


def _as_named(chain: Chain, index: int, stage: StagePlan) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a block that `trains` names."""
    if stage.spec.trains == "all" or _is_head(chain, index):
        yield from chain.parameters_of(index)
    elif stage.spec.trains == "biases_and_norms":
        of_norms = {id(p) for _, m in chain.modules_of(index) if _is_norm(m) for p in m.parameters(recurse=False)}
        for name, parameter in chain.parameters_of(index):
            if name.endswith("bias") or id(parameter) in of_norms:
                yield name, parameter


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer. Libraries have their own (LayerNorm2d, RMSNorm, GRN), mostly derived from torch's."""
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__) and all(p.ndim == 1 for p in module.parameters(False))


def _is_head(chain: Chain, index: int) -> bool:
    return index == len(chain.blocks) - 1


def _below_head(chain: Chain, stage: StagePlan) -> range:
    return range(stage.first_trainable_block, len(chain.blocks) - 1)
