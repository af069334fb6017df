"""Configurations of transformers' networks, from files that may come from anywhere: checked, and as plain values for metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, __version__
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.core.recipe import MOST_PIXELS
from tltrain.models.hf_hub import REFUSED

CONFIG = "config.json"
_SAME_NETWORK = {"vit_mae": "vit"}
"""Types without a classifier whose encoder is that of another type, which transformers' documentation says to fine-tune it as."""
_NO_IMAGES = {"imagegpt": "takes colours as words", "shieldgemma2": "judges images by text", "siglip2": "takes patches, not images"}
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_OUTPUTS = ("output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "torchscript", "gradient_checkpointing")
_AT_RANDOM = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""DINOv3 moves its rotary table at random in training, once for all layers. Blocks that run alone would each move it otherwise."""
_IN_VISION = "vision_config"
_SIDE = "image_size"
_DEEP = ("layers", "depth", "depths", "num_blocks", "num_layers")
_LONGEST = 300
_MOST_DEEP, _MOST = 512, 10_000_000
"""Upper limits of a configuration's whole numbers: those that count layers, and all others."""


def read(folder: Path) -> PretrainedConfig:
    """The configuration in a save_pretrained folder. Raises UserError for what cannot be read, is not safe, or is no network of images."""
    path = folder / CONFIG
    raw = untrusted.read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {untrusted.cut(raw)}, which is no configuration; get the weights anew, or other ones")
    return made(raw, str(path))


def made(values: Mapping[str, Any], origin: str) -> PretrainedConfig:
    """A checked configuration of a network that classifies images. `origin` names it in messages. Raises UserError."""
    for key, remedy in REFUSED.items():
        if values.get(key) not in (None, {}, "eager", "sdpa"):
            raise UserError(f"{origin} sets {key} to {untrusted.cut(values[key])}; {remedy}")
    kind = _kind(values, origin)
    for key, number in _numbers(values):
        most = MOST_PIXELS if key == _SIDE else _MOST_DEEP if key.endswith(_DEEP) else _MOST
        if number > most:
            raise UserError(f"{origin} has {key} {untrusted.cut(number)}; it must be a number up to {most:,}")
    try:
        config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in values.items() if k not in ("model_type", *_OUTPUTS)})
    except Exception as error:  # transformers raises many types of errors for unexpected values
        raise UserError(f"{origin} is the configuration of no {kind}: {one_line(error)}") from error
    for key in _AT_RANDOM:
        if getattr(config, key, None) is not None:
            setattr(config, key, None)
    channels = getattr(vision(config), "num_channels", 3)
    if channels != 3:
        raise UserError(f"{origin} has num_channels {channels}; images here have 3")
    return config


def plain(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as JSON values, without keys that depend on the program that wrote it."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return {key: value for key, value in values.items() if key not in _VOLATILE}


def side_of(config: PretrainedConfig) -> int | None:
    """Side of the square images that a network is configured for. None where its configuration does not say. Raises UserError."""
    side = getattr(vision(config), _SIDE, None)
    if isinstance(side, list | tuple) and len(set(side)) == 1:
        return int(side[0])
    if side is not None and not isinstance(side, int):
        raise UserError(f"a {config.model_type} has {_SIDE} {untrusted.cut(side)}; only squares can be used")
    return side


def with_side(values: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The same configuration for square images of this many pixels."""
    if isinstance(inner := values.get(_IN_VISION), Mapping):
        return {**values, _IN_VISION: with_side(inner, side)}
    return {**values, _SIDE: [side, side] if isinstance(values.get(_SIDE), list | tuple) else side}


def with_classes(values: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """The same configuration with these classes."""
    return {**values, "id2label": {str(i): name for i, name in enumerate(classes)}, "label2id": {name: i for i, name in enumerate(classes)}}


def classes_of(config: PretrainedConfig, origin: str) -> tuple[str, ...] | None:
    """Names of the classes of the head, in order. None where there are none. Raises UserError."""
    names: dict[Any, str] | None = config.id2label
    if not names:
        return None
    if set(names) != set(range(len(names))):
        raise UserError(f"{origin} has id2label {untrusted.cut(config.id2label)}; its numbers must be 0, 1, 2, and so on")
    return tuple(str(names[i]) for i in range(len(names)))


def patch_of(config: PretrainedConfig) -> int:
    """Side of a patch, pixels. 1 where the network has no patches of one size."""
    patch = getattr(vision(config), "patch_stride", None) or getattr(vision(config), "patch_size", 1)
    patch = patch[0] if isinstance(patch, list | tuple) and len(set(patch)) == 1 else patch
    return patch if isinstance(patch, int) and patch > 0 else 1


def vision(config: PretrainedConfig) -> Any:
    """The part of a configuration that is about images."""
    return getattr(config, _IN_VISION, config)


def one_line(error: Exception) -> str:
    """The message of an error of transformers, shortened."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _kind(values: Mapping[str, Any], origin: str) -> str:
    kind = _SAME_NETWORK.get(str(values.get("model_type")), values.get("model_type"))
    if kind == "timm_wrapper" or (kind is None and "architecture" in values and "pretrained_cfg" in values):
        raise UserError(
            f"{origin} is of timm's {untrusted.cut(values.get('architecture'))}; name it timm:{untrusted.cut(values.get('architecture'))}"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{origin} has model_type {untrusted.cut(kind)}, which transformers {__version__} does not know; it may be too old")
    if kind in _NO_IMAGES:
        raise UserError(f"{origin} is of a {kind}, which {_NO_IMAGES[kind]}; take a network that takes images")
    if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and not is_backbone(kind):
        raise UserError(f"{origin} has model_type {kind!r}, which classifies no images; take an image classifier or a backbone of images")
    return kind


def is_backbone(kind: str) -> bool:
    """Whether a type is a network of images that transformers gives no classifier, such as DINOv3."""
    return (
        kind in MODEL_FOR_BACKBONE_MAPPING_NAMES
        and kind in MODEL_MAPPING_NAMES
        and kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields (key, whole number) for all of a configuration but its tables of classes."""
    if isinstance(values, Mapping):
        for name, each in values.items():
            if name not in ("id2label", "label2id", "text_config"):
                yield from _numbers(each, str(name))
    elif isinstance(values, list | tuple):
        for each in values:
            yield from _numbers(each, key)
    elif isinstance(values, int) and not isinstance(values, bool):
        yield key, values
