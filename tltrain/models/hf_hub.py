"""Reads ViTs of transformers from save_pretrained folders and the Hugging Face hub: configuration, preprocessing and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from tltrain.core import files, untrusted
from tltrain.core.errors import UserError
from tltrain.core.recipe import MOST_PIXELS
from tltrain.models.metadata import WeightsMetadata, checked
from tltrain.models.weight_files import reading
from tltrain.models.weight_files.download import hub_bar
from tltrain.models.weight_files.names import listed

_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_HEAD, _MAY_DIFFER = "classifier.", ("classifier.", "pooler.", "vit.pooler.")
_VOLATILE = ("transformers_version", "_name_or_path", "dtype")
REFUSED = {
    "auto_map": "that is code of its own, which is never run here; take weights that are a plain ViT",
    "quantization_config": "quantised weights cannot be fine-tuned here; take the plain ones (float32, float16 or bfloat16)",
    "attn_implementation": "attention is PyTorch's here, and no kernels are fetched; take the key out of config.json",
    "_attn_implementation": "attention is PyTorch's here, and no kernels are fetched; take the key out of config.json",
}
_MOST = {
    "image_size": MOST_PIXELS, "patch_size": 1024, "hidden_size": 16_384, "num_hidden_layers": 256, "num_attention_heads": 256,
    "intermediate_size": 131_072, "num_channels": 64,
}  # fmt: skip
"""Upper limits, several times the largest ViT's values (22 B parameters: 48 layers, width 6,144, 48 heads)."""


def build(card: WeightsMetadata, num_classes: int) -> ViTForImageClassification:
    """Build the net with random weights on the current default device. Raises UserError for an invalid configuration."""
    config = _config(card.config, f"the card of {card.name}")
    config.num_labels = num_classes
    try:
        return ViTForImageClassification(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the configuration of {card.name} is that of no ViT: {type(error).__name__}: {error}") from error


def plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """A complete configuration for metadata, from the values that differ from transformers' defaults."""
    return _plain(ViTConfig.from_dict(values))


def check_config(values: Mapping[str, Any], origin: str) -> None:
    """Check a configuration from an untrusted source. `origin` names it in messages.

    Raises UserError if it would load custom code or kernels, if the weights are quantised, and for sizes outside the limits.
    """
    for key, remedy in REFUSED.items():
        if values.get(key) not in (None, {}, "eager", "sdpa"):
            raise UserError(f"{origin} sets {key} to {untrusted.cut(values[key])}; {remedy}")
    for key, most in _MOST.items():
        value = values.get(key, 1)
        if key in ("image_size", "patch_size") and isinstance(value, list | tuple):
            raise UserError(f"{origin} has {key} {untrusted.cut(value)}; only squares, given as one number, can be used")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(f"{origin} has {key} {untrusted.cut(value)}; it must be a whole number from 1 to {most:,}")


def _config(values: Mapping[str, Any], origin: str) -> ViTConfig:
    """Build a checked ViTConfig. Raises UserError as `check_config` does, and where transformers rejects the values."""
    check_config(values, origin)
    try:
        return ViTConfig.from_dict(dict(values))
    except Exception as error:  # transformers raises many types of errors for unexpected values
        raise UserError(f"{origin} is the configuration of no ViT: {type(error).__name__}: {error}") from error


def download(repo: str, *, network: bool, weights: bool | None = None) -> Path:
    """The local folder of a hub repository: the hub's cache where that is complete, otherwise a download. Raises UserError.

    weights: whether they are needed beside the configuration. None: only with a network.
    A complete cache makes no request to the hub. So a run keeps the revision that it began with.
    """
    weights = network if weights is None else weights
    patterns = [_CONFIG, _PROCESSOR, *(("model*.safetensors", "model.safetensors.index.json") if weights else ())]
    try:
        cached = Path(snapshot_download(repo, local_files_only=True))
    except (OSError, HFValidationError):
        cached = None
    if cached is not None and (cached / _PROCESSOR).exists() and _is_usable(cached, weights=weights):
        return cached
    if network and constants.HF_HUB_OFFLINE:
        reason = "it is not in the hub's cache, and HF_HUB_OFFLINE is set: nothing is downloaded"
    elif network and (why := files.unresolved(constants.ENDPOINT)) is not None:
        reason = why
    elif network:
        try:
            folder = Path(snapshot_download(repo, allow_patterns=patterns, tqdm_class=hub_bar(repo, constants.ENDPOINT)))
        except GatedRepoError:
            reason = "it asks for conditions to be accepted: do so on its page, and log in with `hf auth login`"
        except RepositoryNotFoundError:
            reason = "the hub has no such repository, or a private one"
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).splitlines()[0]
        else:
            if _is_usable(folder, weights=weights):
                return folder
            reason = f"the repository has no {_CONFIG}" + " with model.safetensors" * weights
    else:
        reason = "it is not in the hub's cache, and nothing is downloaded here"
    if cached is not None and _is_usable(cached, weights=weights):
        return cached  # a repository without a preprocessor configuration
    raise UserError(
        f"weights {repo!r} are neither a folder here nor a hub repository that can be read ({reason}). On a machine with a network, "
        f"`hf download {repo}` puts it into the hub's cache (HF_HOME); or give the path of a folder"
    )


def is_vit(folder: Path) -> bool:
    """Whether a save_pretrained folder is of a ViT. True for a configuration that cannot be read, which `read_card` then says."""
    try:
        raw = untrusted.read_json(folder / _CONFIG)
    except UserError:
        return True
    return not isinstance(raw, dict) or raw.get("model_type") == "vit"


def read_card(folder: Path) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """Read the metadata of a save_pretrained folder, without its weights. The family sets the final name.

    Returns (the metadata, lines for the user on values that were assumed). Raises UserError.
    """
    try:
        raw, _ = ViTConfig.get_config_dict(folder)
    except (OSError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"{folder / _CONFIG} cannot be read: {error}") from error
    if (kind := raw.get("model_type")) != "vit":
        raise UserError(f"{folder / _CONFIG} has model_type {kind!r}, which is no vit; set backbone.name to null or hf:{kind}")
    config: Any = _config(raw, str(folder / _CONFIG))
    if config.num_channels != 3:
        raise UserError(f"{folder / _CONFIG} has num_channels {config.num_channels}; images here have 3")
    if set(config.id2label) != set(range(config.num_labels)):
        raise UserError(f"{folder / _CONFIG} has id2label {untrusted.cut(config.id2label)}; its numbers must be 0, 1, 2, and so on")
    classes = tuple(config.id2label[i] for i in range(config.num_labels)) or None
    half, size = (0.5, 0.5, 0.5), config.image_size
    card = WeightsMetadata("vit", _plain(config), half, half, size, size, "bilinear", classes)
    if (folder / _PROCESSOR).exists():
        return checked(with_processor(card, folder), str(folder / _PROCESSOR)), ()
    return checked(card, str(folder / _CONFIG)), (f"it has no {_PROCESSOR}: mean and std are 0.5, the size is the configuration's, {size}",)


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a save_pretrained folder in its dtype, under the net's names. Without a head where it has none.

    Raises UserError.
    """
    if not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            reading.read(path)  # refuses what holds more than tensors, with its reason and remedy
    return _convert(str(folder), pretrained_model_name_or_path=folder, local_files_only=True)


def convert(state: dict[str, Tensor], card: WeightsMetadata, origin: str) -> dict[str, Tensor]:
    """As `read_state`, from tensors in memory. Accepts old and new names of transformers, with or without `vit.`. Raises UserError."""
    config = _config(card.config, f"the card of {origin}")
    head = state.get(f"{_HEAD}weight")
    if head is not None:
        config.num_labels = len(head)
    return _convert(origin, pretrained_model_name_or_path=None, config=config, state_dict=state)


def _convert(origin: str, **arguments: Any) -> dict[str, Tensor]:
    unset_hf_deepspeed_config()  # under ZeRO-3 Accelerate asks transformers for shards; ours are made of whole weights, stage by stage
    try:
        with quiet():
            # do not raise at the first mismatch: all are reported together below
            arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = ViTForImageClassification.from_pretrained(**arguments)
            net, info = loaded
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"weights {origin} cannot be loaded: {type(error).__name__}: {error}") from error
    mismatched = {name: f"{name} is {tuple(was)}, not {tuple(want)}" for name, was, want in info["mismatched_keys"]}
    wrong = [
        listed("missing", (n for n in info["missing_keys"] if not n.startswith(_MAY_DIFFER))),
        listed("unexpected", (n for n in info["unexpected_keys"] if not n.startswith(_MAY_DIFFER))),
        listed("of another shape", (line for n, line in mismatched.items() if not n.startswith(_MAY_DIFFER))),
    ]
    if any(wrong):
        raise UserError(f"weights {origin} do not fit the network that their configuration describes: {'; '.join(filter(None, wrong))}")
    whole = not any(name.startswith(_HEAD) for name in (*info["missing_keys"], *mismatched))
    state = net.state_dict()
    return {name: t for name, t in state.items() if whole or not name.startswith(_HEAD)}


def _plain(config: ViTConfig) -> dict[str, Any]:
    """A configuration as JSON values, without keys that depend on the program that wrote it."""
    values = json.loads(json.dumps(config.to_dict()))
    return {**{k: v for k, v in values.items() if k not in _VOLATILE}, "architectures": ["ViTForImageClassification"]}


def with_processor(card: WeightsMetadata, folder: Path) -> WeightsMetadata:
    """Metadata with the preprocessing of a save_pretrained folder. Raises UserError for one that cannot be followed."""
    try:
        processor: Any = ViTImageProcessor.from_pretrained(folder)
    except Exception as error:  # as in _config: many types of errors
        raise UserError(f"{folder / _PROCESSOR} cannot be read: {type(error).__name__}: {error}") from error
    if getattr(processor, "auto_map", None):
        raise UserError(f"{folder / _PROCESSOR} sets auto_map to {untrusted.cut(processor.auto_map)}; {REFUSED['auto_map']}")
    resize = processor.size.shortest_edge or _side(processor.size)
    size = _side(processor.crop_size) if processor.do_center_crop and processor.crop_size else _side(processor.size)
    interpolations: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
    if resize is None or size is None or size > resize or processor.resample not in interpolations:
        raise UserError(
            f"{folder / _PROCESSOR} asks for size {processor.size}, crop {processor.crop_size}, resample {processor.resample}; "
            "only a square, or a shorter side and a square crop, with resample 2 (bilinear) or 3 (bicubic), can be used"
        )
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    interpolation = interpolations[int(processor.resample)]
    return replace(card, mean=tuple(mean), std=tuple(std), size=size, resize=resize, interpolation=interpolation)


def _side(size: Any) -> int | None:
    """The side of a square size of an image processor. None for other sizes."""
    return size.height if size.height == size.width else None


def _is_usable(folder: Path, *, weights: bool) -> bool:
    return (folder / _CONFIG).exists() and (not weights or any(folder.glob("*.safetensors")))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its report of mismatched keys. `_convert` checks the keys itself."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
