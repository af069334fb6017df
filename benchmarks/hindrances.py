"""Cases of `python -m benchmarks.faults` in the processes of a world: what stands in the way of a run, and what must come of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import trials, world
from benchmarks.trials import HEAD, References
from benchmarks.world import Trial

START = {"save_steps": 1, "timeout_minutes": 2.0}
HANG = START | {"timeout_minutes": 0.1}
PHASES: dict[str, tuple[str, str, int]] = {
    "images": ("training.setup", "open_images", 1),
    "planning": ("planning.ahead", "survey", 1),
    "claim": ("runs.run_dir", "create", 1),
    "environment": ("training.setup", "_write_environment", 1),
    "table": ("training.run", "_announce", 1),
    "build": ("training.stage", "spread", 2),
    "step": ("training.loop", "apply_mixup", 6),
    "evaluation": ("training.loop", "answers", 2),
    "save": ("runs.checkpoint", "_write", 3),
    "between stages": ("training.run", "save_stage_weights", 1),
    "calibration": ("evaluation.promises.fitted", "fit_answers", 1),
    "test": ("training.run", "answers", 1),
    "report": ("evaluation.results", "report", 1),
}
"""Phase of a run to (module, function, number of the call) where it is met."""


class Skipped(Exception):
    """A case that this machine cannot show."""


@dataclass(frozen=True)
class Place:
    """Where a case works, with runs that nobody disturbs to compare with."""

    folder: Path
    references: References

    def trial(self, start: dict[str, Any] = START, **changes: Any) -> Trial:
        return Trial(trials.recipe(**changes), str(self.folder / "run"), start=start)


def wrong(**found: bool) -> list[str]:
    """The names of what is not so."""
    return [name.replace("_", " ") for name, holds in found.items() if not holds]


def ends_equal(place: Place, trial: Trial) -> list[str]:
    """The same command again, undisturbed: in what its end differs from a run that nobody disturbed."""
    return trials.differences(world.finish(replace(trial, start=START)), place.references(1))


def spoilt(trial: Trial, fault: str, *arguments: Any) -> tuple[int, dict[str, Any], str]:
    """(exit code, outcome, what was printed) of a trial with a fault in it."""
    code = world.run(replace(trial, before=f"faults.{fault}", arguments=arguments))[0]
    run = Path(trial.folder)
    assert trials.unreadable(run) == []
    return code, world.outcome(run) if (run / "outcome.json").exists() else {}, world.log(trial)


def stopped_in(place: Place, phase: str) -> list[str]:
    trial = place.trial()
    code, outcome, _ = spoilt(trial, "signal_in", *PHASES[phase])
    end = {75: "stopped", 0: "finished"}.get(code)
    return [*wrong(stopped_or_finished=end is not None, outcome_says_so=outcome.get("outcome") == end), *ends_equal(place, trial)]


def hangs(place: Place, phase: str, how: str) -> list[str]:
    trial = place.trial(HANG)
    code, outcome, said = spoilt(trial, "hang_in", *PHASES[phase], how)
    found = wrong(
        failed=code == 1,
        outcome=outcome.get("outcome") == "failed" and "no progress for 6 s" in outcome["error"],
        said="no progress for 6 s" in said,
        way_on="same command goes on" in said,
    )
    return [*found, *ends_equal(place, trial)]


def disk_of_the_saver_hangs(place: Place) -> list[str]:
    """The background writer of checkpoints is held; the training waits for it."""
    trial = place.trial(HANG)
    code, outcome, _ = spoilt(trial, "hang_in", *PHASES["save"], "stuck")
    return [*wrong(failed=code == 1, outcome=outcome.get("outcome") == "failed"), *ends_equal(place, trial)]


def killed_data_worker(place: Place) -> list[str]:
    trial = place.trial(START | {"workers": 2}, stages=[HEAD | {"steps": 14}])
    whole = world.finish(replace(trial, folder=str(place.folder / "whole"), start=START))
    code, outcome, _ = spoilt(trial, "kill_worker", 2, 0)
    error = str(outcome.get("error"))
    found = wrong(failed=code == 1, signal_said="was killed by SIGKILL" in error, cause_said="no memory left" in error)
    return [*found, *trials.differences(world.finish(replace(trial, start=START)), whole)]


def error_after_the_claim(place: Place) -> list[str]:
    trial = place.trial()
    code, outcome, _ = spoilt(trial, "fail_in", "evaluation.kept_data", "write")
    return [*wrong(failed=code == 1, outcome=outcome.get("error") == "RuntimeError: planted"), *ends_equal(place, trial)]


def renamed_run(place: Place) -> list[str]:
    trial = place.trial()
    code, _, said = spoilt(trial, "rename_after", 6, trial.folder)
    elsewhere = Path(f"{trial.folder}-elsewhere")
    found = wrong(ended=code != 0, said="renamed or deleted" in said, nothing_left=not Path(trial.folder).exists())
    elsewhere.rename(trial.folder)
    return [*found, *ends_equal(place, trial)]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        raise Skipped("only root can mount a small disk, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(place: Place) -> list[str]:
    with small_disk(place.folder / "disk", "40m") as disk:
        trial = place.trial(START | {"folder": disk / "run"})
        code = world.run(replace(trial, before="faults.fill_disk", arguments=(6, str(disk), 300_000)))[0]
        (disk / "ballast").unlink()
        outcome = world.outcome(disk / "run")
        found = wrong(refused=code == 2, outcome=outcome["outcome"] == "failed", remedy="Make room" in outcome["error"])
        world.finish(trial)
        return [*found, *trials.differences(disk / "run", place.references(1))]


def old_checkpoint_stays(place: Place) -> list[str]:
    with small_disk(place.folder / "disk", "300m") as disk:
        trial = place.trial(START | {"keep": 1, "folder": disk / "run"})
        code = world.run(replace(trial, before="faults.hold_old_checkpoints", arguments=(str(disk / "run"),)))[0]
        found = wrong(finished=code == 0, said="could not be deleted" in world.log(trial))
        for mounted in (disk / "run" / "checkpoints").glob("[0-9]*"):
            subprocess.run(["umount", "--quiet", "--lazy", str(mounted)], capture_output=True, check=False)
        return found
