"""Features that are looked at before training: the stores are those of training, and what is pooled is what the network gives."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_files import digit_folder

from tltrain.analysis import pooling
from tltrain.analysis.features import EVERY, FeatureBank
from tltrain.cache import disk_store
from tltrain.cache.filling import CacheFiller
from tltrain.cache.planner import store_root
from tltrain.commands.cache_verify import Maker
from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.data.views import Views
from tltrain.training.run import train

MakeRecipe = Callable[..., Recipe]
QUIET = Console(False)
FLAGS = RunFlags(workers=0, cache="always")


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a row that is not in its store is an error."""

    def refuse(*_: Any) -> None:
        pytest.fail("rows are computed that were in the store")

    return lambda: monkeypatch.setattr(CacheFiller, "_make", refuse)


def _stage(cut: str) -> dict[str, Any]:
    return {"name": "one", "unfreeze": cut, "steps": 2, "lr": 0.01, "views": 1}


@pytest.mark.parametrize("cut", ["head", "layer3"])
def test_training_finds_the_features_of_a_probe(
    cut: str, made_recipe: MakeRecipe, tmp_path: Path, computes_nothing: Callable[[], None]
) -> None:
    recipe = made_recipe(stages=[_stage(cut)])
    with FeatureBank.open(recipe, FLAGS, QUIET) as bank:
        assert bank.features(cut).shape == (len(bank), 32 if cut == "layer3" else 128)
    computes_nothing()
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0, cache="always"))["outcome"] == "finished"


def test_the_folds_of_a_recipe_find_them_too(made_recipe: MakeRecipe, tmp_path: Path, computes_nothing: Callable[[], None]) -> None:
    data = {"source": f"folder:{digit_folder(tmp_path / 'digits')}", "per_class": None, "folds": 3, "fold": 0}
    recipe = made_recipe(data=data, stages=[_stage("head")])
    with FeatureBank.open(recipe, FLAGS, QUIET) as bank:
        stored, ids = bank.features(), bank.ids
    computes_nothing()
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0, cache="always"))["outcome"] == "finished"
    other = recipe.override({"data.fold": 1})
    with FeatureBank.open(other, FLAGS, QUIET, which=EVERY) as bank:
        found = dict(zip(bank.ids, bank.features(), strict=True))
    assert all(torch.equal(found[name], row) for name, row in zip(ids, stored, strict=True))


def test_a_probe_finds_the_features_of_a_training(made_recipe: MakeRecipe, tmp_path: Path, computes_nothing: Callable[[], None]) -> None:
    recipe = made_recipe(stages=[_stage("head")])
    assert train(recipe, RunFlags(folder=tmp_path / "run", workers=0, cache="always"))["outcome"] == "finished"
    computes_nothing()
    with FeatureBank.open(recipe, FLAGS, QUIET) as bank:
        assert len(bank.features()) == len(bank)


def test_features_are_those_of_the_network_stored_or_not(made_recipe: MakeRecipe) -> None:
    recipe = made_recipe()
    with FeatureBank.open(recipe, FLAGS, QUIET, which=EVERY) as bank:
        stored = bank.features("layer4")
        assert set(bank.split_names) == {"train", "val", "test"}
        labels, chain = bank.labels, bank.loaded.chain
        cut = bank.cut("layer4")
        some = [0, len(bank.splits[0]), len(bank) - 1]
        for i in some:
            split = next(s for s in bank.splits if s.name == bank.split_names[i])
            position = split.ids.index(bank.ids[i])
            assert labels[i] == split.labels[position]
            view = Views(split, bank.loaded.preprocess, "none", False, 0).view(position, 0)
            with torch.no_grad():
                want = chain(view.unsqueeze(0), stop=cut).mean((2, 3))[0]
            assert torch.allclose(stored[i], want, atol=1e-5)
    with FeatureBank.open(recipe, RunFlags(workers=0, cache="never"), QUIET, which=EVERY) as bank:
        assert torch.equal(bank.features("layer4"), stored)


def test_the_test_split_stays_unseen(made_recipe: MakeRecipe) -> None:
    with FeatureBank.open(made_recipe(), FLAGS, QUIET) as bank:
        assert set(bank.split_names) == {"train", "val"}
        assert len(bank.features()) == len(bank.labels) == len(bank.ids) == len(bank.groups) == sum(map(len, bank.splits))
    assert {store.made_by["split"] for store in disk_store.stores(store_root())} == {"train", "val"}


def test_what_belongs_to_an_image_stays_with_it(made_recipe: MakeRecipe, photos: Path) -> None:
    recipe = made_recipe(data={"source": f"folder:{photos}", "per_class": None, "val_fraction": 0.2, "test_fraction": 0.2})
    with FeatureBank.open(recipe, FLAGS, QUIET, which=EVERY) as bank:
        source = bank.images.source
        assert source is not None
        place = {name: i for i, name in enumerate(source.ids)}
        assert bank.ids != source.ids, "they are in another order here"
        for i, name in enumerate(bank.ids):
            at = place[name]
            assert (bank.digests[i], bank.groups[i], bank.labels[i], bank.numbers[i]) == (
                source.digests[at], source.groups[at], source.labels[at], source.numbers[at],
            )  # fmt: skip


def test_a_store_of_a_probe_can_be_verified(made_recipe: MakeRecipe) -> None:
    with FeatureBank.open(made_recipe(), FLAGS, QUIET, which=("val",)) as bank:
        bank.features("layer3")
    (store,) = disk_store.stores(store_root())
    tensors = disk_store.read(next(iter(disk_store.list_shards(store.path).values())))
    source = Maker().source(store, tensors)
    name = next(iter(disk_store.list_shards(store.path)))
    assert torch.equal(next(iter(source.compute([source.where(name, 0)]))), source.stored(tensors, 0))


def test_a_signal_ends_the_filling_and_its_shards_are_kept(made_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def say(text: str | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)

    console = Console(False)
    monkeypatch.setattr(console, "busy", say)
    before = signal.getsignal(signal.SIGINT)
    with FeatureBank.open(made_recipe(), FLAGS, console) as bank:
        with pytest.raises(StoppedAtOnce, match="SIGINT"):
            bank.features()
        assert signal.getsignal(signal.SIGINT) == before
        assert all(disk_store.remove(store) for store in disk_store.stores(store_root())), "what is broken off is not held open"
        monkeypatch.setattr(console, "busy", lambda text: None)
        assert len(bank.features()) == len(bank)


def test_several_processes_and_cuts_that_are_not_there_are_refused(made_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureBank.open(made_recipe(), FLAGS, QUIET) as bank:
        with pytest.raises(UserError, match=r"no block of resnet-tiny is called that; its blocks: head, layer4"):
            bank.features("layer9")
        with pytest.raises(UserError, match="first block"):
            bank.features("stem")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, and the launcher started 2"), FeatureBank.open(made_recipe(), FLAGS, QUIET):
        pass


class _Net(torch.nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 2))
        vars(self).update(attributes)


class _Chain(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize(
    ("net", "shape", "want"),
    [
        (_Net(), (3, 5), lambda x: x),
        (_Net(), (3, 17, 2), lambda x: x[:, 0]),  # a grid of 4 x 4 and the class token
        (_Net(), (3, 21, 2), lambda x: x[:, 0]),  # and four registers
        (_Net(), (3, 16, 2), lambda x: x.mean(1)),  # the class token comes later
        (_Net(global_pool="avg"), (3, 17, 2), lambda x: x.mean(1)),
        (torch.nn.Linear(1, 1), (3, 17, 2), lambda x: x.mean(1)),
        (torch.nn.Linear(1, 1), (3, 6, 4, 4), lambda x: x.mean((2, 3))),
        (torch.nn.Linear(1, 1), (3, 4, 4, 6), lambda x: x.mean((1, 2))),
        (torch.nn.Linear(1, 1), (3, 4, 4, 4), lambda x: x.mean((2, 3))),
    ],
    ids=str,
)
def test_pooling(net: torch.nn.Module, shape: tuple[int, ...], want: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pooling.pooled(_Chain(net), x), want(x))  # type: ignore[arg-type]
