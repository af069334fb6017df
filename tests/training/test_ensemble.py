"""Several networks as one teacher: the mean of their softened predictions, each behind its own normalisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tltrain.cache.frozen import FrozenModel
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone, load
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.models.factory import Loaded
from tltrain.training.experiment import open_weights
from tltrain.training.losses.ensemble import ensemble
from tltrain.training.plan_table import taught_by

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = ("a", "b", "c")


def member(name: str, seed: int) -> Loaded:
    """A network of random weights, with a head that tells images apart."""
    loaded = factory.load(Backbone(name=name), classes=CLASSES, size=32, resize=32, head="new", seed=seed)
    for parameter in loaded.chain.parameters_of(len(loaded.chain.blocks) - 1):
        torch.nn.init.normal_(parameter[1], std=0.3, generator=torch.Generator().manual_seed(seed))
    return loaded


def softened(loaded: Loaded, temperature: float) -> Tensor:
    with torch.no_grad():
        return (loaded.chain(IMAGES) / temperature).softmax(1)


def test_it_predicts_the_mean_of_its_members_at_the_temperature() -> None:
    """A member that sees images as [0, 255] would (another mean and std) counts as it predicts, and so does another family."""
    members = [member("resnet-micro", 0), member("vit-tiny", 1)]
    other = members[0].chain
    card = replace(members[0].card, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    members.append(replace(members[0], chain=Chain(other.net, other.blocks, card.mean, card.std).eval(), card=card))
    together = ensemble(members, temperature=2.5)
    want = torch.stack([softened(each, 2.5) for each in members]).mean(0)
    assert not torch.allclose(want, softened(members[0], 2.5), atol=0.02)
    torch.testing.assert_close(softened(together, 2.5), want)
    torch.testing.assert_close(softened(ensemble(members[:1], 4.0), 1.0), softened(members[0], 1.0))


def test_its_fingerprint_and_description_know_every_member() -> None:
    """Else the stored predictions of one ensemble would be taken for those of another."""
    first, second = member("resnet-micro", 0), member("resnet-micro", 1)
    card = replace(second.card, std=(0.9, 0.9, 0.9))

    def key(*members: Loaded, temperature: float = 4.0) -> tuple[str, str]:
        together = ensemble(members, temperature)
        frozen = FrozenModel(together.chain, None, torch.float16, 32, torch.no_grad)
        return frozen.fingerprint, str(together.card.config)

    keys = [
        key(first, second),
        key(second, first),
        key(first, first),
        key(first, replace(second, card=card)),
        key(first, second, temperature=2.0),
    ]
    assert len(set(keys)) == len(keys)
    assert key(first, second) == keys[0]


def test_the_plan_names_every_teacher() -> None:
    recipe = load("digits-distill")
    assert taught_by(recipe) == "one teacher: runs/digits-resnet"
    assert (
        taught_by(recipe.override({"distill.ensemble": ["runs/b"]}))
        == "two teachers: runs/digits-resnet and runs/b (the mean of their answers)"
    )
    more = [f"runs/{name}" for name in "bcd"]
    assert taught_by(recipe.override({"distill.ensemble": more})).startswith("4 teachers: runs/digits-resnet, runs/b, runs/c and runs/d (")


@pytest.mark.parametrize("key", ["backbone.weights", "distill.teacher.weights", "distill.ensemble.1"])
def test_weights_that_are_not_there_are_named_by_their_place(key: str) -> None:
    shipped = "shipped:resnet-tiny-printed"
    values = {"backbone.weights": None, "distill.teacher.weights": shipped, "distill.ensemble": [shipped, shipped]}
    recipe = load("digits-distill").override(values).override({key: "nosuch"})
    with pytest.raises(UserError, match=f"^{key} is 'nosuch', and no such file or folder exists"):
        open_weights(recipe)
