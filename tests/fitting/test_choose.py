"""What `tltrain fit` chooses: a pure function of the data, the probe and the machine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tltrain.analysis.at_hand import Candidate
from tltrain.analysis.probe.judge import Ask
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Backbone, parse
from tltrain.evaluation.multilabel.judged import by_logits, by_right
from tltrain.fitting import choose, looking, written
from tltrain.fitting.choose import FAR, USUAL_LR, Chosen, Depth, depths, draft, with_rate
from tltrain.fitting.facts import Facts
from tltrain.fitting.looking import LEAST_PROBED, balance, bounded, choose_crop, choose_size, per_class_for, preferred, sizes_to_try
from tltrain.fitting.lr_range import Found
from tltrain.fitting.race import against_head
from tltrain.training.depths.judge import HEAD, shallowest

WHY = {"backbone.name": "it won", "data.size": "the weights' own", "stages.0.solve": "ridge 80 %"}
CHOSEN = Chosen("resnet50", "DEFAULT", "ridge", False, "cpu", WHY)
SECONDS = {"layer4.0": 100.0, "layer3.0": 200.0, "all": 400.0}
HOURS = 3600.0


def seconds_of(depth: Depth) -> float:
    return SECONDS[depth.name]


def facts(train: int, num_classes: int = 4, ratio: float = 1.0) -> Facts:
    least = int(train / (num_classes - 1 + ratio))
    return Facts("folder:photos", num_classes, train, train // 8, train // 4, "owl", least, "cat", int(least * ratio), 500)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("train", [30, 300, 3_000, 30_000])
def test_every_choice_is_a_recipe_that_trains_enough(train: int, num_classes: int) -> None:
    data = facts(train, num_classes)
    tried, _ = depths(data, CHOSEN, list(SECONDS), seconds_of, 1000 * HOURS)
    assert tried[0].is_head
    for depth in tried:
        chosen = draft(data, CHOSEN, depth, "photos-fit", "because").recipe
        assert chosen.stages[0].solve == "ridge"
        for stage in chosen.stages[1:]:
            assert stage.steps is not None
            assert stage.steps >= choose.LEAST_STEPS
            assert stage.steps * chosen.batch >= 4 * train, "each image is seen several times"
            assert (stage.views is None) == (train >= choose.MANY)


def test_the_recipe_of_the_file_is_the_recipe_of_the_draft() -> None:
    data, chosen = facts(300, ratio=5.0), replace(CHOSEN, balanced=True, reasons={**WHY, "data.balance": "it paid"})
    made = draft(data, chosen, Depth("layer4.0", 250, 90.0, 2e-4, "searched"), "photos-fit", "it won\nthe race: \x1b[31m#1", seed=3)
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


@pytest.mark.parametrize("train", [60, 300, 30_000])
def test_every_line_that_was_chosen_has_a_reason(train: int) -> None:
    data = replace(facts(train, ratio=5.0), source="digits", cuts_val=True)
    chosen = replace(CHOSEN, size=160, per_class=50, reasons={**WHY, "data.balance": "it paid", "data.per_class": "the time"})
    for which, depth in ((CHOSEN, Depth(HEAD)), (chosen, Depth(HEAD)), (chosen, Depth("layer4.0", 250, 90.0, 2e-4, "searched"))):
        made = draft(data, which, depth, "a", "b")
        parts = {"data.": made.values["data"], **{f"stages.{i}.": stage for i, stage in enumerate(made.values["stages"])}}
        lines = {f"{where}{key}" for where, part in parts.items() for key in part} | {"batch", "backbone.name"}
        lines -= {f"{where}{key}" for where in parts for key in ("name", "source")}
        if train >= choose.MANY:
            lines.discard("stages.1.views")  # none: a fresh view each time, as the reason of augment says
        assert lines == set(made.reasons)


def test_where_classes_have_few_images_a_solved_head_learns_from_val_too() -> None:
    few, usual = replace(facts(60), cuts_val=True), 0.1
    made = draft(few, CHOSEN, Depth(HEAD), "a", "b")
    assert made.recipe.data.val_fraction == 0
    assert made.reasons["data.val_fraction"].startswith("60 training images of 4 classes are few: the 7 that val would take")
    deep = Depth("layer4.0", 250, 90.0, 2e-4, "searched")
    assert draft(few, CHOSEN, deep, "a", "b").recipe.data.val_fraction == usual, "its probabilities are calibrated on val"
    assert draft(replace(facts(80), cuts_val=True), CHOSEN, Depth(HEAD), "a", "b").recipe.data.val_fraction == usual
    assert draft(few, replace(CHOSEN, head="logistic"), Depth(HEAD), "a", "b").recipe.data.val_fraction == usual, "it does not scale itself"
    assert draft(replace(few, cuts_val=False), CHOSEN, Depth(HEAD), "a", "b").recipe.data.val_fraction == usual, "val is the source's own"


def test_what_does_not_fit_into_the_time_is_named() -> None:
    data = facts(300)
    everything, said = depths(data, CHOSEN, list(SECONDS), seconds_of, 100 * HOURS)
    assert [depth.name for depth in everything] == ["head", "layer4.0", "layer3.0", "all"]
    assert said == ""
    some, said = depths(data, CHOSEN, list(SECONDS), seconds_of, 340.0)  # trained once, two thirds of it three times, and a range test
    assert [depth.name for depth in some] == ["head", "layer4.0"]
    assert "layer3.0" in said
    assert "all" in said
    none, _ = depths(data, CHOSEN, list(SECONDS), seconds_of, 190.0)
    assert [depth.name for depth in none] == ["head"]
    few, said = depths(facts(30), CHOSEN, list(SECONDS), seconds_of, 100 * HOURS)
    assert [depth.name for depth in few] == ["head"]
    assert "too few" in said
    rare, said = depths(replace(data, smallest_n=1), CHOSEN, list(SECONDS), seconds_of, 100 * HOURS)
    assert [depth.name for depth in rare] == ["head"], "folds refuse a class whose images lie in one of them"
    assert said.startswith("owl has a single training image")
    assert len(depths(replace(facts(30_000), smallest_n=1), CHOSEN, list(SECONDS), seconds_of, 100 * HOURS)[0]) == 2, "val judges"
    cut, said = depths(data, replace(CHOSEN, per_class=50), list(SECONDS), seconds_of, 100 * HOURS)
    assert [depth.name for depth in cut] == ["head"], "where the time allows some of the images, it allows no deeper training"
    assert draft(data, replace(CHOSEN, per_class=50), cut[0], "a", said).recipe.data.per_class == 50


def test_the_shallowest_depth_is_tried_with_less_before_none_is() -> None:
    data = facts(387)  # 242 steps

    def by_steps(depth: Depth) -> float:
        return SECONDS[depth.name] * depth.steps / 242

    def tried(left_s: float, data: Facts = data) -> list[tuple[str, int, int]]:
        return [(depth.name, depth.steps, depth.folds) for depth in depths(data, CHOSEN, list(SECONDS), by_steps, left_s)[0][1:]]

    assert tried(330.0) == [("layer4.0", 242, 3)]
    assert tried(280.0) == [("layer4.0", 200, 3)], "200 steps, trained once, two thirds of them three times, and a range test: 273 s"
    assert tried(195.0) == [("layer4.0", 242, 1)], "191 s"
    assert tried(170.0) == [("layer4.0", 200, 1)], "163 s"
    assert tried(160.0) == []
    said = depths(data, CHOSEN, list(SECONDS), by_steps, 170.0)[1]
    assert said.endswith("so layer4.0 is tried with less: 200 steps in place of 242, raced on 1 of 3 folds")
    assert tried(170.0, replace(data, val=500)) == [("layer4.0", 242, 3)], "val judges, and no fold is trained"
    assert tried(110.0, replace(data, val=500)) == [("layer4.0", 200, 3)]


def test_a_probe_looks_at_as_much_as_the_time_allows() -> None:
    """More backbones before more images, round numbers of each class, and the cheapest always."""
    costs = {"dear": lambda num: 1.0 * num, "cheap": lambda num: 0.01 * num}
    counts = [30_000, 20_000, 500]
    everything = bounded(costs, counts, 55_000, 1e6)
    assert (everything.names, everything.per_class, everything.beyond) == (("dear", "cheap"), None, "")
    some = bounded(costs, counts, 55_000, 300.0)
    assert (some.names, some.per_class) == (("dear", "cheap"), 50), "150 images of both take 152 s, and 300 would take 303 s"
    assert "all 55,000 images" in some.beyond
    assert some.seconds <= 300
    few = bounded(costs, counts, 55_000, 20.0)
    assert (few.names, few.per_class) == (("cheap",), 500), "1,500 images take 15 s"
    assert "dear" in few.beyond
    assert bounded(costs, counts, 55_000, 0.0).per_class == LEAST_PROBED
    assert bounded(costs, [12, 9], 25, 0.0).names == ("cheap",)
    assert per_class_for(counts, 0.1) == 2_000, "4,500 of 50,500 images; 5,000 of each class would be 10,500"


def test_another_size_must_cost_next_to_nothing_or_lead_by_more_than_luck() -> None:
    assert sizes_to_try(224, 500, 300) == [160, 288]
    assert sizes_to_try(224, 150, 300) == [160], "larger images than the pictures are would be blown up"
    assert sizes_to_try(224, 500, 299) == [288], "so few cannot show that a smaller size costs nothing"
    own_N = np.arange(400) < 300
    level_N = np.where(np.arange(400) % 60 == 0, ~own_N, own_N) | (np.arange(400) > 396)
    own, worse, better, level = map(by_right, (own_N, np.arange(400) < 290, np.arange(400) < 330, level_N))
    luck = by_right(np.where(np.arange(400) % 40 == 0, ~own_N, own_N))
    assert choose_size({224: own, 160: own, 288: own}, 224).size == 160
    assert choose_size({224: own, 160: worse, 288: own}, 224).size == 224
    assert choose_size({224: own, 160: worse, 288: better}, 224).size == 288
    assert choose_size({224: own, 160: own, 288: better}, 224).size == 288
    assert level.value >= own.value - 0.005
    assert choose_size({224: own, 160: level}, 224).size == 224, "about as many, and it may be 2 points fewer"
    assert choose_size({224: own, 288: luck}, 224).size == 224
    assert choose_size({224: own}, 224).size is None, "nothing was chosen"
    assert choose_size({224: own, 160: level}, 224).judged is own
    assert "72.5\u202f% at 160 px, 75.0\u202f% at 224 px" in choose_size({224: own, 160: worse}, 224).why


def test_of_two_crops_that_cost_the_same_the_one_that_is_right_more_often_is_taken() -> None:
    cropped, whole = by_right(np.arange(400) < 300), by_right(np.arange(400) < 302)
    is_whole, why = choose_crop(cropped, whole)
    assert is_whole
    assert why.startswith("no crop at the shorter side: 75.5\u202f% out of fold, 75.0\u202f% with the crop of the weights")
    assert why.endswith(", which may be luck, but costs nothing")
    assert "luck" not in choose_crop(cropped, by_right(np.arange(400) < 330))[1]
    assert choose_crop(cropped, cropped) == (False, ""), "that of the weights, where nothing tells them apart"
    assert choose_crop(whole, cropped) == (False, "")
    assert choose_crop(cropped, None) == (False, "")
    seen = replace(CHOSEN, size=224, resize=224)
    assert draft(facts(300), seen, Depth("head"), "x", "").recipe.data.resize == 224


def test_a_whole_picture_that_does_not_fit_the_time_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    network: Any = SimpleNamespace(size=224, resize=256)
    monkeypatch.setattr(looking, "_network", lambda *_: network)
    monkeypatch.setattr(looking, "_cost", lambda *_: lambda num: 90.0)
    ask, candidate = Ask("folder:a"), Candidate("a", Backbone(name="a"))
    own: Any = SimpleNamespace(
        ask=ask, num_classes=2, num_images=40, rows=[SimpleNamespace(backbone="a", judged=by_right(np.ones(40, bool)))]
    )
    images: Any = None
    sized = looking.probe_sizes(ask, candidate, own, images, network, 64, RunFlags(), Console(True), 60.0)
    assert sized.size is None
    assert "the whole picture (1 min 30 s) beside 224 px; more --minutes try it" in " ".join(capsys.readouterr().out.split())


def test_a_larger_size_that_leads_in_one_group_alone_may_be_luck() -> None:
    right, group_N = {224: np.arange(60) >= 12, 288: np.ones(60, bool)}, np.arange(60) // 12
    assert choose_size({size: by_right(each) for size, each in right.items()}, 224).size == 288, "twelve images more, and none lost"
    grouped = {size: by_right(each, group_N) for size, each in right.items()}
    assert choose_size(grouped, 224).size == 224, "twelve photographs of one object"


def test_logistic_regression_must_lead_by_more_than_luck() -> None:
    ridge_N, better_N = np.arange(400) < 300, np.arange(400) < 320
    ridge, better, luck = map(by_right, (ridge_N, better_N, (np.arange(400) >= 7) & (np.arange(400) < 310)))
    assert luck.value > ridge.value
    assert preferred(ridge, luck)[0] == "ridge"
    kind, why = preferred(ridge, better)
    assert (kind, why) == ("logistic", "worked out, not trained: 80.0\u202f% out of fold, ridge 75.0\u202f%")
    assert preferred(better, ridge)[0] == "ridge"
    twenty = np.arange(400) // 20
    assert preferred(by_right(ridge_N, twenty), by_right(better_N, twenty))[0] == "ridge", "all twenty are of one group"


def test_of_several_labels_val_is_kept_for_their_thresholds() -> None:
    few = replace(facts(40), cuts_val=True)
    assert draft(few, CHOSEN, Depth("head"), "x", "").values["data"]["val_fraction"] == 0
    labels = draft(replace(few, label_separator="|"), CHOSEN, Depth("head"), "x", "")
    assert "val_fraction" not in labels.values["data"]
    assert labels.recipe.select == "map"


def test_of_several_labels_what_is_chosen_leads_in_mean_average_precision() -> None:
    random = np.random.default_rng(0)
    label_NK = random.integers(0, 2, (400, 3))
    noisy, sure = (by_logits(label_NK + scale * random.normal(size=(400, 3)), label_NK) for scale in (1.0, 0.2))
    kind, why = preferred(noisy, sure)
    assert (kind, why) == ("logistic", f"worked out, not trained: {sure.shown} out of fold, ridge {noisy.shown}")
    assert sure.shown.startswith("mAP 9")
    assert preferred(sure, noisy)[0] == "ridge"
    assert choose_size({224: noisy, 288: sure}, 224).size == 288
    assert choose_size({224: sure, 160: noisy}, 224).size == 224
    assert choose_crop(noisy, sure)[0]


def test_classes_are_weighted_only_where_that_raises_f1_by_more_than_luck() -> None:
    label = np.repeat([0, 1], [300, 60])
    plain = np.where(np.arange(360) < 320, 0, 1)  # a third of the rare class is drowned out
    few = np.where(np.arange(360) < 319, 0, 1)
    told = facts(360, 2, ratio=5.0)
    assert balance(label, plain, label, told)[0]
    assert balance(label, plain, few, told)[0] is False, "one image more"
    assert balance(label, plain, plain, told)[0] is False
    assert balance(label, label, plain, told)[0] is False
    why = balance(label, label, plain, told)[1]
    assert "cat has 5.0 times as many images as owl" in why
    assert "without 100.0\u202f%: no more than luck would give" in why


def test_a_range_test_moves_the_usual_rate_within_bounds() -> None:
    def found(steepest: float | None, lowest: float) -> Found:
        return Found(np.ones(3), np.ones(3), steepest, lowest)

    depth, usual = Depth("layer4.0", 200), USUAL_LR[False]
    taken = with_rate(depth, CHOSEN, found(2e-4, 1e-2))
    assert taken.lr == 2e-4
    assert "falls fastest at 2.0e-04" in taken.why_lr
    assert with_rate(depth, CHOSEN, found(1.0, 20.0)).lr == pytest.approx(FAR * usual, rel=0.2)
    assert with_rate(depth, CHOSEN, found(1e-7, 1e-6)).lr == pytest.approx(usual / FAR)
    assert "kept within 3 times the usual" in with_rate(depth, CHOSEN, found(1.0, 20.0)).why_lr
    assert with_rate(depth, CHOSEN, found(None, 1e-6)).lr == usual
    assert "not searched" in with_rate(depth, CHOSEN, None).why_lr
    assert with_rate(depth, replace(CHOSEN, transformer=True), None).lr == USUAL_LR[True]


def test_what_a_small_test_split_can_say_is_said() -> None:
    assert facts(2_000).notes() == []
    (note,) = facts(100).notes()
    assert "90 % right of 25 test images may be 70 to 96 %" in note
    assert "no test split" in replace(facts(100), test=0).notes()[0]


def test_many_val_images_judge_in_place_of_a_race() -> None:
    tried, _ = depths(facts(30_000), CHOSEN, list(SECONDS), seconds_of, 1000 * HOURS)
    assert [depth.name for depth in tried] == ["head", "layer4.0"]
    assert draft(facts(30_000), CHOSEN, tried[1], "a", "b").recipe.stages[1].carry == "best"


def test_uneven_classes_and_characters() -> None:
    untried, left, weighted = (
        draft(facts(300, ratio=4.0), replace(CHOSEN, balanced=pays, reasons=reasons), Depth(HEAD), "a", "b").values["data"].get("balance")
        for pays, reasons in ((False, WHY), (False, {**WHY, "data.balance": "luck"}), (True, {**WHY, "data.balance": "it paid"}))
    )
    assert (untried, left, weighted) == (None, "none", "weights")
    digits = replace(facts(300), source="digits")
    assert not draft(digits, CHOSEN, Depth(HEAD), "a", "b").recipe.data.flip


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
    assert shallowest(list(accuracy), max(accuracy, key=accuracy.__getitem__), low) == wins


def test_a_race_is_paired_image_by_image() -> None:
    ids = [f"{i}.png" for i in range(200)]
    by_head = {name: float(i < 150) for i, name in enumerate(ids)}
    better = {name: float(i < 190) for i, name in enumerate(ids)}
    noise = {name: float((i < 150) != (i % 50 == 0)) for i, name in enumerate(ids)}
    a_little = {name: float(i < 157) for i, name in enumerate(ids)}
    assert against_head({"deep": better}, by_head).chosen == "deep"
    assert against_head({"deep": a_little}, by_head).chosen == "deep", "seven images more, and none lost: no luck"
    assert against_head({"deep": noise}, by_head).chosen == HEAD
    assert against_head({"deep": better, "all": better}, by_head).chosen == "deep"
    assert against_head({}, by_head).chosen == HEAD
    assert "95.0\u202f%" in against_head({"deep": better}, by_head).sentence
    twenty = {name: i // 50 for i, name in enumerate(ids)}
    assert against_head({"deep": better}, by_head, twenty).chosen == HEAD, "all that it gains are of one group"
    some = {name: by_head[name] for name in ids[:100]}
    assert against_head({"deep": better}, some).chosen == HEAD, "images that the head did not judge are not counted as its mistakes"
    assert against_head({HEAD: better, "deep": better}, None).chosen == HEAD, "a head that was raced too"
    assert against_head({HEAD: by_head, "deep": better}, None).chosen == "deep"
