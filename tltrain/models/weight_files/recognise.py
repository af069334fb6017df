"""Recognises the network that a state dict belongs to, by the shapes of its tensors, whatever their names are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

TABLE = Path(__file__).with_name("known_networks.txt")
"""A digest and names on each line, for the networks of torchvision and timm. Made by benchmarks/known_networks.py."""
HEADS = ("fc", "head", "classifier", "head.fc", "heads.head", "last_linear", "linear", "logits")


def digest(shapes: Iterable[tuple[int, ...]]) -> str:
    """A hash of the shapes of a network's tensors without its head, in any order. Numbers and tensors of no dimension are left out."""
    text = " ".join(sorted("x".join(map(str, shape)) for shape in shapes if shape))
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@cache
def _known() -> dict[str, tuple[str, ...]]:
    lines = (line.split() for line in TABLE.read_text(encoding="utf-8").splitlines())
    return {digest: tuple(names) for digest, *names in lines}


def recognise(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the networks that have these tensors, such as timm:vit_small_patch16_224. Empty where none is in the table.

    Which tensors are the head is not known: it is tried without each of those that may be.
    """
    matrices = [name for name, tensor in state.items() if tensor.ndim == 2 and name.endswith("weight")]
    modules = [name.rpartition(".")[0] for name in matrices]
    heads = [module for module in modules if module.endswith(HEADS)] + modules[-1:]
    for head in (None, *dict.fromkeys(heads)):
        rest = [tuple(t.shape) for name, t in state.items() if head is None or not name.startswith(f"{head}.")]
        if (names := _known().get(digest(rest))) is not None:
            return names
    return ()
