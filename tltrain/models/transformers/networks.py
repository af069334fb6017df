"""Networks of transformers that classify images: built from a configuration, with the head found by its size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from tltrain.core.errors import UserError
from tltrain.models.hf_hub import quiet
from tltrain.models.transformers import configs

_MARK = 7919
"""A number of classes that no other dimension has: a layer with as many outputs gives the logits."""
_MOST_PARAMETERS = 30_000_000_000


class BackboneClassifier(nn.Module):
    """A linear classifier on the pooled output of a backbone that transformers gives none, such as DINOv3."""

    def __init__(self, config: PretrainedConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = pretrained_class(config)(config)
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: normalised images (B, 3, H, W). Returns logits (B, classes)."""
        return cast(Tensor, self.classifier(self.backbone(pixel_values).pooler_output))


def build(values: Mapping[str, Any], num_classes: int, origin: str) -> nn.Module:
    """The network of a configuration, with random weights, on the current default device. Raises UserError.

    A parameter that the network's forward pass never reads, such as the mask token of DINOv2, becomes a buffer: it cannot be trained.
    """
    net = _build(values, num_classes, origin)
    for name in _unread(_key(values), origin):
        path, _, own = name.rpartition(".")
        module = net.get_submodule(path)
        parameter = module._parameters.pop(own)
        assert parameter is not None, "it has a name"
        module.register_buffer(own, parameter.detach())
    return net


def pretrained_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of a network, with the classifier where it has one."""
    found: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None) or MODEL_MAPPING[type(config)]
    return cast("type[PreTrainedModel]", found[0] if isinstance(found, tuple | list) else found)


def heads_of(values: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """Paths of the linear layers that give the logits: one, or two whose mean they are (SwiftFormer). Raises UserError where none does."""
    return _heads(_key(values), origin)


def _build(values: Mapping[str, Any], num_classes: int, origin: str) -> nn.Module:
    config = configs.made(values, origin)
    config.num_labels = num_classes
    try:
        with quiet():
            if configs.is_backbone(config.model_type):
                return BackboneClassifier(config, num_classes)
            return pretrained_class(config)(config)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"a {config.model_type} needs a package that is not installed: {configs.one_line(error)}") from error
    except Exception as error:  # transformers raises many types of errors for unexpected values
        raise UserError(f"{origin} is the configuration of no {config.model_type}: {configs.one_line(error)}") from error


@cache
def _heads(key: str, origin: str) -> tuple[str, ...]:
    values = json.loads(key)
    with torch.device("meta"):
        net = _build(values, _MARK, origin)
    if (count := sum(p.numel() for p in net.parameters())) > _MOST_PARAMETERS:
        raise UserError(f"{origin} describes a network of {count:,} parameters, and at most {_MOST_PARAMETERS:,} are taken")
    found = tuple(path for path, module in net.named_modules() if isinstance(module, nn.Linear) and module.out_features == _MARK)
    if not found:
        raise UserError(f"{origin} is of a {values['model_type']}, which has no linear classifier; take a network with one")
    return found


def _one_pass(values: dict[str, Any], origin: str, size: int, device: str) -> tuple[nn.Module, Tensor]:
    """A net after a forward and a backward pass of two images, and its logits (2, 3)."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        net = _build(values, 3, origin).eval()
    # not on the meta device by default: BEiT remembers its table of indices for the nets to come
    with torch.enable_grad(), torch.device("cpu"):
        out = net(torch.zeros((2, 3, size, size), device=device))
        logits = out if isinstance(out, Tensor) else out.logits
        logits.sum().backward()
    return net, logits


@cache
def _unread(key: str, origin: str) -> tuple[str, ...]:
    """Names of the parameters without a gradient, from one pass, on the meta device if possible. Raises UserError where it fails."""
    values = json.loads(key)
    size = configs.side_of(configs.made(values, origin))
    assert size is not None, "a card's configuration says it"
    try:
        try:
            net, logits = _one_pass(values, origin, size, "meta")
        except RuntimeError:  # a network that reads values of its images cannot run without any
            net, logits = _one_pass(values, origin, size, "cpu")
    except UserError:
        raise
    except Exception as error:  # whatever a network raises for images that it cannot take
        raise UserError(f"{origin} cannot take images of {size} x {size} pixels ({configs.one_line(error)})") from error
    if tuple(logits.shape) != (2, 3):
        raise UserError(f"{origin} answers two images with {tuple(logits.shape)} values, not with one for each class of each")
    return tuple(name for name, parameter in net.named_parameters() if parameter.grad is None)


def _key(values: Mapping[str, Any]) -> str:
    """A configuration without its classes, as a text to remember answers by."""
    return json.dumps({k: v for k, v in values.items() if k not in ("id2label", "label2id", "num_labels")}, sort_keys=True)
