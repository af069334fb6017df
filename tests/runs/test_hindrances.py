"""What stands in a run's way while it goes on: old checkpoints that stay, folders that are renamed, clocks that are ahead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import made_recipe

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import load
from tltrain.distributed.watchdog import Watch
from tltrain.runs import checkpoint, heartbeat, run_dir
from tltrain.runs.checkpoint import Progress, State
from tltrain.runs.metrics_log import read_rows
from tltrain.training.run import train


def state(step: int) -> State:
    return State(Progress(step=step), {"w": torch.zeros(2)})


def immovable(folder: Path) -> None:
    """chattr +i, or skip."""
    done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"chattr +i is not possible here: {done.stderr.strip()}")


def test_an_old_checkpoint_that_is_a_link_goes_and_its_target_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copytree(checkpoint.save(folder, state(1), 1, keep=9), elsewhere)
    (folder / "000001-00-00000000-0").symlink_to(elsewhere)
    new = checkpoint.save(folder, state(2), 1, keep=1)
    assert [path.name for path in folder.iterdir()] == [new.name]
    assert checkpoint.verify(elsewhere) is None
    assert capsys.readouterr().err == ""


def test_an_old_checkpoint_that_cannot_be_deleted_is_said_and_the_new_one_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = checkpoint.save(tmp_path, state(1), 1, keep=1)

    def refuses(folder: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(folder))

    monkeypatch.setattr(files, "remove_folder", refuses)
    new = checkpoint.save(tmp_path, state(2), 1, keep=1)
    assert checkpoint.verify(new) is None
    assert checkpoint.newest(tmp_path, print) == new
    said = capsys.readouterr().err
    assert str(old) in said
    assert "the run goes on" in said


def test_what_a_kill_left_half_deleted_goes_with_the_next_save_of_the_same_start(tmp_path: Path) -> None:
    for name in (".000003-00-00000001-0.77.old", ".000003-00-00000001-0.tmp", ".000001-00-00000001-0.77.old", ".000009-00-00000001-0.tmp"):
        (tmp_path / name).mkdir()
    new = checkpoint.save(tmp_path, state(2), 3, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".000009-00-00000001-0.tmp", new.name]


def test_nothing_is_begun_anew_under_a_name_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="renamed or deleted"):
        checkpoint.save(tmp_path / "run" / "checkpoints", state(1), 1, keep=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [1, 13, 30])
def test_the_remedy_fits_the_error(number: int) -> None:
    assert "Make room" not in files.remedy(OSError(number, os.strerror(number)))
    assert "Make room" in files.remedy(OSError(28, os.strerror(28)))


def test_a_folder_that_chattr_closed_is_not_said_to_be_full(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    immovable(tmp_path / "checkpoints")
    try:
        with pytest.raises(UserError, match=r"chattr \+i") as caught:
            checkpoint.save(tmp_path / "checkpoints", state(1), 1, keep=1)
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path / "checkpoints")], check=True)
    assert "Make room" not in str(caught.value)


@pytest.mark.parametrize("what", ["renamed", "deleted", "replaced"])
def test_a_run_folder_that_goes_away_ends_the_run(what: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_dir.create(run, made_recipe())
    told: list[int] = []
    watch = Watch(run, run_dir.claim(run), 0, 1, 0.2, told.append, lambda details: None)
    try:
        assert watch.may_write()
        shutil.rmtree(run) if what == "deleted" else run.rename(tmp_path / "elsewhere")
        if what == "replaced":
            run_dir.create(run, made_recipe())
        assert not watch.may_write(), "at once, whatever the thread has seen"
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        watch.close()
    assert told == [0]
    assert run.exists() == (what == "replaced")


def test_a_renamed_run_stops_with_a_word_and_leaves_nothing_behind(tmp_path: Path) -> None:
    recipe = made_recipe(stages=[{"name": "all", "unfreeze": "all", "steps": 100_000, "lr": 1e-4}])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    words = [sys.executable, "-m", "tltrain", "train", str(tmp_path / "r.yaml"), "--folder", str(tmp_path / "run"), "--workers", "0"]
    child = subprocess.Popen([*words, "--save-steps", "50"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/[0-9]*")) and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        said, _ = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.wait()
    assert child.returncode != 0
    assert "renamed or deleted" in said, said[-1500:]
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_an_owner_whose_clock_is_ahead_has_no_negative_age(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_dir.create(run, made_recipe())
    owner = {"host": "another", "pid": 7, "job": None, "restart": 0, "time": time.time() + 2_592_000}
    (run / "generations" / "000001").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="a clock that is 2592000 s ahead") as caught:
        run_dir.check_owner(run, False, 60.0)
    assert "-259" not in str(caught.value)
    run_dir.check_owner(run, True, 60.0)


def test_whatever_ends_a_save_the_run_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted", "somewhere")

    monkeypatch.setattr(checkpoint, "save", breaks)
    with pytest.raises((PermissionError, UserError)):
        train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0, save_steps=1))
    assert run_dir.outcome(tmp_path / "run")["outcome"] == "failed"


def test_a_pipe_in_a_run_folder_is_said_and_not_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_dir.create(run, made_recipe())
    kept = checkpoint.save(run_dir.checkpoints(run), state(1), 1, keep=1)
    for name in ("manifest.json", "weights.safetensors"):
        (kept / name).rename(tmp_path / name)
        os.mkfifo(kept / name)
        assert "a named pipe" in str(checkpoint.verify(kept))
        (kept / name).unlink()
        (tmp_path / name).rename(kept / name)
    assert checkpoint.verify(kept) is None
    os.mkfifo(run / "metrics-000001.jsonl")
    with pytest.raises(UserError, match=r"metrics-000001\.jsonl cannot be read.*a named pipe"):
        read_rows(run)
    os.mkfifo(run / "generations" / "000001")
    os.mkfifo(run / "generations" / "000001.rank00000")
    assert heartbeat.read_beat(run / "generations", 1, 0) is None
    run_dir.check_owner(run, False, 60.0)
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="a named pipe"):
        load(str(tmp_path / "r.yaml"))


def test_an_error_after_the_claim_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("of a kind that nobody expects")

    monkeypatch.setattr(run_dir, "write_environment", breaks)
    with pytest.raises(RuntimeError):
        train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))
    outcome = run_dir.outcome(tmp_path / "run")
    assert (outcome["outcome"], outcome["call"]) == ("failed", "start")
    assert "nobody expects" in outcome["error"]


def test_a_stop_before_the_first_step_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "write_environment", lambda *_: signal.raise_signal(signal.SIGTERM))
    ended = train(made_recipe(), RunFlags(folder=tmp_path / "run", workers=0))
    assert (ended["outcome"], ended["signal"]) == ("stopped", "SIGTERM")
    assert run_dir.outcome(tmp_path / "run")["outcome"] == "stopped"
