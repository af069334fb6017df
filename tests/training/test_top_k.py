"""A teacher's answers in short (distill.top_k): what the loss sees of them is one function of all logits, stored or computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks import same, trials, world
from benchmarks.trials import LAST
from benchmarks.world import Trial
from tltrain.cache import disk_store, feature_table
from tltrain.cache.frozen import FrozenModel, TopK
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import validate
from tltrain.runs import run_dir
from tltrain.runs.pages import methods
from tltrain.runs.record import read_run
from tltrain.training.losses import objective
from tltrain.training.losses.distillation import distillation
from tltrain.training.run import train

VIEWS = {"views": 3, "augment": "strong", "steps": 12}
MIXED = VIEWS | {"mixup": 0.4, "cutmix": 1.0}


def logits(seed: int, num: int = 6, classes: int = 9) -> Tensor:
    return 3 * torch.randn(num, classes, generator=torch.Generator().manual_seed(seed))


def coarse_kl(student_BK: Tensor, teacher_BK: Tensor, k: int, temperature: float) -> list[float]:
    """T^2 KL between the softened answers, with all classes but the teacher's k likeliest merged: by a loop, in float64."""
    values = []
    for student, teacher in zip(student_BK.detach().double(), teacher_BK.double(), strict=True):
        p, q = (student / temperature).softmax(0), (teacher / temperature).softmax(0)
        kept = sorted(range(len(q)), key=lambda c: -q[c])[:k]
        pairs = [(p[c], q[c]) for c in kept] + [(1 - p[kept].sum(), 1 - q[kept].sum())]
        values.append(temperature**2 * sum(float(b * (b / a).log()) for a, b in pairs))
    return values


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 2.5), (8, 4.0)])
def test_all_other_classes_count_as_one(dtype: torch.dtype, k: int, temperature: float) -> None:
    student, teacher, top = logits(0).requires_grad_(), logits(1), TopK(k, temperature)
    packed = top.pack(teacher.to(dtype))
    assert packed.shape == (6, 2 * k + 1)
    assert packed.element_size() == dtype.itemsize
    loss = distillation(*top.merge(student, packed), temperature)
    assert loss.tolist() == pytest.approx(coarse_kl(student, teacher, k, temperature), rel=2e-2 if dtype == torch.float16 else 1e-4)
    if k == 8:  # the rest is one class: nothing is lost
        torch.testing.assert_close(loss, distillation(student, teacher.to(dtype), temperature))
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    alike = distillation(*top.merge(teacher, packed), temperature)
    torch.testing.assert_close(alike, torch.zeros(6), atol=1e-4, rtol=0)


def test_of_equal_logits_the_first_classes_are_kept_whoever_else_is_asked() -> None:
    """Rounded logits are often equal, and what is stored must not depend on the batch that it was computed in."""
    teacher = logits(2, num=64, classes=40).round().half()
    packed = TopK(5, 2.0).pack(teacher)
    want = [sorted(range(40), key=lambda c, row=row: (-float(row[c]), c))[:5] for row in teacher]  # type: ignore[misc]
    assert packed[:, 6:].tolist() == want
    assert all(torch.equal(TopK(5, 2.0).pack(teacher[i : i + 1])[0], packed[i]) for i in range(64))


# --- runs


@pytest.fixture
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)


def taught(teachers: Sequence[Path], stage: dict[str, Any], **distill: Any) -> dict[str, Any]:
    first, *more = map(str, teachers)
    by = {"teacher": {"weights": first}, "ensemble": more, "temperature": 2.0, "weight": 0.8} | distill
    return trials.recipe(backbone=trials.NETS["vit-tiny"], distill=by, stages=[LAST | stage])


def run(spec: dict[str, Any], folder: Path, **start: Any) -> Path:
    assert train(validate(spec, "test"), RunFlags(folder=folder, workers=0, **start))["outcome"] == "finished"
    return folder


def stores() -> list[disk_store.StoreInfo]:
    return disk_store.stores(Path(os.environ["TLTRAIN_CACHE"]) / "store")


def losses_of(folder: Path) -> tuple[float, ...]:
    return tuple(row["loss"] for row in trials.rows_of(folder) if row["kind"] == "train")


@pytest.mark.usefixtures("_own_stores")
@pytest.mark.parametrize(
    ("num_teachers", "stage", "changes"),
    [(1, VIEWS, {}), (2, MIXED, {"logits": "float32"})],
    ids=["one teacher", "two teachers, mixed views, float32"],
)
def test_a_run_from_stored_answers_is_the_run_that_computes_them(
    finished_run: Path, tmp_path: Path, num_teachers: int, stage: dict[str, Any], changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spec = taught([finished_run] * num_teachers, stage, top_k=3, **changes)
    online = run(spec, tmp_path / "online", cache="never", max_device_batch=5)
    assert trials.differences(run(spec, tmp_path / "stored", cache="always", max_device_batch=5), online) == []
    (store,) = stores()
    row_bytes = (4 if changes else 2) * (2 * 3 + 1)
    num_rows = 3 * 60
    plan = (tmp_path / "stored" / "plan.txt").read_text()
    assert f"the teacher's logits (top 3 of 10 classes), 3 views of 60 images x {row_bytes} B" in plan
    assert "(all classes: 7.2 KB)" in plan or "(all classes: 3.6 KB)" in plan
    assert num_rows * row_bytes <= store.bytes < num_rows * row_bytes + 200 * len(list(store.path.glob("*.safetensors")))
    assert "likeliest classes and all others as one" in plan
    assert "over the 3 likeliest classes and all others as one" in methods.paragraph(read_run(online))
    assert main(["cache", "ls"]) == 0
    assert "the teacher's logits (top 3) of train" in " ".join(capsys.readouterr().out.split())
    assert main(["cache", "verify"]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    monkeypatch.setattr(FrozenModel, "__call__", None)
    run(spec | {"seed": 3}, tmp_path / "second", cache="always")


@pytest.mark.usefixtures("_own_stores")
def test_each_k_and_temperature_has_a_store_and_a_loss_of_its_own(finished_run: Path, tmp_path: Path) -> None:
    """The mass of the rest depends on both. Whole answers depend on neither, and as many classes as there are keep them whole."""
    asked = {"a": (3, 2.0), "b": (4, 2.0), "c": (3, 4.0), "whole": (None, 2.0), "all": (10, 2.0), "more": (25, 2.0), "warm": (None, 4.0)}
    spec = {name: taught([finished_run], VIEWS | {"steps": 4}, top_k=k, temperature=t) for name, (k, t) in asked.items()}
    losses = {name: losses_of(run(spec[name], tmp_path / name, cache="always")) for name in asked}
    assert losses["all"] == losses["more"] == losses["whole"]
    assert trials.differences(tmp_path / "all", tmp_path / "whole") == []
    assert len(set(losses.values())) == 5
    assert sorted(str(store.key.get("top_k")) for store in stores()) == ["None", "[3, 2.0]", "[3, 4.0]", "[4, 2.0]"]
    plan = (tmp_path / "more" / "plan.txt").read_text()
    assert "the teacher's logits (top_k is 25: all 10 classes)" in plan
    assert "all others as one" not in plan + methods.paragraph(read_run(tmp_path / "more"))


@pytest.fixture
def _bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # it is read once a process
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("finished_run", "_own_stores", "_bf16")
@pytest.mark.parametrize("distill", [{}, {"top_k": 3}, {"target": "features"}], ids=["logits", "top_k", "features"])
def test_under_bf16_what_a_teacher_says_of_several_chunks_is_joined(distill: dict[str, Any], finished_run: Path, tmp_path: Path) -> None:
    """On a CPU, autocast joins no two tensors of fp16. A chunk is 32 images, a batch more."""
    by = {"teacher": {"weights": str(finished_run)}} | distill
    stages = [LAST | VIEWS | {"steps": 2}, *([LAST | {"name": "head", "unfreeze": "head", "views": 1}] if "target" in distill else [])]
    spec = trials.recipe(backbone=trials.NETS["vit-tiny"], distill=by, stages=stages) | {"batch": 40}
    computed = run(spec, tmp_path / "computed", cache="never")
    assert run_dir.environment(computed)["accelerate"]["precision"] == "bf16"
    assert trials.differences(run(spec, tmp_path / "stored", cache="always"), computed) == []


@pytest.mark.usefixtures("_own_stores")
@pytest.mark.slow
def test_two_processes_that_are_killed_in_the_fill_change_nothing(finished_run: Path, tmp_path: Path) -> None:
    trial = Trial(taught([finished_run], MIXED | {"steps": 8}, top_k=3), str(tmp_path / "run" / "run"), 2)
    undisturbed = world.finish(same.online(replace(trial, folder=str(tmp_path / "online" / "run"))))
    struck, problems = same.killed_fill(trial, tmp_path / "stores", undisturbed, [(2, 0), (6, 0)])
    assert (struck, problems) == (2, [])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(before: int, after: int, finished_run: Path, tmp_path: Path) -> None:
    """From the store that the first of them filled, at every loss within 1e-9, in float64."""
    spec = taught([finished_run], MIXED | {"steps": 8}, top_k=3)
    start, where = {"cache": "always"}, {"TLTRAIN_CACHE": str(tmp_path / "cache")}
    trial = Trial(spec, str(tmp_path / "run"), before, start=start, float64=True, environment=where)
    whole = world.finish(replace(trial, folder=str(tmp_path / "whole"), environment={"TLTRAIN_CACHE": str(tmp_path / "other cache")}))
    assert world.run(replace(trial, before="signal_after", arguments=(3,))) == [75] * before, world.log(trial)
    shards = same.shards_in(tmp_path / "cache")
    assert shards
    other = world.finish(replace(trial, world=after))
    assert same.shards_in(tmp_path / "cache") == shards
    assert losses_of(other) == pytest.approx(losses_of(whole), rel=1e-9)
    assert trials.distance(other, whole) < 1e-9


# --- refusals


def test_losses_that_need_every_class_are_refused() -> None:
    for loss in ("dist", "dkd"):
        recipe = validate(taught([Path("runs/a")], VIEWS, top_k=3, loss=loss), "test")
        rule = f"^distill.loss is {loss}, which needs the teacher's answer to every class, and distill.top_k keeps 3; "
        with pytest.raises(UserError, match=rule + "leave top_k out, or take distill.loss: kd$"):
            objective.check_distill_loss(recipe, 10, 16)
    recipe = validate(taught([Path("runs/a")], VIEWS, top_k=3), "test")
    objective.check_distill_loss(recipe, 32_768, 16)
    with pytest.raises(UserError, match=r"at most 32,768 classes have a number, not 40,000; set distill.logits: float32"):
        objective.check_distill_loss(recipe, 40_000, 16)
    objective.check_distill_loss(recipe.override({"distill.logits": "float32"}), 40_000, 16)


def test_features_have_no_likeliest_classes() -> None:
    with pytest.raises(UserError, match="top_k: 3 keeps logits of some classes, and target: features has none; leave top_k out"):
        validate(taught([Path("runs/a")], {}) | {"distill": {"teacher": {"weights": "runs/a"}, "target": "features", "top_k": 3}}, "test")
