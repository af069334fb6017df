"""metrics.jsonl over several starts, and what W&B's offline file holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from wandb_files import history, mirrored, offline_records, row

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.runs.metrics_log import MetricsLog, read_rows
from tltrain.runs.trackers.wandb import has_key
from tltrain.training.run import train

CANARY = "0123456789abcdef0123456789abcdef01234567"


def test_rows_after_the_checkpoint_that_the_next_start_took_are_left_out(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, 1, {"from": None})
    for r in (row("val", 0, 0), row("train", 0, 1), row("train", 0, 2), row("val", 0, 2), row("train", 0, 3)):
        first.log(r)
    first.close()
    second = MetricsLog(tmp_path, 2, {"from": [0, 2, False]})  # saved after step 2, before its evaluation
    for r in (row("val", 0, 2), row("train", 0, 3), row("stage_end", 0, 3), row("val", 1, 0), row("train", 1, 1)):
        second.log(r)
    second.close()
    third = MetricsLog(tmp_path, 3, {"from": [1, 0, False]})
    third.log(row("val", 1, 0))
    third.close()
    seen = [(r["kind"], r["stage_index"], r["step"]) for r in read_rows(tmp_path)]
    assert seen == [
        ("val", 0, 0), ("train", 0, 1), ("train", 0, 2), ("val", 0, 2), ("train", 0, 3), ("stage_end", 0, 3), ("val", 1, 0),
    ]  # fmt: skip


def test_a_start_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    for generation in (1, 2):
        tracker = MetricsLog(tmp_path, generation, {"from": None})
        tracker.log(row("teacher", 0, 0))
        tracker.log(row("val", 0, 0))
        tracker.close()
    assert [r["kind"] for r in read_rows(tmp_path)] == ["teacher", "val"]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    tracker = MetricsLog(tmp_path, 1, {"from": None})
    tracker.log(row("train", 0, 1))
    tracker.close()
    with (tmp_path / "metrics-000001.jsonl").open("a") as file:
        file.write('{"kind": "train", "stage_ind')
    assert len(read_rows(tmp_path)) == 1


def test_closing_hides_no_error_and_keeps_none_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a device that is always full: the first error is what comes out; with none before, the close says that rows may be lost."""
    for failed_before in (True, False):
        tracker = MetricsLog(tmp_path, 1 + failed_before, {"from": None})
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, tracker.file.fileno())
        os.close(full)
        if failed_before:
            with pytest.raises(OSError, match="No space left"):
                _log_and_close(tracker)
            assert "metrics-000002.jsonl may not be on the disk" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match=r"metrics-000001\.jsonl may not be on the disk"):
                tracker.close()
        assert tracker.file.closed


def _log_and_close(tracker: MetricsLog) -> None:
    try:
        tracker.log(row("train", 0, 1))
    finally:
        tracker.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from tltrain.core.flags import RunFlags
from tltrain.runs.trackers import TrackedRun, Trackers
from tltrain.runs.trackers.wandb import WandbTracker
assert "wandb" not in sys.modules, "whoever does not ask for it does not import it"
run = Path("run")
mirror = Trackers({"wandb": WandbTracker}, print)
mirror.open(TrackedRun(run, "n", {"name": "r"}, (), RunFlags(wandb="offline", wandb_weights=True), print))
mirror.plan("head")
mirror.confusion([[3, 1], [0, 4]], ["a", "b"])
mirror.weights(run / "w.safetensors", "student")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_leaves_nothing_of_wandb_outside_its_folder(tmp_path: Path) -> None:
    for name in ("home", "tmp", "run"):
        (tmp_path / name).mkdir()
    save_file({}, tmp_path / "run" / "w.safetensors")
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "WANDB_"))}
    places = {"HOME": "home", "TMPDIR": "tmp", "MPLCONFIGDIR": "fonts"}
    environment = theirs | {name: str(tmp_path / folder) for name, folder in places.items()}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    left = [*(tmp_path / "home").rglob("*"), *(tmp_path / "tmp").rglob("*")]
    # The service of wandb 0.26 leaves the folder of its socket behind when it is killed; that of 0.31 does not.
    # wandb 0.22 makes the folder of a user's settings, and writes nothing into it.
    settings = [tmp_path / "home" / ".config", tmp_path / "home" / ".config" / "wandb"]
    assert [path for path in left if not (path.name.startswith("wandb-") or path.is_socket() or path in settings)] == []


def test_wandb_offline_mirrors_the_rows_and_no_key_is_written(
    made_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    run = tmp_path / "run"
    train(made_recipe(), RunFlags(folder=run, workers=0, wandb="offline"))
    mirrored: dict[tuple[str, int], object] = {}
    for entry in history(run):
        mirrored |= {(name, int(str(entry["_step"]))): value for name, value in entry.items()}
    rows = [r for r in read_rows(run) if r["kind"] in ("train", "val", "test")]
    assert rows
    last = {(r["kind"], r["run_step"]): r for r in rows}  # two stages meet at a step: the later row counts
    for (kind, step), r in last.items():
        assert mirrored[f"{kind}/loss", step] == pytest.approx(r["loss"])
        if kind != "train":
            assert mirrored[f"{kind}/top1", step] == pytest.approx(r["top1"])
    assert ("test/confusion_table/nrows", 9) in mirrored
    ids = {record.run.run_id for record in offline_records(run) if record.HasField("run")}
    assert ids == {(run / "wandb_id").read_text()}
    for path in run.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_online_without_a_key_is_offline_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    assert not has_key()
    mirror, _ = mirrored(tmp_path, said, wandb="online")
    mirror.log(row("train", 0, 1, loss=1.0))
    mirror.close()
    assert len(said) == 2
    assert "no key found" in said[0]
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_failing_wandb_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    mirror, wandb_ = mirrored(tmp_path, said)

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("gone")

    run = wandb_.run
    monkeypatch.setattr(run, "log", fail)
    mirror.log(row("train", 0, 1, loss=1.0))
    mirror.log(row("train", 0, 2, loss=1.0))
    mirror.close()
    run.finish()
    assert len(said) == 2
    assert "ConnectionError: gone" in said[0]
    assert "kept offline" in said[1]
