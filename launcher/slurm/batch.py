"""`python -m launcher.batch`: called by the job script before and after its processes run.

`begin` prints the run folder. `end` prints what the script does next. Both write their records to RUN/jobs/JOB/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import command
from launcher.slurm.requeue import Ended, Limits, decide, first_failure
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import escape
from tltrain.runs import heartbeat, run_dir
from tltrain.runs.links import append_only


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.batch", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    begins = verbs.add_parser("begin")
    begins.add_argument("--job", required=True)
    begins.add_argument("training", nargs=argparse.REMAINDER)
    ends = verbs.add_parser("end")
    ends.add_argument("--run", type=Path, required=True)
    ends.add_argument("--job", required=True)
    ends.add_argument("--preempted", default="")
    ends.add_argument("--terminated", default="")
    ends.add_argument("--slurm", default="", help="what `scontrol --oneliner show job` says")
    ends.add_argument("--max-requeues", type=int, required=True)
    ends.add_argument("--max-crash-requeues", type=int, required=True)
    arguments = parser.parse_args(argv)
    if arguments.verb == "begin":
        training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
        print(begin(training, arguments.job))
    else:
        limits = Limits(arguments.max_requeues, arguments.max_crash_requeues)
        print(end(arguments.run, arguments.job, bool(arguments.preempted), bool(arguments.terminated), limits, arguments.slurm))
    return 0


def begin(training: list[str], job: str) -> Path:
    """Prepare a start of the job: check the command, create the folders, and record the newest earlier start of the run.

    Returns the run folder. Raises UserError.
    """
    run = command.parse(training)
    run_dir.check_recipe(run.run, run.recipe)
    run_dir.create(run.run, run.recipe)
    job_folder = run.run / "jobs" / job
    job_folder.mkdir(parents=True, exist_ok=True)
    for note in job_folder.glob("*.failed.json"):
        note.unlink()
    before = heartbeat.newest_generation(run_dir.generations(run.run))
    files.write_json(job_folder / "start.json", {"generation": before, "time": time.time(), "restart": restart_count()})
    return run.run


def end(run: Path, job: str, preempted: bool, terminated: bool, limits: Limits, slurm: str = "") -> str:
    """Decide what the job script does after its processes ended, and record the decision with its reason.

    preempted, terminated: whether the script got SIGUSR2 or SIGTERM.
    slurm: output of `scontrol --oneliner show job`.
    Returns the action (`requeue.Action`).
    """
    job_folder = run / "jobs" / job
    start = json.loads(files.read_bytes(job_folder / "start.json"))
    if start["restart"] > restart_count():
        _say("stopped: a later start of this job has taken over on other nodes; this one decides nothing more")
        return "stopped"
    before = start["generation"]
    outcome = outcome_since(run, before)
    by_slurm = (terminated or outcome.get("outcome") == "stopped") and _is_preempted(slurm)
    ended = Ended(outcome, preempted, terminated, by_slurm)
    past = [line["why"] for line in _lines(job_folder / "ends.jsonl") if line["action"] == "requeue"]
    action, why = decide(ended, past, limits)
    _say(f"{action}: {why}")
    note = first_failure([json.loads(files.read_bytes(p)) for p in sorted(job_folder.glob("*.failed.json"))])
    if note is not None and (action == "failed" or why == "crashed"):
        _report_first_failure(run, job_folder, note, before)
    with append_only(job_folder / "ends.jsonl") as file:
        file.write(json.dumps({"action": action, "why": why, "restart": restart_count(), "time": time.time(), **_place(outcome)}) + "\n")
    return action


def outcome_since(run: Path, before: int) -> dict[str, Any]:
    """outcome.json, where the run is finished or a start newer than generation `before` wrote the file. Otherwise empty.

    An older start may still write its outcome late. That outcome does not apply to the current start.
    """
    outcome = run_dir.outcome(run)
    return outcome if outcome.get("outcome") == "finished" or outcome.get("generation", 0) > before else {}


def restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _report_first_failure(run: Path, job_folder: Path, note: Mapping[str, Any], before: int) -> None:
    """Report the process that failed first, in the job's log and in outcome.json."""
    who = f"rank {note['rank']}" if "rank" in note else f"node {note['node']}"
    _say(f"{who} on {note['host']} failed first: {note['error']}; logs: {job_folder}/node-*.log")
    sys.stderr.write(note["traceback"].rstrip() + "\n")
    generation = heartbeat.newest_generation(run_dir.generations(run))
    if generation > before:  # a start refused because the run is active elsewhere must not overwrite its outcome
        place = {"rank": note["rank"]} if "rank" in note else {"node": note["node"]}
        known = {k: v for k, v in outcome_since(run, before).items() if k != "rank"}
        details = {**known, "outcome": "failed", **place, "host": note["host"], "error": note["error"]}
        run_dir.write_outcome(run, generation, details)


def _is_preempted(slurm: str) -> bool:
    """Whether Slurm is preempting the job and will requeue it by itself (PreemptMode=REQUEUE)."""
    fields = dict(word.split("=", 1) for word in slurm.split() if "=" in word)
    return fields.get("PreemptTime", "None") != "None" and fields.get("JobState") == "RUNNING"


def _place(outcome: dict[str, Any]) -> dict[str, Any]:
    return {key: outcome[key] for key in ("outcome", "signal", "stage", "step", "generation") if key in outcome}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_text(path).splitlines()] if path.exists() else []


def _say(text: str) -> None:
    print(f"launch  {escape.terminal(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        _say(str(error))
        code = 2
    sys.exit(code)
