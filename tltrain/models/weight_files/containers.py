"""Finds the state dict in a checkpoint: of plain loops, of timm, of torchvision's references, of Lightning and of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.models.weight_files.names import listed

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict_ema", "ema_model", "model_ema_state_dict", "ema")
"""Averaged weights. They are taken first, as timm does: they are the ones that were evaluated."""
PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "teacher", "backbone", "encoder")
MOST_DEPTH = 3
_COUNTERS = ("n_averaged", "_extra_state")
"""Extra entries that weight averaging and TransformerEngine add to a state dict."""


def state_dict_in(content: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in the content of a file.

    Returns (tensors by name, lines for the user on what was taken and what was left out). Raises UserError.
    """
    state, way, rest = _search(content, path, 0)
    kept, odd = {}, []
    for name, value in state.items():
        if isinstance(value, Tensor) and not name.endswith(_COUNTERS):
            kept[name] = _checked(name, value, path)
        elif not name.endswith(_COUNTERS):
            odd.append(name)
    taken = f"the weights are its {way}; left out: {', '.join(map(str, rest))}" if rest else f"the weights are its {way}"
    notes = [taken] if way else []
    if odd:
        notes.append(f"what is no tensor was left out: {listed('values', odd)}")
    return kept, tuple(notes)


def _search(content: Any, path: Path, depth: int) -> tuple[Mapping[str, Any], str, list[str]]:
    """Returns (the state dict, the keys that lead to it, the keys beside it). Raises UserError."""
    if not isinstance(content, Mapping):
        raise UserError(f"weights {path} hold {_described(content)}, not tensors by name; save model.state_dict() instead")
    if _is_state(content):
        return content, "", []
    inner = {str(key): value for key, value in content.items() if isinstance(value, Mapping) and _leads_to_state(value, depth + 1)}
    known = [key for key in (*AVERAGED, *PLAIN) if key in inner]
    if not known and len(inner) > 1:
        raise UserError(
            f"weights {path} hold several sets of tensors ({', '.join(inner)}), and none has a name that says it is the network; "
            "save the one you want as a file of its own with torch.save"
        )
    if not inner:
        keys = ", ".join(untrusted.cut(key, 40) for key in list(content)[:8])
        raise UserError(f"weights {path} hold no tensors by name; there {f'is only {keys}' if keys else 'is nothing in it'}")
    key = known[0] if known else next(iter(inner))
    state, way, rest = _search(inner[key], path, depth + 1)
    return state, f"{key}.{way}" if way else key, [untrusted.cut(str(k), 40).strip("'\"") for k in content if str(k) != key][:12] + rest


def _is_state(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a state dict: names to tensors. Single numbers may stand beside them, and tensors beside a state dict do not."""
    tensors = [v for k, v in value.items() if isinstance(v, Tensor) and isinstance(k, str)]
    return any(t.ndim for t in tensors) and not any(isinstance(v, Mapping) and _is_state(v) for v in value.values())


def _leads_to_state(value: Mapping[Any, Any], depth: int) -> bool:
    if depth > MOST_DEPTH:
        return False
    return _is_state(value) or any(isinstance(v, Mapping) and _leads_to_state(v, depth + 1) for k, v in value.items() if isinstance(k, str))


def _checked(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A plain tensor. Raises UserError for one that a network's parameters cannot be loaded from."""
    kind = None
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested or type(tensor) not in (Tensor, torch.nn.Parameter):
        kind = "quantised, sparse or of a special kind"
    elif tensor.is_meta:
        kind = "without values (meta)"
    elif tensor.is_complex():
        kind = "complex"
    if kind is not None:
        raise UserError(f"weights {path}: {untrusted.cut(name)} is {kind}; plain float32, float16 or bfloat16 tensors are needed")
    return tensor.detach()


def _described(content: Any) -> str:
    return "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
