"""What a job does when its processes are gone, and who failed first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm import batch
from launcher.slurm.requeue import Ended, Limits, decide, first_failure
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import run_dir

LIMITS = Limits(requeues=2, crash_requeues=1)


@pytest.mark.parametrize(
    ("outcome", "preempted", "terminated", "past", "action"),
    [
        ({"outcome": "finished"}, False, False, [], "finished"),
        ({"outcome": "finished"}, True, True, [], "finished"),  # told to save when nothing was left to do
        ({"outcome": "stopped", "signal": "SIGUSR2"}, True, False, [], "requeue"),
        ({"outcome": "stopped", "signal": "SIGUSR2"}, False, False, [], "requeue"),  # srun had it from scancel, the script had not
        ({}, True, False, [], "requeue"),  # killed while it was starting
        ({"outcome": "failed"}, True, False, [], "requeue"),
        ({}, True, False, ["preempted"], "requeue"),
        ({}, True, False, ["preempted", "crashed"], "stopped"),
        ({}, True, True, [], "stopped"),  # scancel has the last word
        ({"outcome": "stopped", "signal": "SIGTERM"}, False, True, [], "stopped"),
        ({"outcome": "stopped", "signal": "SIGTERM"}, False, False, [], "stopped"),
        ({"outcome": "failed"}, False, False, [], "requeue"),
        ({"outcome": "failed"}, False, False, ["preempted"], "requeue"),
        ({"outcome": "failed"}, False, False, ["crashed"], "failed"),
        ({}, False, False, ["crashed"], "failed"),
    ],
)
def test_the_act(outcome: dict[str, Any], preempted: bool, terminated: bool, past: list[str], action: str) -> None:
    assert decide(Ended(outcome, preempted, terminated), past, LIMITS)[0] == action


def test_slurm_requeues_by_itself_what_it_preempts() -> None:
    ended = Ended({"outcome": "stopped", "signal": "SIGTERM"}, preempted=False, terminated=True, slurm_preempts=True)
    assert decide(ended, [], LIMITS)[0] == "wait"


def note(time: float, error: str, **who: int) -> dict[str, Any]:
    return {"time": time, "error": error, "traceback": "", "host": "n1", **who}


@pytest.mark.parametrize(
    ("notes", "first"),
    [
        ([], None),
        ([note(2, "ValueError: x", rank=0), note(1, "ValueError: y", rank=3)], 3),
        ([note(1, "RuntimeError: Connection closed by peer [127.0.0.1]", rank=0), note(2, "ValueError: y", rank=3)], 3),
        ([note(1, "RuntimeError: Connection closed by peer [127.0.0.1]", rank=0), note(2, "processes ended with code 1", node=1)], 1),
        ([note(2, "DistBackendError: NCCL watchdog", rank=0), note(1, "Gloo: Timed out", rank=1)], 1),
    ],
)
def test_the_first_to_fail_is_not_one_that_only_lost_its_peers(notes: list[dict[str, Any]], first: int | None) -> None:
    found = first_failure(notes)
    assert (None if found is None else found.get("rank", found.get("node"))) == first


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return batch.begin(["train", "digits-resnet"], "7")


def act(run: Path, preempted: bool = False) -> str:
    return batch.end(run, "7", preempted, False, Limits(1, 0))


def test_begin_makes_the_folders(run: Path) -> None:
    assert (run / "recipe.yaml").is_file()
    assert (run / "jobs" / "7").is_dir()
    with pytest.raises(UserError, match="another recipe"):
        batch.begin(["train", "digits-resnet", "--seed", "5"], "8")


def test_an_outcome_that_an_older_start_wrote_late_does_not_decide(run: Path) -> None:
    run_dir.claim(run)
    batch.begin(["train", "digits-resnet"], "7")
    run_dir.claim(run)
    late = {"outcome": "stopped", "signal": "SIGUSR2"}
    files.write_json(run / "outcome.json", {**late, "generation": 1})
    assert act(run) == "failed"
    run_dir.write_outcome(run, 2, late)
    assert act(run) == "requeue"
    files.write_json(run / "outcome.json", {"outcome": "finished", "generation": 1})
    assert act(run) == "finished", "whoever finished it"


def test_what_slurm_says_of_a_preemption(run: Path) -> None:
    """PreemptTime alone is no reason to wait: it matters to a job that runs and was told to end, be it only by its processes."""
    for terminated, said, action in [
        (True, "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00 X=a=b", "wait"),
        (False, "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00", "failed"),
        (True, "JobId=7 JobState=RUNNING PreemptTime=None", "stopped"),
        (True, "JobId=7 JobState=COMPLETING PreemptTime=2026-01-01T00:00:00", "stopped"),
        (True, "", "stopped"),
    ]:
        assert batch.end(run, "7", False, terminated, Limits(1, 0), said) == action
    run_dir.claim(run)
    run_dir.write_outcome(run, 1, {"outcome": "stopped", "signal": "a signal to another process"})
    assert batch.end(run, "7", False, False, Limits(1, 0), "JobState=RUNNING PreemptTime=2026-01-01T00:00:00") == "wait"


def test_requeues_are_counted_in_the_run_folder(run: Path) -> None:
    assert [act(run, preempted=True) for _ in range(3)] == ["requeue", "stopped", "stopped"]
    lines = [json.loads(line) for line in (run / "jobs" / "7" / "ends.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["requeue", "stopped", "stopped"]


def test_a_failure_names_the_process_in_outcome_and_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir.claim(run)
    run_dir.write_outcome(run, 1, {"outcome": "failed", "error": "RuntimeError: Connection closed by peer", "rank": 0})
    own = run / "jobs" / "7"
    for entry in (
        note(1, "RuntimeError: Connection closed by peer", rank=0),
        {**note(2, "ValueError: bad", rank=2), "traceback": "the trace"},
    ):
        (own / f"rank-{entry['rank']}.failed.json").write_text(json.dumps(entry))
    assert act(run) == "failed"
    assert run_dir.outcome(run) == {"outcome": "failed", "generation": 1, "rank": 2, "host": "n1", "error": "ValueError: bad"}
    said = capsys.readouterr().err
    assert "rank 2 on n1 failed first: ValueError: bad" in said
    assert "the trace" in said


def test_a_node_that_was_cut_off_does_not_requeue_what_goes_on_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    batch.begin(["train", "digits-resnet"], "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert act(run, preempted=True) == "stopped"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert act(run, preempted=True) == "requeue"


def test_a_start_that_was_refused_has_no_say_in_the_outcome(run: Path) -> None:
    (run / "jobs" / "7" / "rank-0.failed.json").write_text(json.dumps(note(1, "tltrain ended with code 2", rank=0)))
    assert act(run) == "failed"
    assert run_dir.outcome(run) == {}
