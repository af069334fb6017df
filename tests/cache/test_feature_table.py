"""What is frozen is computed once: a run from stored features or logits is the run that computes them, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import same, trials, world
from benchmarks.same import CUTS
from benchmarks.trials import HEAD, LAST
from benchmarks.world import Trial
from tltrain.cache import cost_model, disk_store, feature_table, planner
from tltrain.cache.disk_store import Store
from tltrain.cache.feature_table import Layout
from tltrain.cache.frozen import FrozenModel, without_suffix
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Backbone, validate
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.training.run import train

DISK_MB = 2
VIEWS = {"steps": 20, "views": 4, "augment": "light", "eval_epochs": 1}  # four epochs of 60 images
MIDDLE = {"name": "mid", "steps": 8, "lr": 0.002, "views": 1, "eval_epochs": 1, "clip": 0.5}


def stages(backbone: str) -> list[dict[str, Any]]:
    """The head behind four views, then a deeper cut behind one."""
    return [HEAD | VIEWS, MIDDLE | {"unfreeze": CUTS[backbone]["deeper"]}]


@dataclass
class Watched:
    """What this process does with stores, while a test lasts."""

    cache: Path
    written: list[str] = field(default_factory=list)
    num_asked: int = 0
    """Calls of frozen networks."""
    before: Callable[[int], None] = lambda number: None
    """Called with the number of each shard before it is written, from 1."""


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Stores of this test alone, in shards as small as can be: the last one of each view is filled in part."""
    made = Watched(tmp_path / "cache")
    monkeypatch.setenv("TLTRAIN_CACHE", str(made.cache))
    monkeypatch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)
    write, ask = Store.write, FrozenModel.__call__

    def written(self: Store, name: str, tensors: dict[str, Tensor]) -> Path:
        made.before(len(made.written) + 1)
        file = write(self, name, tensors)
        made.written.append(f"{self.path.name}/{name}")
        return file

    def asked(self: FrozenModel, images: Tensor) -> Tensor:
        made.num_asked += 1
        return ask(self, images)

    monkeypatch.setattr(Store, "write", written)
    monkeypatch.setattr(FrozenModel, "__call__", asked)
    return made


def run(spec: dict[str, Any], folder: Path, **start: Any) -> Path:
    """A run in this process, to its end."""
    assert train(validate(spec, "test"), RunFlags(folder=folder, workers=0, **start))["outcome"] == "finished"
    return folder


# --- the same run


@pytest.mark.parametrize("backbone", list(CUTS))
def test_a_stored_run_is_the_run_without_a_store(backbone: str, watched: Watched, tmp_path: Path) -> None:
    """With accumulation; rows in memory, then mapped from the disk; nothing is computed twice."""
    spec, start = trials.recipe(backbone=trials.NETS[backbone], stages=stages(backbone)), {"max_device_batch": 5}
    undisturbed = run(spec, tmp_path / "online", cache="never", **start)
    assert watched.num_asked > 28 * 3, "every micro-batch of every step"
    assert not watched.written
    watched.num_asked = 0
    assert trials.differences(run(spec, tmp_path / "stored", cache="always", **start), undisturbed) == []
    # train: 60 images in 2 shards for each of 4 + 1 views; val: 143 in 5 shards for each cut
    assert len(set(watched.written)) == len(watched.written) == 2 * 4 + 5 + 2 + 5
    assert watched.num_asked == len(watched.written)
    assert "1 view of 60 images" in (tmp_path / "stored" / "plan.txt").read_text()
    again = run(spec, tmp_path / "again", cache="always", cache_memory_gb=0, **start)
    assert trials.differences(again, undisturbed) == []
    assert watched.num_asked == len(watched.written) == 20
    plan = (again / "plan.txt").read_text()
    assert plan.count("read from the disk") == 4
    assert "read from memory" not in plan


def test_a_teachers_logits_are_stored_for_a_student_that_trains_fully(watched: Watched, finished_run: Path, tmp_path: Path) -> None:
    """And for the next student of it, which asks the teacher nothing."""
    distill = {"teacher": {"weights": str(finished_run)}, "temperature": 2.0, "weight": 0.5}
    full = LAST | {"steps": 10, "views": 2, "augment": "light", "lr": 0.01}
    spec = trials.recipe(backbone=trials.NETS["vit-tiny"], distill=distill, stages=[HEAD | VIEWS, full])
    undisturbed = run(spec, tmp_path / "online", cache="never")
    assert trials.differences(run(spec, tmp_path / "stored", cache="always"), undisturbed) == []
    kinds = [name.partition("-")[0] for name in watched.written]
    assert (kinds.count("logits"), kinds.count("features")) == (2 * 4, 2 * 4 + 5)
    files = sorted((watched.cache / "store").glob("logits-*/*.safetensors"))
    assert {disk_store.read(file)["rows"].dtype for file in files} == {torch.float16}
    watched.num_asked = 0
    other = spec | {"seed": 3, "stages": [full | {"steps": 9}], "distill": distill | {"temperature": 5.0, "weight": 0.9}}
    second = run(other, tmp_path / "second", cache="always")
    assert watched.num_asked == 0
    assert trials.differences(second, run(other, tmp_path / "second-online", cache="never")) == []


def test_the_mean_prediction_of_several_teachers_is_stored(watched: Watched, finished_run: Path, tmp_path: Path) -> None:
    """A student of an ensemble waits for none of its teachers, and learns what it would learn with them in the loop."""
    second = run(trials.recipe(backbone=trials.NETS["vit-tiny"], stages=[LAST]), tmp_path / "second", cache="never")
    distill = {"teacher": {"weights": str(finished_run)}, "ensemble": [str(second)], "temperature": 2.0, "weight": 0.5}
    spec = trials.recipe(distill=distill, stages=[LAST | {"steps": 10, "views": 2, "augment": "light"}])
    undisturbed = run(spec, tmp_path / "online", cache="never")
    assert trials.differences(run(spec, tmp_path / "stored", cache="always"), undisturbed) == []
    assert [name.partition("-")[0] for name in watched.written] == ["logits"] * (2 * 2)
    alone = run(spec | {"distill": distill | {"ensemble": []}}, tmp_path / "alone", cache="never")
    assert trials.differences(alone, undisturbed) != []


def test_five_seeds_share_a_store(watched: Watched, finished_run: Path, tmp_path: Path) -> None:
    spec = trials.recipe(backbone={"weights": str(finished_run)}, stages=stages("resnet-tiny"))
    run(spec, tmp_path / "0", cache="always")
    written, num_asked = list(watched.written), watched.num_asked
    assert len(written) == num_asked == 20
    for seed in range(1, 5):
        last = run(spec | {"seed": seed}, tmp_path / str(seed), cache="always")
    assert (watched.written, watched.num_asked) == (written, num_asked)
    assert trials.differences(last, run(spec | {"seed": 4}, tmp_path / "online", cache="never")) == []


def test_another_prefix_or_view_is_another_store(watched: Watched, tmp_path: Path) -> None:
    """What must not share does not: weights, cut, augment, data; the evaluation view is one for every way to augment."""
    spec = trials.recipe(stages=[HEAD | VIEWS])
    run(spec, tmp_path / "0", cache="always")
    trained = run(trials.recipe(stages=[LAST]), tmp_path / "trained", cache="never")
    changed: list[dict[str, Any]] = [
        {"backbone": {"name": "resnet-tiny"}},  # random weights
        {"backbone": {"weights": str(trained)}},
        {"stages": [HEAD | VIEWS | {"augment": "strong"}]},
        {"stages": [HEAD | VIEWS | {"unfreeze": "layer4"}]},
        {"data": spec["data"] | {"flip": True}},
        {"data": spec["data"] | {"per_class": 5}},
    ]
    for i, changes in enumerate(changed):
        watched.written.clear()
        run(spec | changes, tmp_path / f"changed-{i}", cache="always")
        assert sum(name.rpartition("/")[2] >= "v0001" for name in watched.written) == 2 * 3, changes
    for one in (HEAD | VIEWS | {"steps": 5}, HEAD | VIEWS | {"steps": 4, "augment": "strong"}):  # an epoch at most: view 0 alone
        watched.written.clear()
        run(spec | {"stages": [one]}, tmp_path / str(one["steps"]), cache="always")
        assert len(watched.written) == (2 if one["steps"] == 5 else 0)


def test_stores_of_other_augmentations_are_not_shared_and_equal_what_is_computed(watched: Watched, tmp_path: Path) -> None:
    """Bit for bit, with what is drawn of an operation or a rectangle, one after the other into the same cache."""
    short = HEAD | VIEWS | {"steps": 8, "views": 2}
    each: list[dict[str, Any]] = [
        {}, {"erasing": 0.5}, {"augment": "trivial"}, {"augment": "rand", "erasing": 1.0}, {"augment": "none", "erasing": 0.5}
    ]  # fmt: skip
    for i, changes in enumerate(each):
        watched.written.clear()
        spec = trials.recipe(stages=[short | changes])
        stored = run(spec, tmp_path / f"stored-{i}", cache="always")
        assert any(name.rpartition("/")[2] >= "v0001" for name in watched.written), changes
        assert trials.differences(stored, run(spec, tmp_path / f"online-{i}", cache="never")) == []


def test_a_store_with_shards_of_another_size_is_another_store(watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version may make them: its rows must not be taken for those of other images."""
    spec = trials.recipe(stages=[HEAD | VIEWS])
    run(spec, tmp_path / "first", cache="always")
    monkeypatch.setattr(feature_table, "SHARD_ROWS", 64)
    assert trials.differences(run(spec, tmp_path / "second", cache="always"), tmp_path / "first") == []


def test_another_number_of_threads_is_another_store(watched: Watched, tmp_path: Path) -> None:
    """On a CPU it decides how sums are split: a ResNet-50 at 224 px differs by 6e-5 between one thread and two."""
    spec, before = trials.recipe(stages=[HEAD | VIEWS | {"steps": 5}]), torch.get_num_threads()
    run(spec, tmp_path / "one", cache="always")
    watched.written.clear()
    torch.set_num_threads(before + 1)
    try:
        run(spec, tmp_path / "two", cache="always")
    finally:
        torch.set_num_threads(before)
    assert len(watched.written) == 2 + 5


# --- the fill is disturbed


def test_a_run_that_is_stopped_in_the_fill_goes_on(watched: Watched, tmp_path: Path) -> None:
    spec = trials.recipe(stages=stages("resnet-tiny"))
    undisturbed = run(spec, tmp_path / "online", cache="never")
    for number in (3, 12):  # in the shards of train, and in those of val
        watched.before = lambda n, at=number: os.kill(os.getpid(), signal.SIGTERM) if n == at else None  # type: ignore[misc]
        outcome = train(validate(spec, "test"), RunFlags(folder=tmp_path / "run", workers=0, cache="always"))
        assert (outcome["outcome"], outcome["signal"], outcome["stage"], outcome["step"]) == ("stopped", "SIGTERM", "head", 0)
        assert len(watched.written) == number
    watched.before = lambda n: None
    assert trials.differences(run(spec, tmp_path / "run", cache="always"), undisturbed) == []
    assert len(set(watched.written)) == len(watched.written) == 20


def test_a_damaged_shard_is_made_again(watched: Watched, tmp_path: Path) -> None:
    spec = trials.recipe(stages=stages("resnet-tiny"))
    undisturbed = run(spec, tmp_path / "online", cache="never")
    run(spec, tmp_path / "first", cache="always")
    files = sorted(watched.cache.glob("store/*/*.safetensors"))
    whole = {file: file.read_bytes() for file in files}
    spoilt = files[::3]
    for i, file in enumerate(spoilt):
        content = bytearray(whole[file])
        content[-1 - 7 * i] ^= 1 << i
        file.write_bytes(content if i else content[:-5])
    watched.written.clear()
    assert trials.differences(run(spec, tmp_path / "run", cache="always"), undisturbed) == []
    assert sorted(watched.written) == sorted(f"{file.parent.name}/{file.name.partition('.')[0]}" for file in spoilt)
    assert {file: file.read_bytes() for file in watched.cache.glob("store/*/*.safetensors")} == whole


@pytest.mark.parametrize("number", [0, 2, 10])
def test_a_full_disk_is_said_and_the_run_goes_on_without(
    number: int, watched: Watched, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full from the start, while train is stored, while val is."""
    spec = trials.recipe(stages=stages("resnet-tiny"))
    undisturbed = run(spec, tmp_path / "online", cache="never")
    monkeypatch.setenv("TLTRAIN_CACHE", str(disk))

    def fill(n: int) -> None:
        if n == number:
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))

    watched.before = fill
    fill(0)
    capsys.readouterr()
    run(spec, tmp_path / "run", cache="always", cache_disk_gb=1)
    said = capsys.readouterr().out
    assert re.search(r"cache +head: features before head, (train|val) .*computed.*: .*No space left on device", said)
    assert trials.differences(tmp_path / "run", undisturbed) == []
    assert not list(disk.rglob(".v*.tmp"))


# --- budgets, and what is refused


def test_auto_stores_nothing_that_saves_less_than_a_second(watched: Watched, tmp_path: Path) -> None:
    run(trials.recipe(stages=[HEAD | VIEWS]), tmp_path / "run")
    plan = (tmp_path / "run" / "plan.txt").read_text()
    assert plan.count("not stored: it saves less than 1 s") == 2
    assert not watched.written


def test_without_room_on_the_disk_auto_goes_on_without(watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = trials.recipe(stages=[HEAD | VIEWS])
    undisturbed = run(spec, tmp_path / "online", cache="never")
    monkeypatch.setattr(cost_model, "LEAST_SAVED_S", float("-inf"))
    little = run(spec, tmp_path / "little", cache_disk_gb=1e-6)
    assert (little / "plan.txt").read_text().count("not stored: the budget on the disk is 1 KB") == 2
    assert not watched.written
    assert trials.differences(little, undisturbed) == []
    assert trials.differences(run(spec, tmp_path / "enough"), undisturbed) == []
    assert len(watched.written) == 2 * 4 + 5
    with pytest.raises(UserError, match=r"4 views of 60 images x 512 B = 123 KB.*the budget on the disk is 1 KB; raise --cache-disk-gb"):
        run(spec, tmp_path / "refused", cache="always", cache_disk_gb=1e-6)


def test_what_is_unused_makes_room_and_what_is_in_use_does_not(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = trials.recipe(stages=[HEAD | VIEWS])  # 123 KB of train, 73 KB of val
    run(spec, tmp_path / "first", cache="always", cache_disk_gb=240e-6)
    first = {path.name for path in (watched.cache / "store").iterdir()}
    another = spec | {"backbone": {"name": "resnet-tiny"}}
    other = run(another, tmp_path / "other", cache="always", cache_disk_gb=240e-6)
    assert not first & {path.name for path in (watched.cache / "store").iterdir()}, "both had to go"
    assert trials.differences(other, run(another, tmp_path / "other-online", cache="never")) == []
    capsys.readouterr()
    with contextlib.ExitStack() as held:
        for found in disk_store.stores(watched.cache / "store"):
            held.enter_context(Store(found.path.parent, found.kind, found.key, found.made_by))
        again = run(spec, tmp_path / "again", cache="always", cache_disk_gb=240e-6)
    assert "in use and leave no room" in capsys.readouterr().out
    assert trials.differences(again, tmp_path / "first") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"views": None}, "views is null, so every step gets a new view (set views)"),
        ({"views": None, "mixup": 0.2}, "views is null, so every step gets a new view (set views)"),
    ],
)
def test_always_refuses_what_cannot_be_stored(changes: dict[str, Any], says: str, watched: Watched, tmp_path: Path) -> None:
    spec = trials.recipe(stages=[HEAD | VIEWS | changes])
    with pytest.raises(UserError, match="--cache always, but stage head cannot be cached") as refused:
        run(spec, tmp_path / "run", cache="always")
    assert says in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert says in (run(spec, tmp_path / "auto") / "plan.txt").read_text()


def test_never_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "file"))
    run(trials.recipe(stages=[HEAD]), tmp_path / "run", cache="never", cache_images="never")


# --- what is frozen


def chain(name: str = "resnet-tiny") -> Chain:
    loaded = factory.load(Backbone(name=name), classes=[str(i) for i in range(10)], size=32, resize=32, head="new", seed=0)
    torch.nn.init.normal_(list(loaded.chain.parameters())[-2])  # a new head is zero: its logits would say nothing
    return loaded.chain.freeze(len(loaded.chain.blocks), norm_stats=False).eval()


def images(num: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize("backbone", list(CUTS))
def test_the_prefix_beside_a_sharded_network_takes_no_memory_for_the_rest(backbone: str) -> None:
    net = chain(backbone)
    cut = net.index(CUTS[backbone]["deeper"])
    own = without_suffix(net, cut)
    for i in range(len(own.blocks)):
        tensors = [*(p for _, p in own.parameters_of(i)), *(b for _, m in own.modules_of(i) for b in m.buffers(recurse=False))]
        assert all(t.is_meta == (i >= cut) for t in tensors)
    assert torch.equal(own(images(3), stop=cut), net(images(3), stop=cut))
    assert not any(t.is_meta for t in net.state_dict().values())


@pytest.mark.parametrize("backbone", list(CUTS))
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_answer_depends_neither_on_its_neighbours_nor_on_its_place(backbone: str, precision: str) -> None:
    net, x_BCHW = chain(backbone), images(70)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    frozen = planner.prefix_of(net, net.index(CUTS[backbone]["deeper"]), precision, finite=True, autocast=autocast)
    assert frozen.chunk == planner.CHUNK["cpu"] == 32
    whole = frozen(x_BCHW)
    assert whole.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert len(whole) == 70
    assert not whole.requires_grad
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frozen(x_BCHW[order]), whole[order])
    for part in (slice(0, 1), slice(69, 70), slice(5, 38), slice(30, 62)):
        assert torch.equal(frozen(x_BCHW[part]), whole[part])


def test_chunks_have_one_size_the_last_one_padded() -> None:
    seen: list[int] = []

    class Recorded(Chain):
        def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
            seen.append(len(x))
            return super().forward(x, start, stop)

    net = chain()
    recorded = Recorded(net.net, net.blocks, net.mean, net.std).eval()
    frozen = FrozenModel(recorded, 2, None, 8, contextlib.nullcontext)
    assert len(frozen(images(19))) == 19
    assert seen == [8, 8, 8]
    seen.clear()
    FrozenModel(recorded, 2, None, None, contextlib.nullcontext)(images(19))
    assert seen == [19], "answers that nobody could store are computed as they come"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)])
def test_features_are_rounded_to_the_dtype_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    """Without autocast here, so that the rounding is Frozen's own."""
    net = chain()
    exact = planner.prefix_of(net, 4, "no", finite=True, autocast=contextlib.nullcontext)(images(3))
    rounded = planner.prefix_of(net, 4, precision, finite=True, autocast=contextlib.nullcontext)(images(3))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("logits", ["float16", "float32"])
@pytest.mark.parametrize("finite", [True, False])
def test_a_teachers_logits_are_rounded_stored_or_not(logits: str, finite: bool) -> None:
    spec = trials.recipe(distill={"teacher": {"name": "resnet-tiny"}, "logits": logits})
    net = chain()
    teacher = planner.teacher_of(net, validate(spec, "test"), 10, finite, contextlib.nullcontext)
    said = teacher(images(5))
    assert said.dtype == getattr(torch, logits)
    assert torch.equal(said[:, :3], teacher(images(5))[:, :3])
    with torch.no_grad():
        torch.testing.assert_close(said.float(), net(images(5)), rtol=2e-3, atol=2e-3)
    assert teacher.chunk == (32 if finite else None)


@pytest.mark.parametrize(
    ("num_samples", "row_bytes", "chunk", "rows"),
    [(60, 256, 32, 512), (10**6, 4096, 32, 512), (10**6, 400_000, 32, 32), (10**6, 10**9, 64, 64), (10**6, 100_000, 64, 128)],
)
def test_a_layout_holds_every_row_once(num_samples: int, row_bytes: int, chunk: int, rows: int) -> None:
    layout = Layout.of(num_samples, 3, row_bytes, chunk)
    assert layout.shard_rows == rows
    if num_samples < 1000:
        held = [(view, i) for name in layout.names() for view, samples in [layout.rows(name)] for i in samples]
        assert held == [(view, i) for view in range(3) for i in range(num_samples)]
    assert len(layout.names()) == 3 * -(-num_samples // rows)


# --- worlds


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(CUTS))
def test_two_processes_make_the_shards_of_one(backbone: str, tmp_path: Path) -> None:
    """Byte for byte, and each world's stored run is its own run without a store, from whoever's store."""
    spec, start = trials.recipe(backbone=trials.NETS[backbone], stages=stages(backbone)), {"max_device_batch": 5}
    trial = {num: Trial(spec, str(tmp_path / f"{num}" / "run"), num, start=start) for num in (1, 2)}
    undisturbed = {num: online(trial[num], tmp_path / f"online-{num}") for num in (1, 2)}
    for num in (1, 2):
        made = world.finish(same.stored(trial[num], tmp_path / f"cache-{num}"))
        assert trials.differences(made, undisturbed[num]) == []
        assert len(set(same.written(tmp_path / f"cache-{num}"))) == len(same.written(tmp_path / f"cache-{num}")) == 20
    assert same.shards_in(tmp_path / "cache-1") == same.shards_in(tmp_path / "cache-2")
    again = Trial(spec, str(tmp_path / "again" / "run"), 2, start=start)
    asked = same.asked(tmp_path / "cache-1")
    assert trials.differences(world.finish(same.stored(again, tmp_path / "cache-1")), undisturbed[2]) == []
    assert same.asked(tmp_path / "cache-1") == asked == 20


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("backbone", list(CUTS))
def test_every_strategy_reads_the_store_of_one_process(strategy: str, backbone: str, tmp_path: Path) -> None:
    spec = trials.recipe(backbone=trials.NETS[backbone], stages=stages(backbone))
    world.finish(same.stored(Trial(spec, str(tmp_path / "one" / "run")), tmp_path / "cache"))
    asked, trial = same.asked(tmp_path / "cache"), Trial(spec, str(tmp_path / "run" / "run"), 2, strategy)
    read = world.finish(same.stored(trial, tmp_path / "cache"))
    assert same.asked(tmp_path / "cache") == asked == 20
    assert trials.differences(read, online(trial, tmp_path / "online")) == []


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_a_run_killed_in_the_fill_goes_on_and_writes_no_shard_twice(num: int, tmp_path: Path) -> None:
    draw = random.Random(f"{trials.seed()} {num}")
    kills = [(draw.randint(1, same.MOMENTS // 2), draw.choice((None, *range(num)))) for _ in range(3)]
    trial = Trial(trials.recipe(stages=stages("resnet-tiny")), str(tmp_path / "run" / "run"), num)
    struck, problems = same.killed_fill(trial, tmp_path / "cache", online(trial, tmp_path / "online"), kills)
    assert (struck, problems) == (3, []), f"TLTRAIN_SEED={trials.seed()}: {kills}"


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_in_the_fill_stops_both(tmp_path: Path) -> None:
    trial = Trial(trials.recipe(stages=stages("resnet-tiny")), str(tmp_path / "run" / "run"), 2)
    codes = world.run(same.stored(trial, tmp_path / "cache", "signal_in_fill", 5, "SIGTERM", 1))
    assert codes == [75, 75], world.log(trial)
    outcome = world.outcome(Path(trial.folder))
    assert (outcome["stage"], outcome["step"], outcome["signal"]) == ("head", 0, "a signal to another process")
    written = same.written(tmp_path / "cache")
    assert 0 < len(written) < 20
    run = world.finish(same.stored(trial, tmp_path / "cache"))
    assert trials.differences(run, online(trial, tmp_path / "online")) == []
    assert len(set(same.written(tmp_path / "cache"))) == len(same.written(tmp_path / "cache")) == 20


@pytest.mark.slow
def test_a_disk_that_fills_up_under_two_processes(disk: Path, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(stages=stages("resnet-tiny")), str(tmp_path / "run" / "run"), 2, start={"cache_disk_gb": 1})
    run = world.finish(same.stored(trial, disk, "fill_disk", 5, str(disk)))
    assert re.search("cache +head: features before head, train .*computed.*: .*(No space left on device|could not write)", world.log(trial))
    assert trials.differences(run, online(trial, tmp_path / "online")) == []


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(CUTS))
def test_bf16_features_are_stored_as_they_are_rounded_online(backbone: str, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(backbone=trials.NETS[backbone], stages=stages(backbone)), str(tmp_path / "run" / "run"))
    undisturbed = same.stored(
        replace(trial, folder=str(tmp_path / "online" / "run"), start={"cache": "never"}), tmp_path / "none", "use_bf16"
    )
    made = world.finish(same.stored(trial, tmp_path / "cache", "use_bf16"))
    assert trials.differences(made, world.finish(undisturbed)) == []
    files = [disk_store.read(file)["rows"] for file in tmp_path.glob("cache/store/*/*.safetensors")]
    assert len(files) == 20
    assert {rows.dtype for rows in files} == {torch.bfloat16}
    assert not same.shards_in(tmp_path / "none")
    code = (
        f"from tltrain.cache import feature_table; from tltrain.cli import main; feature_table.SHARD_ROWS = {same.SHARD_ROWS}; "
        "print(main.main(['cache', 'verify']))"
    )
    said = []
    for precision in ("bf16", "no"):
        env = os.environ | {"TLTRAIN_CACHE": str(tmp_path / "cache"), "ACCELERATE_MIXED_PRECISION": precision, "OMP_NUM_THREADS": "1"}
        said.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert said[0].count("equal bit for bit") == 4
    assert said[1].count("set ACCELERATE_MIXED_PRECISION=bf16, as it was then") == 4
    assert [text.splitlines()[-1] for text in said] == ["0", "0"]


def online(trial: Trial, folder: Path) -> Path:
    return world.finish(same.online(replace(trial, folder=str(folder / "run"))))
