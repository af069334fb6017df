"""Converts a state dict between libraries that hold the same network under other names: ViT, ResNet and ConvNeXt.

A *dialect* says how one library names each part. A state dict is read in the dialect that knows all of its names, and written in the
dialect of the network that asks. Queries, keys and values are split or joined on the way. No value is changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_INDICES = {"{i}": ("i", 1, 0), "{s}": ("s", 1, 0), "{b}": ("b", 1, 0), "{c}": ("c", 1, 0), "{s-1}": ("s", 1, -1), "{c-1}": ("c", 1, -1),
            "{2s}": ("s", 2, 0), "{2s+1}": ("s", 2, 1)}  # fmt: skip
"""Maps what stands in a template to (variable, a, b): the number in a name is a * variable + b."""
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_FUSED = ("query", "key", "value")


@dataclass(frozen=True)
class Dialect:
    """The names that one library gives the parts of an architecture."""

    library: str
    base: str
    """Stands before all names but the head's where a class of the library has a head, and is missing where it has none."""
    parts: Mapping[str, str]
    """Maps each part to its name. A part without {leaf} is one tensor."""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that other classes of the library have besides, and that this network does not use."""
    epsilon: float | None = None
    """Of the LayerNorms, where the dialects of an architecture differ in it."""

    @cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        return {part: _pattern(template) for part, template in self.parts.items()}

    def read(self, state: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor] | None:
        """Maps (part, leaf, indices) to tensors. None where any name is not of this dialect."""
        found = {}
        for name, tensor in state.items():
            if (key := self._key(name) or self._key(self.base + name)) is not None:
                found[key] = tensor
            elif not name.removeprefix(self.base).startswith(self.ignored or ("\0",)):
                return None
        return found

    def _key(self, name: str) -> tuple[str, ...] | None:
        for part, pattern in self.patterns.items():
            if (match := pattern.fullmatch(name)) is not None and (values := _values(match)) is not None:
                return (part, *(f"{key}={value}" for key, value in values))
        return None

    def write(self, found: Mapping[tuple[str, ...], Tensor]) -> dict[str, Tensor] | None:
        """The tensors under this dialect's names. None for a part that it does not have."""
        state = {}
        for (part, *values), tensor in found.items():
            if part not in self.parts:
                return None
            state[_filled(self.parts[part], dict(value.split("=") for value in values))] = tensor
        return state


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(re.escape("{leaf}"), f"(?P<leaf>{'|'.join(_LEAVES)})")
    for token, (variable, times, plus) in _INDICES.items():
        text = text.replace(re.escape(token), rf"(?P<{variable}_{times}_{'m' if plus < 0 else 'p'}{abs(plus)}>\d+)")
    return re.compile(text)


def _values(match: re.Match[str]) -> list[tuple[str, str]] | None:
    """The leaf and the indices in a name. None where an index is no whole number."""
    values = []
    for group, text in match.groupdict().items():
        if group == "leaf":
            values.append((group, text))
            continue
        variable, times, plus = group.split("_")
        value, odd = divmod(int(text) - int(plus[1:]) * (-1 if plus[0] == "m" else 1), int(times))
        if odd:
            return None
        values.append((variable, str(value)))
    return sorted(values)


def _filled(template: str, values: Mapping[str, str]) -> str:
    name = template.replace("{leaf}", values.get("leaf", ""))
    for token, (variable, times, plus) in _INDICES.items():
        if token in name:
            name = name.replace(token, str(times * int(values[variable]) + plus))
    return name


_VIT = (
    Dialect(
        "timm", "", {
            "class token": "cls_token", "positions": "pos_embed", "patches": "patch_embed.proj.{leaf}", "norm 1": "blocks.{i}.norm1.{leaf}",
            "fused": "blocks.{i}.attn.qkv.{leaf}", "out": "blocks.{i}.attn.proj.{leaf}", "norm 2": "blocks.{i}.norm2.{leaf}",
            "mlp 1": "blocks.{i}.mlp.fc1.{leaf}", "mlp 2": "blocks.{i}.mlp.fc2.{leaf}", "norm": "norm.{leaf}", "head": "head.{leaf}",
        }, epsilon=1e-6,
    ),
    Dialect(
        "torchvision", "", {
            "class token": "class_token", "positions": "encoder.pos_embedding", "patches": "conv_proj.{leaf}",
            "norm 1": "encoder.layers.encoder_layer_{i}.ln_1.{leaf}",
            "fused": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_{leaf}",
            "out": "encoder.layers.encoder_layer_{i}.self_attention.out_proj.{leaf}",
            "norm 2": "encoder.layers.encoder_layer_{i}.ln_2.{leaf}", "mlp 1": "encoder.layers.encoder_layer_{i}.mlp.0.{leaf}",
            "mlp 2": "encoder.layers.encoder_layer_{i}.mlp.3.{leaf}", "norm": "encoder.ln.{leaf}", "head": "heads.head.{leaf}",
        }, epsilon=1e-6,
    ),
    Dialect(
        "transformers", "vit.", {
            "class token": "vit.embeddings.cls_token", "positions": "vit.embeddings.position_embeddings",
            "patches": "vit.embeddings.patch_embeddings.projection.{leaf}", "norm 1": "vit.layers.{i}.layernorm_before.{leaf}",
            "query": "vit.layers.{i}.attention.q_proj.{leaf}", "key": "vit.layers.{i}.attention.k_proj.{leaf}",
            "value": "vit.layers.{i}.attention.v_proj.{leaf}", "out": "vit.layers.{i}.attention.o_proj.{leaf}",
            "norm 2": "vit.layers.{i}.layernorm_after.{leaf}", "mlp 1": "vit.layers.{i}.mlp.fc1.{leaf}",
            "mlp 2": "vit.layers.{i}.mlp.fc2.{leaf}", "norm": "vit.layernorm.{leaf}", "head": "classifier.{leaf}",
        }, ("pooler.",), 1e-12,
    ),
    Dialect(
        "transformers before version 5", "vit.", {
            "class token": "vit.embeddings.cls_token", "positions": "vit.embeddings.position_embeddings",
            "patches": "vit.embeddings.patch_embeddings.projection.{leaf}", "norm 1": "vit.encoder.layer.{i}.layernorm_before.{leaf}",
            "query": "vit.encoder.layer.{i}.attention.attention.query.{leaf}",
            "key": "vit.encoder.layer.{i}.attention.attention.key.{leaf}",
            "value": "vit.encoder.layer.{i}.attention.attention.value.{leaf}",
            "out": "vit.encoder.layer.{i}.attention.output.dense.{leaf}", "norm 2": "vit.encoder.layer.{i}.layernorm_after.{leaf}",
            "mlp 1": "vit.encoder.layer.{i}.intermediate.dense.{leaf}", "mlp 2": "vit.encoder.layer.{i}.output.dense.{leaf}",
            "norm": "vit.layernorm.{leaf}", "head": "classifier.{leaf}",
        }, ("pooler.",), 1e-12,
    ),
)  # fmt: skip
RESNET = (
    Dialect(
        "torchvision and timm", "", {
            "stem": "conv1.{leaf}", "stem norm": "bn1.{leaf}", "conv": "layer{s}.{b}.conv{c}.{leaf}", "norm": "layer{s}.{b}.bn{c}.{leaf}",
            "shortcut": "layer{s}.{b}.downsample.0.{leaf}", "shortcut norm": "layer{s}.{b}.downsample.1.{leaf}", "head": "fc.{leaf}",
        },
    ),
    Dialect(
        "transformers", "resnet.", {
            "stem": "resnet.embedder.embedder.convolution.{leaf}", "stem norm": "resnet.embedder.embedder.normalization.{leaf}",
            "conv": "resnet.encoder.stages.{s-1}.layers.{b}.layer.{c-1}.convolution.{leaf}",
            "norm": "resnet.encoder.stages.{s-1}.layers.{b}.layer.{c-1}.normalization.{leaf}",
            "shortcut": "resnet.encoder.stages.{s-1}.layers.{b}.shortcut.convolution.{leaf}",
            "shortcut norm": "resnet.encoder.stages.{s-1}.layers.{b}.shortcut.normalization.{leaf}", "head": "classifier.1.{leaf}",
        },
    ),
)  # fmt: skip
_CONVNEXT = (
    Dialect(
        "timm", "", epsilon=1e-6, parts={
            "stem": "stem.0.{leaf}", "stem norm": "stem.1.{leaf}", "down norm": "stages.{s}.downsample.0.{leaf}",
            "down": "stages.{s}.downsample.1.{leaf}", "scale": "stages.{s}.blocks.{b}.gamma",
            "conv": "stages.{s}.blocks.{b}.conv_dw.{leaf}",
            "norm": "stages.{s}.blocks.{b}.norm.{leaf}", "mlp 1": "stages.{s}.blocks.{b}.mlp.fc1.{leaf}",
            "mlp 2": "stages.{s}.blocks.{b}.mlp.fc2.{leaf}", "last norm": "head.norm.{leaf}", "head": "head.fc.{leaf}",
        },
    ),
    Dialect(
        "torchvision", "", epsilon=1e-6, parts={
            "stem": "features.0.0.{leaf}", "stem norm": "features.0.1.{leaf}", "down norm": "features.{2s}.0.{leaf}",
            "down": "features.{2s}.1.{leaf}", "scale": "features.{2s+1}.{b}.layer_scale", "conv": "features.{2s+1}.{b}.block.0.{leaf}",
            "norm": "features.{2s+1}.{b}.block.2.{leaf}", "mlp 1": "features.{2s+1}.{b}.block.3.{leaf}",
            "mlp 2": "features.{2s+1}.{b}.block.5.{leaf}", "last norm": "classifier.0.{leaf}", "head": "classifier.2.{leaf}",
        },
    ),
    Dialect(
        "transformers", "convnext.", epsilon=1e-12, parts={
            "stem": "convnext.embeddings.patch_embeddings.{leaf}", "stem norm": "convnext.embeddings.layernorm.{leaf}",
            "down norm": "convnext.encoder.stages.{s}.downsampling_layer.0.{leaf}",
            "down": "convnext.encoder.stages.{s}.downsampling_layer.1.{leaf}",
            "scale": "convnext.encoder.stages.{s}.layers.{b}.layer_scale_parameter",
            "conv": "convnext.encoder.stages.{s}.layers.{b}.dwconv.{leaf}",
            "norm": "convnext.encoder.stages.{s}.layers.{b}.layernorm.{leaf}",
            "mlp 1": "convnext.encoder.stages.{s}.layers.{b}.pwconv1.{leaf}",
            "mlp 2": "convnext.encoder.stages.{s}.layers.{b}.pwconv2.{leaf}", "last norm": "convnext.layernorm.{leaf}",
            "head": "classifier.{leaf}",
        },
    ),
    Dialect(
        "the authors' code", "", epsilon=1e-6, parts={
            "stem": "downsample_layers.0.0.{leaf}", "stem norm": "downsample_layers.0.1.{leaf}",
            "down norm": "downsample_layers.{s}.0.{leaf}",
            "down": "downsample_layers.{s}.1.{leaf}", "scale": "stages.{s}.{b}.gamma", "conv": "stages.{s}.{b}.dwconv.{leaf}",
            "norm": "stages.{s}.{b}.norm.{leaf}", "mlp 1": "stages.{s}.{b}.pwconv1.{leaf}", "mlp 2": "stages.{s}.{b}.pwconv2.{leaf}",
            "last norm": "norm.{leaf}", "head": "head.{leaf}",
        },
    ),
)  # fmt: skip
ARCHITECTURES = {"ViT": _VIT, "ResNet": RESNET, "ConvNeXt": _CONVNEXT}


@dataclass(frozen=True)
class Twin:
    """A state dict under the names of another library."""

    state: dict[str, Tensor]
    line: str
    """For the user: what was converted."""
    epsilon: float | None
    """Of the LayerNorms in the network that the weights are from. None where it is that of the network they are for."""


def converted(state: Mapping[str, Tensor], body: Collection[str]) -> Twin | None:
    """A state dict under the names of a network, whose tensors but the head's are called `body`. None where no dialect has them."""
    for architecture, dialects in ARCHITECTURES.items():
        for source in dialects:
            if (found := source.read(state)) is None:
                continue
            for target in dialects:
                if target is source or (named := target.write(_as_wanted(found, target))) is None or not set(body) <= set(named):
                    continue
                line = f"their names are those of a {architecture} of {source.library}, and converted to those of {target.library}"
                return Twin(named, line, None if source.epsilon == target.epsilon else source.epsilon)
    return None


def _as_wanted(found: Mapping[tuple[str, ...], Tensor], target: Dialect) -> dict[tuple[str, ...], Tensor]:
    """Queries, keys and values split, joined or left, as a dialect has them."""
    wanted: dict[tuple[str, ...], Tensor] = {}
    for (part, *values), tensor in found.items():
        key = tuple(values)
        if part == "fused" and "fused" not in target.parts:
            wanted |= {(name, *key): third for name, third in zip(_FUSED, tensor.chunk(3), strict=True)}
        elif part == "query" and "fused" in target.parts and all((name, *key) in found for name in _FUSED):
            wanted["fused", *key] = torch.cat([found[name, *key] for name in _FUSED])
        elif part not in _FUSED or "fused" not in target.parts:
            wanted[part, *key] = tensor
    return wanted
