"""Tiny networks of transformers with random weights, one for each kind of architecture, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

CLASSES = ("ant", "bee", "cat")
_VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
_MLP: dict[str, Any] = {**_VIT, "intermediate_size": 48}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 2, 1]}
_SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4}
_PYRAMID: dict[str, Any] = {**_STAGES, "num_attention_heads": [1, 1, 2, 2]}
_RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 1]}
_TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 60_000}
_PAIR: dict[str, Any] = {"vision_config": _MLP, "text_config": _TEXT}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("BeitConfig", {**_MLP, "use_relative_position_bias": True, "use_absolute_position_embeddings": True}),
    "beit-shared": ("BeitConfig", {**_MLP, "use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    "bit": ("BitConfig", {**_RESNET, "num_groups": 4}),
    "clip": ("CLIPConfig", _PAIR),
    "convnext": ("ConvNextConfig", {**_STAGES, "image_size": 32}),
    "convnextv2": ("ConvNextV2Config", {**_STAGES, "image_size": 32}),
    "cvt": ("CvtConfig", {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}),
    "data2vec-vision": ("Data2VecVisionConfig", _MLP),
    "deit": ("DeiTConfig", _MLP),
    "dinov2": ("Dinov2Config", {**_VIT, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2Config", {**_VIT, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegistersConfig", {**_VIT, "mlp_ratio": 2}),
    "donut-swin": ("DonutSwinConfig", _SWIN),
    "efficientnet": ("EfficientNetConfig", {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 32}),
    "focalnet": (
        "FocalNetConfig",
        {"embed_dim": 8, "depths": [1, 2, 1], "focal_levels": [2] * 3, "focal_windows": [3] * 3, "image_size": 32, "patch_size": 2},
    ),
    "hgnet_v2": ("HGNetV2Config", {}),
    "hiera": (
        "HieraConfig",
        {
            "embed_dim": 8, "image_size": [32, 32], "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8], "masked_unit_size": [8, 8],
            "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "query_stride": [2, 2], "num_query_pool": 2,
        },
    ),
    "ijepa": ("IJepaConfig", _MLP),
    "levit": (
        "LevitConfig",
        {
            "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [2, 2, 2], "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "image_size": 64,
        },
    ),
    "metaclip_2": ("MetaClip2Config", _PAIR),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.25, "image_size": 32}),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.25, "image_size": 32}),
    "mobilevit": (
        "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "num_attention_heads": 2, "image_size": 64},
    ),
    "mobilevitv2": ("MobileViTV2Config", {"width_multiplier": 0.25, "image_size": 64}),
    "poolformer": ("PoolFormerConfig", _STAGES),
    "pvt": ("PvtConfig", {**_PYRAMID, "image_size": 64}),
    "pvt_v2": ("PvtV2Config", {**_PYRAMID, "image_size": 64}),
    "regnet": ("RegNetConfig", {**_RESNET, "groups_width": 8}),
    "resnet": ("ResNetConfig", _RESNET),
    "segformer": ("SegformerConfig", _PYRAMID),
    "siglip": ("SiglipConfig", _PAIR),
    "swin": ("SwinConfig", _SWIN),
    "swinv2": ("Swinv2Config", _SWIN),
    "textnet": (
        "TextNetConfig",
        {
            "stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32], "image_size": [32, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [3, 1]], [[3, 3]], [[3, 3]]], "conv_layer_strides": [[1], [2, 1], [2], [2]],
        },
    ),
    "vit_msn": ("ViTMSNConfig", _MLP),
}  # fmt: skip
"""Name to the class of its configuration, and the values of a tiny one. All have a classifier, and can be cut between their layers."""
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3_convnext": ("DINOv3ConvNextConfig", {**_STAGES, "image_size": 32}),
    "dinov3_vit": ("DINOv3ViTConfig", _MLP),
    "pixio": ("PixioConfig", _MLP),
}
"""As above. transformers has no classifier for these."""
WITHOUT_SIDE = 64
"""Image size of the networks whose configuration gives none."""


def config_of(name: str, **changes: Any) -> Any:
    """Three classes, and an image size."""
    kind, values = {**CONFIGS, **BACKBONES}[name]
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
    config = getattr(transformers, kind)(**{**values, **labels, **changes})
    if side_of(config) is None:
        config.image_size = WITHOUT_SIDE
    if config.num_labels != len(CLASSES):
        config.num_labels = len(CLASSES)  # PvtConfig does not count the names
    return config


def side_of(config: Any) -> Any:
    side = getattr(getattr(config, "vision_config", config), "image_size", None)
    return side[0] if isinstance(side, list | tuple) else side


def net_of(config: Any) -> PreTrainedModel:
    """With random weights, the biases, the head and the statistics too, so that no tensor is what a fresh net would hold."""
    kind = type(config)
    mapping: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if kind in mapping and isinstance(mapping[kind], tuple):
        config.architectures = [mapping[kind][0].__name__]
    auto: Any = AutoModelForImageClassification if kind in mapping else transformers.AutoModel
    net: PreTrainedModel = auto.from_config(config).eval()
    return random_weights(net)


def random_weights(net: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


def saved(net: PreTrainedModel, folder: Path, **processor: Any) -> Path:
    """A folder of save_pretrained, with a processor where its settings are given."""
    net.save_pretrained(folder)
    if processor:
        ViTImageProcessor(**processor).save_pretrained(folder)
    return folder


def images(size: int, num: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
