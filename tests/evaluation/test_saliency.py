"""Where a network found its answer: a network whose class is a colour looks at the patch of that colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tltrain.evaluation.saliency import lit, saliency
from tltrain.models.chain import Block, Chain

SIDE, CELL = 8, 4


class Colours(nn.Module):
    """Three classes, which are the three channels. The body hands on channels, or patches as tokens behind a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, CELL, stride=CELL, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[:, :, None, None].expand(-1, -1, CELL, CELL) / CELL**2)
            self.head.weight.copy_(torch.eye(3))


def body(net: nn.Module, x: Tensor) -> Tensor:
    return net.get_submodule("body")(x)


def last_channels(net: nn.Module, x: Tensor) -> Tensor:
    return body(net, x).permute(0, 2, 3, 1).contiguous()


def tokens(net: nn.Module, x: Tensor) -> Tensor:
    patches = body(net, x).flatten(2).transpose(1, 2)
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def rows(net: nn.Module, x: Tensor) -> Tensor:
    return body(net, x).mean((2, 3))


def head(net: nn.Module, x: Tensor) -> Tensor:
    if x.ndim == 4:
        x = x.mean((1, 2)) if x.shape[3] == 3 else x.mean((2, 3))
    elif x.ndim == 3:
        x = x[:, 1:].mean(1)
    return net.get_submodule("head")(x)


def chain(step: object) -> Chain:
    blocks = (Block("body", ("body",), step), Block("head", ("head",), head))  # type: ignore[arg-type]
    return Chain(Colours(), blocks, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()


def patches() -> Tensor:
    """Two images: red at the top left and green at the bottom right, and the other way round."""
    images = torch.zeros(2, 3, SIDE * CELL, SIDE * CELL, dtype=torch.uint8)
    images[0, 0, :CELL, :CELL] = images[0, 1, -CELL:, -CELL:] = 255
    images[1, 1, :CELL, :CELL] = images[1, 0, -CELL:, -CELL:] = 255
    return images


@pytest.mark.parametrize("step", [body, last_channels, tokens])
@pytest.mark.parametrize("colour", [0, 1])
def test_the_patch_that_speaks_for_the_class_is_lit(step: object, colour: int) -> None:
    maps = saliency(chain(step), patches(), torch.tensor([colour, colour]))
    assert maps is not None
    assert maps.shape == (2, SIDE, SIDE)
    expected = torch.zeros(2, SIDE, SIDE)
    expected[0, -colour, -colour] = expected[1, colour - 1, colour - 1] = 1.0
    assert torch.equal(maps, expected)


def test_what_speaks_against_the_class_is_not_lit() -> None:
    against = chain(body)
    with torch.no_grad():
        against.net.get_parameter("head.weight")[0, 1] = -2.0
    maps = saliency(against, patches(), torch.tensor([0, 0]))
    assert maps is not None
    assert maps[0, 0, 0] == 1
    assert maps[0, -1, -1] == 0


def test_a_network_without_a_map_has_none() -> None:
    assert saliency(chain(rows), patches(), torch.tensor([0, 0])) is None
    whole = Chain(Colours(), (Block("all", ("body", "head"), None),), mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    assert saliency(whole, patches(), torch.tensor([0, 0])) is None


def test_what_did_not_count_is_in_shade() -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    shown = lit(pixels, np.eye(1, 16).reshape(4, 4).astype(np.float32))
    assert shown.shape == pixels.shape
    assert shown[2, 2].min() > 180
    assert shown[-4, -4].max() == 30
