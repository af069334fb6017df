"""The benchmark of evidence: the variants of its question of methods, and which of them are trained."""

from __future__ import annotations

import pytest

from benchmarks import evidence
from tltrain.core import recipe as recipes
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    return recipes.parse(recipes.shipped()["folder-small"].read_text(encoding="utf-8"), "folder-small")


def test_the_methods_differ_in_the_last_stage_and_are_as_long(recipe: Recipe) -> None:
    variants = evidence.by_methods(recipe)
    assert next(iter(variants)) == "in stages"
    steps = {title: sum(stage.steps or 0 for stage in variant.stages) for title, variant in variants.items()}
    assert set(steps.values()) == {350}
    last = {title: variant.stages[-1] for title, variant in variants.items()}
    assert (last["biases and norms"].trains, last["LoRA"].trains) == ("biases_and_norms", "lora")
    assert (last["EMA"].carry, last["EMA"].ema, last["blend"].carry) == ("ema", 0.999, "blend")
    assert (last["all at once, layer decay"].unfreeze, last["all at once, layer decay"].views) == ("all", None)
    assert variants["the same, random weights"].backbone.weights is None
    assert len({variant.name for variant in variants.values()}) == len(variants), "each has a folder of its own"


def test_the_first_title_is_what_others_are_compared_with(recipe: Recipe) -> None:
    variants = evidence.by_methods(recipe)
    assert list(evidence._chosen(variants, ["LoRA", "in stages"])) == ["LoRA", "in stages"]
    assert evidence._chosen(variants, None) == variants
    with pytest.raises(UserError, match="--only is 'lora', and no variant is called that; there are: in stages; biases and norms; LoRA"):
        evidence._chosen(variants, ["lora"])
