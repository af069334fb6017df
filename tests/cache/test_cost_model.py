"""What is worth storing, and where: the arithmetic of tltrain plan's store lines."""

from __future__ import annotations

from typing import Any

import pytest

from tltrain.cache import cost_model
from tltrain.cache.cost_model import LEAST_SAVED_S, Budget, Choice, Speed, choose
from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.recipe import Recipe, validate
from tltrain.core.stage_plan import StagePlan
from tltrain.models.chain import Chain
from tltrain.models.factory import skeleton

GB = 10**9
ROOM = Budget(device=1 * GB, memory=10 * GB, disk=100 * GB)
SPEED = Speed(image_s=0.002, frozen_s=0.008, row_bytes=2000)


def chain_of(recipe: Recipe) -> Chain:
    return skeleton(recipe.backbone, 10, 32, None).chain


def planned(num_samples: int = 100, **changes: Any) -> tuple[Recipe, StagePlan]:
    stage = {"name": "head", "unfreeze": "head", "epochs": 20, "lr": 0.01, "views": 4, "augment": "light"} | changes.pop("stage", {})
    raw = {"name": "r", "batch": 10, "data": {"source": "digits", "size": 32}, "backbone": {"name": "resnet-micro"}, "stages": [stage]}
    recipe = validate(raw | changes, "test")
    return recipe, stage_plan.plan(recipe, chain_of(recipe), num_samples, has_val=True)[0]


@pytest.mark.parametrize(
    ("num_bytes", "place"),
    [
        (0, "device"),
        (GB, "device"),
        (GB + 1, "memory"),
        (10 * GB, "memory"),
        (10 * GB + 1, "disk"),
        (100 * GB, "disk"),
        (100 * GB + 1, None),
    ],
)
def test_the_quickest_place_that_holds_the_rows(num_bytes: int, place: str | None) -> None:
    assert ROOM.place(num_bytes) == place


def test_the_disk_holds_every_row_whatever_they_are_read_from() -> None:
    assert Budget(device=GB, memory=GB, disk=10).place(11) is None


def test_a_choice_in_numbers() -> None:
    """20 epochs of 1,000 images in 4 views: 20,000 asked, 4,000 computed, 10 ms each."""
    choice = choose("auto", "head", "features before head, train", 1000, 4, 20_000, SPEED, ROOM)
    assert (choice.num_rows, choice.num_bytes) == (4000, 8_000_000)
    assert choice.fill_s == pytest.approx(40)
    moved = 2000 * (2 * 4000 + 4000)  # written, checked, and read into memory
    assert choice.saved_s == pytest.approx(200 - 40 - moved / cost_model.DISK_BYTES_S)
    assert choice.place == "device"
    assert choice.line() == (
        "head: features before head, train, 4 views of 1,000 images x 2 KB = 8 MB, 40 s to fill, saves 2 min 40 s: read from the device"
    )


@pytest.mark.parametrize(
    ("mode", "num_asked", "budget", "place", "why_not"),
    [
        ("auto", 2000, ROOM, "device", ""),
        ("auto", 1000, ROOM, None, "it saves less than 1 s"),  # each row once: nothing is asked for again
        ("auto", 1099, ROOM, None, "it saves less than 1 s"),
        ("auto", 1101, ROOM, "device", ""),
        ("always", 1000, ROOM, "device", ""),
        ("never", 10**9, ROOM, None, "--cache never"),
        ("auto", 2000, Budget(0, 0, 3_000_000), "disk", ""),
        ("auto", 2000, Budget(0, 3_000_000, 3_000_000), "memory", ""),
        ("auto", 2000, Budget(GB, GB, 1_999_999), None, "the budget on the disk is 2 MB"),
        ("never", 2000, Budget(0, 0, 0), None, "--cache never"),
    ],
)
def test_what_decides(mode: Any, num_asked: int, budget: Budget, place: str | None, why_not: str) -> None:
    assert LEAST_SAVED_S == 1.0
    choice = choose(mode, "head", "features", 1000, 1, num_asked, SPEED, budget)
    assert (choice.place, choice.why_not) == (place, why_not)


def test_lines_of_what_is_not_stored_or_costs_more() -> None:
    assert Choice("all", "features", why_not="fresh views").line() == "all: features not stored: fresh views"
    once = choose("always", "s", "features", 1000, 1, 500, SPEED, Budget(0, 0, GB))
    assert once.line() == "s: features, 1 view of 1,000 images x 2 KB = 2 MB, 10 s to fill, costs 5.0 s more: read from the disk"
    in_memory = choose("always", "s", "features", 1000, 1, 5000, SPEED, Budget(0, GB, GB))
    assert in_memory.line().endswith("saves 40 s: read from memory")
    seldom = choose("auto", "s", "features", 1000, 1, 1000, SPEED, ROOM)
    assert seldom.line().endswith("10 s to fill, saves 0.0 s: not stored: it saves less than 1 s")


def test_always_without_room_is_refused_with_the_numbers_and_the_remedy() -> None:
    with pytest.raises(UserError) as refused:
        choose("always", "head", "features before head, train", 1000, 4, 20_000, SPEED, Budget(0, 0, 7_000_000))
    text = str(refused.value)
    assert "1,000 images x 2 KB = 8 MB" in text
    assert "not stored: the budget on the disk is 7 MB; raise --cache-disk-gb" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mixup": 0.2, "cutmix": 1.0}, None),
        ({"views": None}, "views is null, so every step gets a new view (set views)"),
        ({"views": None, "augment": "none", "mixup": 0.2}, "views is null, so every step gets a new view (set views)"),
        ({}, None),
    ],
)
def test_obstacles_and_their_refusal(changes: dict[str, Any], says: str | None) -> None:
    recipe, stage = planned(stage=changes)
    cost_model.check_always("auto", recipe, chain_of(recipe), [stage])
    cost_model.check_always("never", recipe, chain_of(recipe), [stage])
    if says is None:
        assert cost_model.why_not_cacheable(stage) is None
        cost_model.check_always("always", recipe, chain_of(recipe), [stage])
        return
    assert str(cost_model.why_not_cacheable(stage)).startswith(says)
    with pytest.raises(UserError, match="--cache always, but stage head cannot be cached") as refused:
        cost_model.check_always("always", recipe, chain_of(recipe), [stage])
    assert says in str(refused.value)
    assert "take --cache auto" in str(refused.value)


def test_a_stage_that_freezes_nothing_is_no_obstacle_to_always_unless_there_is_a_teacher() -> None:
    recipe, stage = planned(stage={"unfreeze": "all", "views": None})
    cost_model.check_always("always", recipe, chain_of(recipe), [stage])
    taught, stage = planned(stage={"unfreeze": "all", "views": None}, distill={"teacher": {"name": "resnet-micro"}})
    with pytest.raises(UserError, match="every step gets a new view"):
        cost_model.check_always("always", taught, chain_of(taught), [stage])


@pytest.mark.parametrize(
    ("stage", "balance", "num"),
    [
        ({"epochs": 20, "views": 4}, "none", 4),
        ({"epochs": 3, "views": 4}, "none", 3),
        ({"epochs": 2.1, "views": 4}, "none", 3),
        ({"epochs": None, "steps": 10, "views": 4}, "none", 1),  # exactly one epoch
        ({"epochs": None, "steps": 11, "views": 4}, "none", 2),
        ({"epochs": 1, "views": 4}, "sampler", 4),  # what is drawn twice in an epoch shows two views
        ({"epochs": 20, "views": 1, "augment": "none"}, "none", 1),
    ],
)
def test_views_that_a_stage_asks_for(stage: dict[str, Any], balance: str, num: int) -> None:
    recipe, one = planned(stage=stage, data={"source": "digits", "size": 32, "balance": balance})
    assert cost_model.num_views(recipe, one) == num


@pytest.mark.parametrize("balance", ["none", "sampler"])
@pytest.mark.parametrize(("num_samples", "views", "epochs"), [(100, 4, 20), (100, 4, 2.1), (33, 3, 7), (7, 5, 9)])
def test_no_step_asks_for_a_view_beyond_those(num_samples: int, views: int, epochs: float, balance: str) -> None:
    """The store has rows for exactly what the order of samples will ask for."""
    from tltrain.data.sampler import SampleStream

    recipe, stage = planned(
        num_samples, stage={"views": views, "epochs": epochs}, data={"source": "digits", "size": 32, "balance": balance}
    )
    draw = (5.0,) + (1.0,) * (num_samples - 1) if balance == "sampler" else None
    stream = SampleStream(0, 0, num_samples, stage.batch, views, stage.first_epoch, draw)
    seen = {item.view for s in range(stage.num_steps) for item in stream.step(s)}
    assert seen <= set(range(cost_model.num_views(recipe, stage)))
    assert balance == "sampler" or len(seen) == cost_model.num_views(recipe, stage)


@pytest.mark.parametrize(("epochs", "eval_epochs"), [(20, 1.0), (2.5, 1.0), (1, 0.4), (3, 10), (0.3, 1.0), (6, 2)])
def test_evaluations_are_counted_as_the_loop_makes_them(epochs: float, eval_epochs: float) -> None:
    _, stage = planned(stage={"epochs": epochs, "eval_epochs": eval_epochs})
    assert stage.num_evaluations == sum(stage.evaluates_after(step) for step in range(stage.num_steps + 1))
