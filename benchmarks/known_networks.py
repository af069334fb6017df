"""Writes the table by which a file of weights is recognised: one line for each network of torchvision and timm, without weights.

    python -m benchmarks.known_networks            # five minutes; writes tltrain/models/weight_files/known_networks.txt

Run it again for a newer timm or torchvision. Networks of equal tensors share a line: torchvision's name first, then timm's shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models

from tltrain.models.weight_files.recognise import TABLE, digest

MOST_NAMES = 3


def main() -> None:
    found: dict[str, list[str]] = {}
    for name, net, heads in networks():
        left_out = {id(parameter) for head in heads for parameter in head.parameters()}
        shapes = [tuple(t.shape) for t in net.state_dict(keep_vars=True).values() if id(t) not in left_out]
        found.setdefault(digest(shapes), []).append(name)
    lines = sorted((names[:MOST_NAMES], key) for key, names in found.items())
    TABLE.write_text("".join(f"{key} {' '.join(names)}\n" for names, key in lines), encoding="utf-8")


def networks() -> Iterator[tuple[str, nn.Module, Sequence[nn.Module]]]:
    """Yields (name, net on the meta device, its classifiers), torchvision's first, then timm's from short names to long ones."""
    for name in list_models(module=torchvision.models):
        net = _built(get_model, name)
        if net is not None:
            yield f"torchvision:{name}", net, [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1:]
    for name in sorted(timm.list_models(), key=lambda name: (len(name), name)):
        net = _built(timm.create_model, name)
        if net is not None:
            classifier: Any = cast(Any, net).get_classifier() if hasattr(net, "get_classifier") else None
            heads = classifier if isinstance(classifier, tuple | list) else [classifier]
            yield f"timm:{name}", net, [head for head in heads if head is not None]


def _built(make: Callable[[str], nn.Module], name: str) -> nn.Module | None:
    """A net on the meta device, or on the CPU where it computes with tensors while it is built. None where it cannot be built."""
    error = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return make(name)
        except Exception as caught:  # the networks of others raise what they like
            error = caught
    print(f"{name} is left out: {error}")
    return None


if __name__ == "__main__":
    main()
