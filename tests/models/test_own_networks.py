"""A module of the caller's as a backbone: cut where it says, trained in stages with stores, stopped, gone on with, loaded, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tltrain
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone, Recipe
from tltrain.models import factory
from tltrain.models.families.own import OwnNetwork, give

Made = Callable[..., Recipe]


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Five classes of its own; a stem, two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two, self.fc = nn.Conv2d(3, 8, 3, 1, 1), Block(8, 16), Block(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.two(self.one(self.first(x))).mean((2, 3)))
        return y


class Renamed(Net):
    """The same layers and weights, and another forward."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.two(self.one(self.first(x))).amax((2, 3)))
        return y


class Undecided(Net):
    """It looks at a value, so that no tracer follows it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        x = x if float(x.detach().sum()) > -1e9 else -x
        y: Tensor = self.fc(self.two(x).mean((2, 3)))
        return y


class Noisy(Net):
    """Its own forward does more while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        x = x + torch.randn_like(x) if self.training else x
        y: Tensor = self.fc(self.two(x).mean((2, 3)))
        return y


def loaded(network: OwnNetwork, classes: int = 3) -> factory.Loaded:
    give(network)
    names = tuple("abcdefghij"[:classes])
    return factory.load(Backbone(name=network.name), classes=names, size=None, resize=None, head="new", seed=0)


@pytest.mark.parametrize(("cuts", "names"), [(["one", "two"], ["stem", "one", "two", "head"]), (["two"], ["stem", "two", "head"])])
def test_blocks_begin_where_the_caller_says(cuts: list[str], names: list[str]) -> None:
    net = Net()
    chain = loaded(tltrain.chain(net, size=32, cuts=cuts)).chain
    assert [block.name for block in chain.blocks] == names
    assert not chain.runs_whole
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        features = net.eval()
        want = features.two(features.one(features.first(chain.normalise(x)))).mean((2, 3))
        for k in range(1, len(names)):
            assert torch.equal(chain(chain(x, stop=k), start=k, stop=len(names) - 1), want)
        assert chain(x).shape == (4, 3)
        assert not chain(x).any(), "a new head is zero"
    assert net.fc.out_features == 5, "the caller's module stays as it was"


@pytest.mark.parametrize(("kind", "why"), [(Undecided, "cannot be"), (Noisy, "another one in training")])
def test_what_cannot_be_cut_runs_whole_and_says_so(kind: type[nn.Module], why: str) -> None:
    found = loaded(tltrain.chain(kind(), size=32, cuts=["two"]))
    assert found.chain.runs_whole
    assert [block.name for block in found.chain.blocks] == ["stem", "two", "head"]
    assert "it runs whole, no block can be cut off" in found.origin
    assert why in found.origin
    assert "its classifier is taken to be fc" in found.origin


def twice(made_recipe: Made, folder: Path, module: nn.Module, **more: Any) -> tltrain.Run:
    stages = [
        {"name": "head", "unfreeze": "head", "steps": 3, "lr": 0.05, "views": 1, "carry": "last"},
        {"name": "two", "unfreeze": "two", "steps": 4, "lr": 0.02, "views": 2, "augment": "light", "carry": "last"},
    ]
    network = tltrain.chain(module, size=32, cuts=["one", "two"])
    return tltrain.train(made_recipe(), folder=folder, backbone=network, stages=stages, workers=0, cache="always", **more)


def test_a_stopped_run_goes_on_with_the_module_alone_that_it_began_with(made_recipe: Made, tmp_path: Path) -> None:
    from tltrain.core.flags import RunFlags
    from tltrain.training import run as training

    whole = twice(made_recipe, tmp_path / "whole", Net())
    assert whole.outcome["outcome"] == "finished"

    class Pulled(BaseException):
        pass

    def pull(stage: str, step: int) -> None:
        if (stage, step) == ("two", 2):
            raise Pulled

    start = RunFlags(folder=tmp_path / "cut", workers=0, cache="always", save_steps=1)
    with pytest.raises(Pulled):
        training.train(whole.recipe, start, pull)
    other = Net()
    nn.init.ones_(other.first.weight)
    with pytest.raises(UserError, match="weights are not those that this run began with"):
        twice(made_recipe, tmp_path / "cut", other)
    with pytest.raises(UserError, match="weights are not those that this run began with"):
        twice(made_recipe, tmp_path / "cut", type("Net", (Renamed,), {})())
    again = twice(made_recipe, tmp_path / "cut", Net())
    assert again.outcome["outcome"] == "finished"
    assert (tmp_path / "cut" / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()


SCALE = 1.0


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


class Scaled(Net):
    """An attribute, a helper's constant, a closure and a layer of torch whose text does not say all."""

    def __init__(self, scale: float = 2.0, heads: int = 2, act: Callable[[Tensor], Tensor] = torch.relu, once: float = 1.0) -> None:
        super().__init__()
        self.scale, self.act = scale, act
        self.attend = nn.MultiheadAttention(32, heads)
        self.register_buffer("once", torch.tensor(once), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(scaled(x)) * self.scale)


def test_whatever_changes_the_answers_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def code(**arguments: Any) -> str:
        torch.manual_seed(0)
        return str(tltrain.chain(Scaled(**arguments), size=32, head="fc").card.config["code"])

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x * factor

    same = code()
    assert code() == same
    others = [code(scale=5.0), code(heads=4), code(act=times(2)), code(act=times(3)), code(once=2.0)]
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    others.append(code())
    assert len({same, *others}) == 7


def test_a_run_of_a_module_is_loaded_and_exported_with_it(
    made_recipe: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twice(made_recipe, tmp_path / "run", Net())
    network = tltrain.chain(Net(), size=32, cuts=["one", "two"])
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(tltrain.load(run.path, backbone=network).model(x), run.model(x))
    rest = tltrain.chain(Net(), size=32, cuts=["two"])
    with pytest.raises(UserError, match="is another network than the one that this run was trained with"):
        _ = tltrain.load(run.path, backbone=rest).model
    for tool in ("hf", "timm", "torchvision"):
        with pytest.raises(UserError, match="export it --to onnx or torch-export"):
            run.export(tool)
    exported = run.export("torch-export")
    assert exported.difference < 1e-4
    assert json.loads((run.path / "env.json").read_text())["data"]["classes"] == 10
    from tltrain.models.families import own

    monkeypatch.setattr(own, "_REGISTERED", {})
    assert main(["evaluate", str(run.path)]) == 2
    assert "tltrain.load(RUN, backbone=…)" in capsys.readouterr().err


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.two.conv.bias = self.two.norm.bias


class Loose(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), {}, "has no nn.Linear"),
        (Net, {"head": "one"}, "head is 'one', which is no nn.Linear of it; its nn.Linear: fc"),
        (Net, {"cuts": ["three"]}, "no such submodule; its own: fc, first"),
        (Net, {"size": 4}, "size is 4; give the side"),
        (Net, {"std": (1, 0, 1)}, "std is"),
        (Net, {"name": "a b"}, "name is 'a b'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), {}, "cannot take images"),
        (Loose, {}, "which is not what its classifier fc returns"),
        (Tied, {}, "two.conv.bias and two.norm.bias are one tensor"),
    ],
)
def test_a_module_that_is_no_classifier_is_refused(make: Callable[[], nn.Module], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tltrain.chain(make(), **{"size": 32, **arguments})


def test_a_cut_that_cannot_be_made_is_said() -> None:
    with pytest.raises(UserError, match=r"cuts has 'two.conv', and module:Net cannot be cut there"):
        loaded(tltrain.chain(Net(), size=32, cuts=["two", "two.conv"]))
