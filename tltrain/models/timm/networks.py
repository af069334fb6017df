"""timm's networks by name: `timm:ARCH` or `timm:ARCH.TAG`, their configuration, construction and classifiers.

timm takes seconds to import, and it is an extra. So each function imports it when it runs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.core import untrusted
from tltrain.core.errors import UserError
from tltrain.models.family import nearest
from tltrain.models.metadata import WeightsMetadata

PREFIX = "timm:"
_LARGEST = 64
"""Search range around a size that a network refuses, pixels."""
_OURS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes", "features_only", "in_chans",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip
"""Arguments of `timm.create_model` that a hub's configuration may not set."""


_SOURCES = (
    "url",
    "file",
    "state_dict",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "custom_load",
    "tag",
    "license",
    "origin_url",
    "paper_ids",
)
"""Keys of timm's configuration that describe its own weights. They are left out of an export."""


def library() -> ModuleType:
    """The package timm. Raises UserError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"a backbone named {PREFIX}… needs timm ({error}); pip install 'tltrain[timm]'") from error
    return timm


def split(name: str) -> tuple[str, str | None]:
    """The architecture and the tag of `timm:ARCH` or `timm:ARCH.TAG`. The tag is None where there is none."""
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    return architecture, tag or None


def check(name: str) -> None:
    """Raise UserError for a name that timm does not know, with the closest known ones."""
    timm = library()
    architecture, tag = split(name)
    if (now := timm.models.get_deprecated_models().get(architecture)) is not None:
        raise UserError(f"backbone.name is {name!r}, which timm renamed; its name is {PREFIX}{now}")
    if not timm.is_model(architecture):
        near = nearest(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "`tltrain recipes --backbones QUERY` searches"
        raise UserError(f"backbone.name is {name!r}, and timm {timm.__version__} has no network {architecture!r}; {hint}")
    if tag is not None and tag not in tags(architecture):
        raise UserError(unknown_tag(f"backbone.name is {name!r}", architecture, tag))


def tags(architecture: str) -> list[str]:
    """The tags of an architecture's weights, the default first. Empty where timm has no weights for it."""
    configs = library().models.get_arch_pretrained_cfgs(architecture)
    return [split(name)[1] or "" for name, config in configs.items() if config.has_weights]


def unknown_tag(what: str, architecture: str, tag: str) -> str:
    known = tags(architecture)
    near = get_close_matches(tag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}" if known else "timm has no weights for it"
    return f"{what}, and {tag!r} names no weights of timm's {architecture}; {hint}"


def config_of(card: WeightsMetadata) -> dict[str, Any]:
    """timm's configuration of this network and tag, such as input_size and classifier. Raises UserError."""
    architecture, _ = split(card.name)
    tag = card.config.get("tag")
    models = library().models
    try:
        config = models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    except (RuntimeError, TypeError, KeyError):  # a tag that another version of timm knew
        config = models.get_pretrained_cfg(architecture)
    return {} if config is None else config.to_dict()


def card_of(name: str, config: dict[str, Any], classes: tuple[str, ...] | None) -> WeightsMetadata:
    """Metadata for timm's configuration of weights. `notes_on` says what of it cannot be kept."""
    size = min(config["input_size"][1:])
    architecture, _ = split(name)
    kept = {key: config[key] for key in ("tag",) if config.get(key)}
    resize = int(size / config.get("crop_pct", 0.875))
    interpolation: Any = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    return WeightsMetadata(
        PREFIX + architecture, kept, tuple(config["mean"]), tuple(config["std"]), size, max(size, resize), interpolation, classes
    )


def notes_on(config: dict[str, Any]) -> tuple[str, ...]:
    """Lines for the user on preprocessing of the weights that is not done here."""
    notes = []
    if (mode := config.get("crop_mode", "center")) != "center":
        notes.append(f"the weights were tested with crop_mode {mode}; here images keep their shape, and the middle is cropped")
    if (way := config["interpolation"]) not in ("bilinear", "bicubic"):
        notes.append(f"the weights were tested with interpolation {way}; here it is bicubic")
    height, width = config["input_size"][1:]
    if height != width:
        notes.append(f"the weights were trained on images of {height} x {width} px; here images are square")
    return tuple(notes)


def build(card: WeightsMetadata, num_classes: int) -> nn.Module:
    """Build the network on the current default device, with timm's random weights. Raises UserError."""
    check(card.name)
    return _create(card, num_classes)


def _create(card: WeightsMetadata, num_classes: int, **more: Any) -> nn.Module:
    timm, (architecture, _) = library(), split(card.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own, about its own modules
            net: nn.Module = timm.create_model(
                architecture, pretrained_cfg=config_of(card) or None, num_classes=num_classes, **arguments(card), **more
            )
    except Exception as error:  # timm's constructors raise many types of errors for sizes and arguments that they do not take
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(f"timm cannot build {card.name} for {card.size} px: {type(error).__name__}: {reason}") from error
    return net


def takes_size(card: WeightsMetadata) -> bool:
    """Whether the network has parts of a fixed size, such as position embeddings, and so is built for the size of its images."""
    return bool(config_of(card).get("fixed_input_size"))


def _model_args(card: WeightsMetadata) -> dict[str, Any]:
    arguments = card.config.get("model_args") or {}
    if not isinstance(arguments, dict) or set(arguments) & set(_OURS):
        raise UserError(f"the card of {card.name} has model_args {untrusted.cut(arguments)}; get the weights anew, or other ones")
    return {key: value for key, value in arguments.items() if key != "img_size"}


def export_config(card: WeightsMetadata) -> dict[str, Any]:
    """config.json of a network with these classes, as timm's hub has it: `timm.create_model("local-dir:…")` reads it."""
    config = {key: value for key, value in config_of(card).items() if key not in _SOURCES}
    shape = (3, card.size, card.size)
    config |= {
        "input_size": shape, "mean": card.mean, "std": card.std, "interpolation": card.interpolation, "crop_mode": "center",
        "crop_pct": card.size / card.resize, "num_classes": len(card.classes or ()),
    }  # fmt: skip
    for key in ("test_input_size", "test_crop_pct", "min_input_size", "label_offset", "pool_size"):
        config.pop(key, None)
    return {
        "architecture": split(card.name)[0],
        "num_classes": len(card.classes or ()),
        "label_names": list(card.classes or ()),
        "model_args": arguments(card),
        "pretrained_cfg": config,
    }


def arguments(card: WeightsMetadata) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside the name and the number of classes."""
    given = {key: value for key, value in _model_args(card).items() if value is not None}
    return {**given, "img_size": card.size} if takes_size(card) else given


def heads(card: WeightsMetadata) -> tuple[str, ...]:
    """Paths of the network's classifiers, each an nn.Linear or a 1x1 nn.Conv2d. Raises UserError for a network that has none."""
    return _heads(card.name, json.dumps(card.config, sort_keys=True))


@cache
def _heads(name: str, config: str) -> tuple[str, ...]:
    net = _own_size(name, config)
    said = getattr(net, "pretrained_cfg", {}).get("classifier")
    paths = [said] if isinstance(said, str) else list(said or ())
    modules = dict(net.named_modules())
    if not paths or any(not isinstance(modules.get(path), nn.Linear | nn.Conv2d) for path in paths):
        paths = _named_by(net, modules)
    if not paths:
        raise UserError(f"{name} has no classifier: timm builds it for features alone; name a network that has one")
    return tuple(paths)


@cache
def _own_size(name: str, config: str) -> nn.Module:
    """The network for the size of its own weights, on the meta device."""
    card = WeightsMetadata(name, json.loads(config), (0.0,) * 3, (1.0,) * 3, 224, 224, "bicubic", None)
    with torch.device("meta"):
        return build(replace(card, size=min(config_of(card).get("input_size", (3, 224, 224))[1:])), 2)


def _named_by(net: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the classifiers that `get_classifier` returns, where timm's configuration names none."""
    asked: Any = getattr(net, "get_classifier", None)
    given = asked() if asked is not None else None
    given = given if isinstance(given, tuple | list) else (given,)
    ours = [id(m) for each in given if isinstance(each, nn.Module) for m in each.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [path for path, module in modules.items() if id(module) in ours[-1:]]


def leaves() -> tuple[tuple[Callable[..., Any], ...], tuple[type[nn.Module], ...]]:
    """The functions and the classes of modules that timm says not to trace into."""
    models = library().models
    return tuple(models.get_notrace_functions()), tuple(models.get_notrace_modules())


def check_size(card: WeightsMetadata) -> None:
    """Raise UserError for an image size that the network does not take, with the nearest ones that it does."""
    if _takes(card):
        return
    near = [next((s for s in sizes if s > 0 and _takes(replace(card, size=s))), None) for sizes in _around(card)]
    remedy = " or ".join(str(size) for size in near if size is not None)
    raise UserError(
        f"data.size is {card.size}, which {card.name} does not take (its patches or windows do not divide it); "
        + (f"take {remedy}" if remedy else "take null, the size of its weights")
    )


def _around(card: WeightsMetadata) -> Iterator[range]:
    """Sizes to try below and above the card's: in steps of the patch, or of 4 pixels."""
    step = _patch(card) or 4
    below = card.size // step * step
    most = max(_LARGEST, 2 * step)
    yield range(below, max(0, below - most), -step)
    yield range(below + step, below + step + most, step)


def _patch(card: WeightsMetadata) -> int | None:
    """Side of the patches of a Vision Transformer, pixels. None for other networks."""
    net = _own_size(card.name, json.dumps(card.config, sort_keys=True))
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    patch = patch[0] if isinstance(patch, tuple | list) else patch
    return patch if isinstance(patch, int) and patch > 1 else None


def _takes(card: WeightsMetadata) -> bool:
    patch = _patch(card)
    if patch is not None and card.size % patch:
        return False
    try:
        with torch.device("meta"), torch.no_grad():
            net = build(card, 2).eval()
            answer = net(torch.empty(2, 3, card.size, card.size))
    except Exception:  # a network says in its own way that it does not take a size
        return False
    return isinstance(answer, Tensor) and answer.shape == (2, 2)


def loaded(card: WeightsMetadata, state: dict[str, Tensor], num_classes: int, origin: str) -> dict[str, Tensor]:
    """A state dict as timm itself loads it for this network and size: names converted, position embeddings resampled.

    num_classes: of the head in the state. Raises UserError where timm cannot load it.
    """
    overlay = {"state_dict": dict(state), "num_classes": num_classes, "custom_load": False}
    try:
        net = _create(card, num_classes, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError as error:
        raise UserError(f"timm cannot read the weights {origin} as {card.name} for {card.size} px ({error.__cause__})") from error
    return dict(net.state_dict())
