"""What `tltrain fit` chooses: a pure function of the data, the probe and the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tltrain.core.recipe import parse
from tltrain.fitting import choose, written
from tltrain.fitting.choose import Backbone, Depth, depths, draft, shallowest
from tltrain.fitting.facts import Facts
from tltrain.fitting.race import HEAD, judged
from tltrain.fitting.speeds import Cut, Speeds

BACKBONE = Backbone("resnet50", "DEFAULT", "ridge", "it won", "ridge 80 %")
CUTS = (Cut("layer4.0", 0.08, 100_000), Cut("layer3.0", 0.05, 200_000), Cut("all", 0.0, 0))
SPEEDS = Speeds("cpu", 2, 0.02, 0.1, CUTS, transformer=False)
HOURS = 3600.0


def facts(train: int, num_classes: int = 4, ratio: float = 1.0) -> Facts:
    least = int(train / (num_classes - 1 + ratio))
    return Facts("folder:photos", num_classes, train, train // 8, train // 4, "owl", least, "cat", int(least * ratio), 500)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("train", [30, 300, 3_000, 30_000])
def test_every_choice_is_a_recipe_that_trains_enough(train: int, num_classes: int) -> None:
    data = facts(train, num_classes)
    tried, _ = depths(data, SPEEDS, 1000 * HOURS)
    assert tried[0].cut is None
    for depth in tried:
        chosen = draft(data, BACKBONE, SPEEDS, depth, "photos-fit", "because").recipe
        assert chosen.stages[0].solve == "ridge"
        for stage in chosen.stages[1:]:
            assert stage.steps is not None
            assert stage.steps >= choose.LEAST_STEPS
            assert stage.steps * chosen.batch >= 4 * train, "each image is seen several times"
            assert (stage.views is None) == (train >= choose.MANY)


def test_the_recipe_of_the_file_is_the_recipe_of_the_draft() -> None:
    data = facts(300, ratio=5.0)
    made = draft(data, BACKBONE, SPEEDS, Depth(CUTS[0], 250, 90.0), "photos-fit", "it won\nthe race: \x1b[31m#1", seed=3)
    text = written.text(made, ["Chosen for", "you."])
    assert parse(text, "test") == made.recipe
    assert made.recipe.data.balance == "weights"
    assert "\x1b" not in text
    lines = text.splitlines()
    where = lines.index("    unfreeze: layer4.0")
    assert lines[where - 1].strip().startswith("# it won"), "a reason stands above its line"
    assert made.recipe.stages[1].carry == "last", "37 val images choose no weights"
    for path in made.reasons:
        made.recipe.override({path: made.recipe.flat()[path]})  # each reason belongs to a value


def test_what_does_not_fit_into_the_time_is_named() -> None:
    data = facts(300)
    everything, said = depths(data, SPEEDS, 100 * HOURS)
    assert [depth.name for depth in everything] == ["head", "layer4.0", "layer3.0", "all"]
    assert said == ""
    each = [depth.seconds for depth in everything[1:]]
    assert each == sorted(each)
    some, said = depths(data, SPEEDS, 3 * each[0] + 1)
    assert [depth.name for depth in some] == ["head", "layer4.0"]
    assert "layer3.0" in said
    assert "all" in said
    none, _ = depths(data, SPEEDS, 1.0)
    assert [depth.name for depth in none] == ["head"]
    few, said = depths(facts(30), SPEEDS, 100 * HOURS)
    assert [depth.name for depth in few] == ["head"]
    assert "too few" in said


def test_what_a_small_test_split_can_say_is_said() -> None:
    assert facts(2_000).notes() == []
    (note,) = facts(100).notes()
    assert "90 % right of 25 test images may be 70 to 96 %" in note
    assert "no test split" in replace(facts(100), test=0).notes()[0]


def test_many_val_images_judge_in_place_of_a_race() -> None:
    tried, _ = depths(facts(30_000), SPEEDS, 1000 * HOURS)
    assert [depth.name for depth in tried] == ["head", "layer4.0"]
    assert draft(facts(30_000), BACKBONE, SPEEDS, tried[1], "a", "b").recipe.stages[1].carry == "best"


def test_uneven_classes_and_characters() -> None:
    even, uneven = (draft(facts(300, ratio=r), BACKBONE, SPEEDS, Depth(None), "a", "b").recipe for r in (2.0, 4.0))
    assert (even.data.balance, uneven.data.balance) == ("none", "weights")
    digits = replace(facts(300), source="digits")
    assert not draft(digits, BACKBONE, SPEEDS, Depth(None), "a", "b").recipe.data.flip


@pytest.mark.parametrize(
    ("accuracy", "low", "wins"),
    [
        ({"head": 0.8, "a": 0.9, "b": 0.95}, {"head": 0.1, "a": 0.02, "b": 0.0}, "b"),
        ({"head": 0.8, "a": 0.9, "b": 0.95}, {"head": 0.1, "a": -0.01, "b": 0.0}, "a"),
        ({"head": 0.9, "a": 0.9, "b": 0.9}, {"head": 0.0, "a": 0.0, "b": 0.0}, "head"),
        ({"head": 0.8, "a": 0.81, "b": 0.79}, {"head": -0.02, "a": 0.0, "b": 0.01}, "head"),
    ],
)
def test_the_shallowest_within_noise_of_the_best_wins(accuracy: dict[str, float], low: dict[str, float], wins: str) -> None:
    assert shallowest(list(accuracy), accuracy, low) == wins


def test_a_race_is_paired_image_by_image() -> None:
    ids = [f"{i}.png" for i in range(200)]
    by_head = set(ids[:150])
    better = {name: float(name in by_head or i < 190) for i, name in enumerate(ids)}
    noise = {name: float((name in by_head) != (i % 50 == 0)) for i, name in enumerate(ids)}
    a_little = {name: float(name in by_head or i < 157) for i, name in enumerate(ids)}
    assert judged({"deep": better}, by_head).chosen == "deep"
    assert judged({"deep": a_little}, by_head).chosen == "deep", "seven images more, and none lost: no luck"
    assert judged({"deep": noise}, by_head).chosen == HEAD
    assert judged({"deep": better, "all": better}, by_head).chosen == "deep"
    assert judged({}, by_head).chosen == HEAD
    assert "95.0\u202f%" in judged({"deep": better}, by_head).sentence
