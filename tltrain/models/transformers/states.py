"""Tensors of transformers' networks, read through `from_pretrained`: names in files differ from those of modules, and between versions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tltrain.core.errors import UserError
from tltrain.models.hf_hub import quiet
from tltrain.models.transformers import configs, networks
from tltrain.models.weight_files.names import listed

_MOST_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class State:
    """Tensors under a network's names."""

    tensors: dict[str, Tensor]
    """Without a head where the weights have none."""
    notes: tuple[str, ...]
    """Lines for the user on what was left out or is new."""


def from_folder(folder: Path, values: Mapping[str, Any]) -> State:
    """The tensors in a save_pretrained folder, in its dtype, for the network of a configuration. Raises UserError."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors file; other formats may run code; give the path of a weights file itself")
    return _read(str(folder), values, str(folder), None)


def from_tensors(state: dict[str, Tensor], values: Mapping[str, Any], origin: str) -> State:
    """As `from_folder`, from tensors under any names that transformers knows, with or without the prefix of the backbone."""
    return _read(None, values, origin, state)


def resized(state: Mapping[str, Tensor], values: Mapping[str, Any], size: int, origin: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Position embeddings interpolated once for images of `size` pixels: (the state dict, lines for the user). Raises UserError.

    Bicubic and in fp32. Tokens in front, such as that of the class, are kept.
    """
    was = configs.side_of(configs.made(values, origin))
    want = shapes(configs.with_side(values, size), origin)
    own = shapes(values, origin)
    changed = [name for name in state if name in own and own[name] != want[name]]
    if other := [name for name in changed if "position" not in name or "relative" in name]:
        raise UserError(
            f"data.size is {size}, and {', '.join(other[:2])} of {origin} are for images of {was} pixels alone; "
            f"set data.size to {was} or null"
        )
    new = {name: _interpolated(name, state[name], tuple(want[name]), origin) for name in changed}
    return {**state, **new}, (f"position embeddings interpolated from {was} to {size} px",) if new else ()


def check_side(values: Mapping[str, Any], size: int, origin: str) -> None:
    """Raise UserError for images of a size that the network cannot take, or that its patches do not divide while it has positions."""
    config = configs.made(values, origin)
    patch, side = configs.patch_of(config), configs.side_of(config)
    assert side is not None, "a card's configuration says it"
    if size % patch and shapes(values, origin) != shapes(configs.with_side(values, 2 * side), origin):
        near = " or ".join(str(n * patch) for n in (size // patch, size // patch + 1) if n)
        raise UserError(f"data.size is {size}, which the patch of {origin}, {patch} pixels, does not divide; take {near}")
    try:
        shapes(configs.with_side(values, size), origin)
    except UserError as error:
        raise UserError(f"data.size is {size}, and {error}; its own size is {side}") from error


def shapes(values: Mapping[str, Any], origin: str) -> dict[str, torch.Size]:
    """Shapes of the tensors of a configuration's network, the head's as for 3 classes."""
    with torch.device("meta"):
        net = networks.build(values, 3, origin)
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def _read(folder: str | None, values: Mapping[str, Any], origin: str, state: dict[str, Tensor] | None) -> State:
    config = configs.made(values, origin)
    heads = tuple(f"{head}." for head in networks.heads_of(values, origin))
    kind = networks.pretrained_class(config)
    if state is not None and (weight := state.get(f"{heads[0]}weight")) is not None:
        config.num_labels = len(weight)
    net, info = _loaded(kind, folder, config, origin, state)
    body = "" if configs.is_backbone(config.model_type) else _body(net, heads[0])
    mismatched = {name: f"{name} is {tuple(was)}, not {tuple(want)}" for name, was, want in info["mismatched_keys"]}

    def own(name: str) -> bool:
        """Whether a tensor belongs to the backbone, which must be whole."""
        return name.startswith(body) and not name.startswith(heads) and "pooler." not in name

    wrong = [
        listed("missing", filter(own, info["missing_keys"])),
        listed("unexpected", (n for n in info["unexpected_keys"] if body and own(n) and not n.endswith("mask_token"))),
        listed("of another shape", (line for n, line in mismatched.items() if own(n))),
    ]
    if any(wrong):
        raise UserError(f"weights {origin} do not fit the network that their configuration describes: {'; '.join(filter(None, wrong))}")
    lacking = {*info["missing_keys"], *mismatched}
    new = [name for name in lacking if not name.startswith(heads)]
    notes = (_modules_line("left out", info["unexpected_keys"]), _modules_line("new, as transformers begins them", new))
    prefix = "backbone." if configs.is_backbone(config.model_type) else ""
    headless = any(name.startswith(heads) for name in lacking)
    tensors = {prefix + n: t for n, t in net.state_dict().items() if not (headless and n.startswith(heads))}
    if prefix and state is not None:  # a file of a classifier that is ours
        tensors |= {n: t for n, t in state.items() if n.startswith(heads)}
    return State(tensors, tuple(filter(None, notes)))


def _loaded(
    kind: type[PreTrainedModel], folder: str | None, config: PretrainedConfig, origin: str, state: dict[str, Tensor] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """from_pretrained's network and what it says of the keys. Raises UserError."""
    unset_hf_deepspeed_config()  # under ZeRO-3 Accelerate asks transformers for shards; ours are made of whole weights, stage by stage
    if state is None:
        source: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    else:
        prefix = "backbone."
        source = {"state_dict": {n.removeprefix(prefix): t for n, t in state.items()} if configs.is_backbone(config.model_type) else state}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # tensors that the file lacks
            loaded: Any = kind.from_pretrained(folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **source)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"weights {origin} cannot be loaded: {configs.one_line(error)}") from error
    return loaded


def _body(net: nn.Module, head: str) -> str:
    """Prefix of the backbone's tensors. Empty where it is not one module of its own."""
    prefix = str(getattr(net, "base_model_prefix", ""))
    return f"{prefix}." if prefix and prefix in dict(net.named_children()) and not head.startswith(f"{prefix}.") else ""


def _modules_line(what: str, names: Iterable[str]) -> str:
    """Names as the modules that they belong to: `left out: decoder, lm_head`."""
    tops = list(dict.fromkeys(".".join(name.split(".")[: 3 if "pooler" in name else 1]).removesuffix(".weight") for name in sorted(names)))
    return f"{what}: {', '.join(tops[:6])}{' and more' * (len(tops) > 6)}" if tops else ""


def _interpolated(name: str, positions: Tensor, want: tuple[int, ...], origin: str) -> Tensor:
    """Position embeddings (..., N, D) on another square grid. Raises UserError where they are on no square grid."""
    was, wanted = positions.shape[-2], want[-2]
    extra = next((n for n in range(_MOST_EXTRA_TOKENS) if _square(was - n) and _square(wanted - n)), None)
    if extra is None or positions.shape[-1] != want[-1] or math.prod(want) != wanted * want[-1]:
        raise UserError(f"{name} of {origin} has the shape {tuple(positions.shape)}, and {want} is needed; take the weights' own data.size")
    flat_ND = positions.reshape(was, -1).float()
    n, side = math.isqrt(was - extra), math.isqrt(wanted - extra)
    grid_1DHW = flat_ND[extra:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((flat_ND[:extra], grid_1DHW.permute(0, 2, 3, 1).reshape(side * side, -1))).reshape(want)


def _square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
