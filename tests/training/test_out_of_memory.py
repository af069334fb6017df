"""A device without room: the run asks for less at a time, keeps that, and ends as if it had begun with it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ALL, HEAD, made_recipe
from gpu_device import DEVICES, running_on

from benchmarks import faults, trials, world
from benchmarks.world import Trial
from launcher.slurm.requeue import Ended, Limits, decide
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.data.views import PIXELS_VERSION
from tltrain.distributed.out_of_memory import fitting, is_out_of_memory, release
from tltrain.distributed.strategies import spread
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.predict import predict
from tltrain.evaluation.trained import load_trained
from tltrain.models.chain import Chain
from tltrain.runs import checkpoint
from tltrain.runs.run_dir import kept
from tltrain.training import run as run_module
from tltrain.training import stage
from tltrain.training.run import train

ROOT = Path(__file__).resolve().parents[2]
BEGUN_WITH = {"pixels": PIXELS_VERSION, "mixes_by_view": True}


def cramped(trial: Trial, *arguments: Any) -> Trial:
    return replace(trial, before="faults.little_room", arguments=arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that has micro-batches of this size from the start, for each number of processes."""
    made: dict[tuple[int, int], Path] = {}

    def get(device_batch: int, num: int = 1) -> Path:
        if (device_batch, num) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            start = {"max_device_batch": device_batch}
            made[device_batch, num] = world.finish(Trial(trials.recipe(), str(folder), num, start=start))
        return made[device_batch, num]

    return get


@pytest.mark.parametrize(("what", "room", "fits"), [("train", 5, 3), ("evaluation", 7, 5)])
def test_from_the_first_step_it_is_the_run_of_what_fits(what: str, room: int, fits: int, whole: Any, tmp_path: Path) -> None:
    """12 images a step become 6 and 3 at a time; an evaluation of 20, 10 and 5."""
    trial = cramped(Trial(trials.recipe(), str(tmp_path / "run")), what, room)
    run = world.finish(trial)
    assert trials.differences(run, whole(fits)) == []
    assert kept(run).items() >= {"max_device_batch": fits, "compile": False}.items()
    said = (tmp_path / "run.rank0.log").read_text()
    assert said.count("memory  out of memory (stage head, step 0, ") == 2
    assert f"CUDA out of memory. Tried to allocate 2.00 GiB. (planted)); from here on micro-batches of at most {fits} images" in said


def test_in_the_middle_of_a_stage_it_goes_on_as_a_resume_with_less_does(tmp_path: Path) -> None:
    """Micro-batch 9 is step 5 of the second stage, whose checkpoint is that of its start."""
    spec = trials.recipe(stages=[trials.HEAD, trials.MIDDLE | {"steps": 6}])
    run = world.finish(Trial(spec, str(tmp_path / "run"), before="faults.no_room_at", arguments=(9,)))
    other = Trial(spec, str(tmp_path / "other"))
    assert world.run(replace(other, before="faults.end_process", arguments=(9, 0, "SIGKILL"))) == [-9]
    resumed = world.finish(replace(other, start={"max_device_batch": 6}))
    assert kept(run)["max_device_batch"] == 6
    assert trials.differences(run, resumed) == []
    micro = [json.loads(line) for line in (run / "metrics-000002.jsonl").read_text().splitlines()]
    assert micro[0]["from"] == [1, 0, False]


def test_what_is_frozen_runs_in_smaller_chunks_stored_or_not(tmp_path: Path) -> None:
    """Its chunks are another number than the micro-batches, which stay; a store that is filled says the same as none."""
    data = trials.recipe()["data"] | {"seed": 71}  # images of its own: a cache that another test has filled needs no frozen pass
    spec = trials.recipe(stages=[trials.HEAD | {"views": 1}, trials.MIDDLE | {"views": 2}], data=data)
    stored, online = (
        world.finish(cramped(Trial(spec, str(tmp_path / how / "run"), start={"cache": how}), "frozen", 8)) for how in ("always", "never")
    )
    assert kept(stored) == kept(online) == {"max_device_batch": 128, "compile": False, "chunk": 8, **BEGUN_WITH}
    assert trials.differences(stored, online) == []


def test_one_image_too_many_is_refused_with_the_remedies(tmp_path: Path) -> None:
    trial = cramped(Trial(trials.recipe(), str(tmp_path / "run")), "train", 0)
    assert world.run(trial) == [2]
    outcome = world.outcome(tmp_path / "run")
    assert (outcome["outcome"], outcome["stage"], outcome["step"]) == ("failed", "head", 0)
    assert "the device has no room for one image at a time" in outcome["error"]
    assert "--recompute" in outcome["error"]
    assert kept(tmp_path / "run")["max_device_batch"] == 1


def test_the_same_command_again_keeps_what_fits_and_another_number_is_believed(whole: Any, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), start={"max_device_batch": 12})
    assert world.run(replace(trial, before="faults.little_room_then_signal", arguments=("train", 5, 5))) == [75]
    assert kept(tmp_path / "run") == {"max_device_batch": 3, "compile": False, "too_large": 12, **BEGUN_WITH}
    stopped = replace(trial, before="signal_after", arguments=(1,))
    assert world.run(stopped) == [75]
    assert "out of memory" not in world.log(stopped)
    assert kept(tmp_path / "run") == {"max_device_batch": 3, "compile": False, "too_large": 12, **BEGUN_WITH}
    assert world.run(replace(stopped, start={"max_device_batch": 6})) == [75]
    assert kept(tmp_path / "run")["max_device_batch"] == 6
    world.finish(replace(trial, start={"max_device_batch": 3}))
    assert trials.rows_of(tmp_path / "run")[:3] == trials.rows_of(whole(3))[:3]


@pytest.mark.parametrize("what", ["train", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_of_two_processes_one_without_room(what: str, whole: Any, tmp_path: Path) -> None:
    """Both leave as if they had been stopped, and both have the smaller number at the next start: 6 images each become 3, 10 become 5."""
    trial = cramped(Trial(trials.recipe(), str(tmp_path / "run"), 2, start={"timeout_minutes": 2.0}), what, 5, 1)
    assert world.run(trial) == [75, 75], world.log(trial)
    outcome = world.outcome(tmp_path / "run")
    assert (outcome["outcome"], outcome["signal"], outcome["rank"]) == ("stopped", "out of memory", 1)
    fits = {"train": 3, "evaluation": 5}[what]
    assert f"rank 1, stage head, step 0, {'train' if what == 'train' else 'evaluate'}" in world.log(trial)
    assert "the same command goes on" in world.log(trial)
    assert kept(tmp_path / "run")["max_device_batch"] == fits
    assert trials.differences(world.finish(trial), whole(fits, 2)) == []


@pytest.mark.slow
def test_a_process_that_waits_for_one_without_room_ends_itself(whole: Any, tmp_path: Path) -> None:
    """As in a call of NCCL, which never ends when one process does not make it."""
    trial = cramped(Trial(trials.recipe(), str(tmp_path / "run"), 2, start={"timeout_minutes": 0.4}), "train", 5, 1, True)
    assert world.run(trial) == [1, 75], world.log(trial)
    assert "rank 0 waits for a process that has exited, so it exits too" in world.log(trial)
    assert world.outcome(tmp_path / "run")["signal"] == "out of memory"
    assert trials.differences(world.finish(replace(trial, before=None, arguments=())), whole(3, 2)) == []


@pytest.mark.slow
def test_the_launcher_starts_the_processes_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    from benchmarks.faults import little_room\n    little_room('train', 5, 1)\n"
    )
    spec = tmp_path / "spec.yaml"
    spec.write_text(made_recipe().to_yaml())
    command = [sys.executable, "-m", "launcher", "local", "--accelerate", "cpu", "--processes", "2", "--", "train", str(spec)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("launch  out of memory: started again") == 1
    assert kept(tmp_path / "runs" / "micro")["max_device_batch"] == 4
    assert world.outcome(tmp_path / "runs" / "micro")["outcome"] == "finished"


def test_a_job_of_slurm_is_requeued() -> None:
    outcome = {"outcome": "stopped", "signal": "out of memory"}
    assert decide(Ended(outcome, False, False), ["preempted"] * 9, Limits(0, 0)) == ("requeue", "out of memory")
    assert decide(Ended(outcome, False, True), [], Limits(0, 0))[0] == "stopped", "scancel has the last word"


def test_nothing_of_the_start_without_room_stays_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def spreading(*arguments: Any) -> Any:
        spreaded = spread(*arguments)
        made.extend(weakref.ref(each) for each in (spreaded.model, spreaded.chain.net, spreaded.optimizer))
        return spreaded

    def released() -> None:
        release()
        alive.append(sum(reference() is not None for reference in made))

    monkeypatch.setattr(stage, "spread", spreading)
    monkeypatch.setattr(run_module, "release", released)
    monkeypatch.setattr(Chain, "forward", faults.cramped(Chain.forward, "train", 5))
    assert train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))["outcome"] == "finished"
    assert alive == [0, 0]
    assert len(made) == 12


def test_the_loss_scale_forgets_a_step_that_was_broken_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """fp16's gradients of that step were not finite, and it ended between looking at them and the optimizer's step."""
    spec = made_recipe(stages=[HEAD | {"steps": 4, "clip": 1.0}], batch=8)
    steps = iter(range(1, 100))
    clip = Accelerator.clip_grad_norm_

    def clipped(self: Any, parameters: Any, *arguments: Any) -> Any:
        parameters = list(parameters)
        if first := next(steps) == 1:
            next(p for p in parameters if p.grad is not None).grad.fill_(float("inf"))
        norm = clip(self, parameters, *arguments)
        if first:
            raise torch.OutOfMemoryError("planted")
        return norm

    with running_on("cpu", "fp16"):
        train(spec, RunFlags(folder=tmp_path / "smaller", workers=0, max_device_batch=4, save_steps=1, keep=9))
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipped)
        train(spec, RunFlags(folder=tmp_path / "run", workers=0, save_steps=1, keep=9))
    assert kept(tmp_path / "run")["max_device_batch"] == 4
    assert trials.differences(tmp_path / "run", tmp_path / "smaller") == []
    ours, theirs = (checkpoint.load(checkpoint.committed(tmp_path / name / "checkpoints")[1]).extra for name in ("run", "smaller"))
    assert ours == theirs
    assert theirs["scaler"]["scale"] > 0


@contextlib.contextmanager
def too_small(device: str, spec: Any, folder: Path) -> Iterator[None]:
    """Inside, the device has room for less than a whole batch: on a GPU really."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Chain, "forward", faults.cramped(Chain.forward, "train", 5))
            yield
        return
    torch.cuda.init()
    release()  # what earlier tests have left is not counted
    reserved, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    peak = train(spec, RunFlags(folder=folder, workers=0, cache="never"))["peak_bytes"]
    release()
    limit = reserved + 0.7 * (peak - used)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_too_small(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal bits. The run that begins with what fits has no more memory: with more, cuDNN might choose other kernels."""
    sizes = {"batch": 16} if device == "cpu" else {"batch": 256, "data": {"size": 224, "resize": 224, "per_class": 40}}
    spec = made_recipe(stages=[ALL | {"steps": 3}], **sizes)
    with running_on(device), too_small(device, spec, tmp_path / "unlimited"):
        assert train(spec, RunFlags(folder=tmp_path / "run", workers=0, cache="never"))["outcome"] == "finished"
        assert "memory  out of memory (stage all, step 0, train" in capsys.readouterr().out
        fits = kept(tmp_path / "run")["max_device_batch"]
        assert 0 < fits <= spec.batch // 2
        release()
        assert train(spec, RunFlags(folder=tmp_path / "smaller", workers=0, cache="never", max_device_batch=fits))["outcome"] == "finished"
        assert "memory  out of memory" not in capsys.readouterr().out
    assert trials.differences(tmp_path / "run", tmp_path / "smaller") == []


def test_evaluate_and_predict_ask_for_less_at_a_time(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_trained(finished_run)
    pictures = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in range(11)]
    said, figures = list(predict(trained, pictures, batch=2)), evaluate(finished_run, None, "test", 3)
    sizes: list[int] = []
    forward = faults.cramped(Chain.forward, "evaluation", 3)

    def counted(self: Chain, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        sizes.append(len(x))
        return forward(self, x, start, stop)

    monkeypatch.setattr(Chain, "forward", counted)
    now = list(predict(trained, pictures, batch=8))
    assert [p.label for p in now] == [p.label for p in said]
    assert [p.confidence for p in now] == pytest.approx([p.confidence for p in said], rel=1e-5)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1], "what fits is remembered"
    assert evaluate(finished_run, None, "test", 12)["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    monkeypatch.setattr(Chain, "forward", faults.cramped(forward, "evaluation", 0))
    for call in (lambda: list(predict(trained, pictures)), lambda: evaluate(finished_run, None, "test", 8)):
        with pytest.raises(UserError, match=r"no room for this network and one image.*CUDA_VISIBLE_DEVICES"):
            call()


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, short: bool) -> None:
    def fail(size: int) -> None:
        raise error

    assert is_out_of_memory(error) == short
    with pytest.raises(UserError if short else type(error)):
        fitting(fail, 1)
