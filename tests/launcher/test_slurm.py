"""How the launcher talks to Slurm, with stand-ins for its commands: what is kept, in which order, and what is said of a job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.slurm import client
from tltrain.core import recipe
from tltrain.core.errors import MachineError, UserError
from tltrain.runs import run_dir

SBATCH = """\
#!/bin/sh
for word; do last=$word; done
case $1 in
--test-only) cat >/dev/null; echo "sbatch: Job 1 to start at 2026-01-01" >&2; exit 0 ;;
esac
number=$(($(cat "$FAKE_HOME/number") + 1)); echo $number > "$FAKE_HOME/number"
cp "$last" "$FAKE_HOME/submitted.$number"
echo "$number;cluster"
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH; the user stands in another."""
    (tmp_path / "work").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "number").write_text("7")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_API_KEY", "canary0123456789")
    write(tmp_path / "bin", "sbatch", SBATCH)
    return tmp_path / "bin"


def write(tools: Path, name: str, text: str) -> None:
    (tools / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    (tools / name).chmod(0o755)


def test_what_is_submitted_is_kept_in_the_run_folder(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", "--nodes", "2", "--time", "4:00:00", "--", "train", "digits-resnet", "--seed", "5", "--purpose", "a 'b'"]
    assert main(words) == 0
    run = Path("runs/digits-resnet").absolute()
    assert "job 8 submitted" in capsys.readouterr().out
    submitted, kept = (tools.parent / "submitted.8").read_bytes(), (run / "jobs" / "8.sbatch").read_bytes()
    assert submitted == kept
    stored = json.loads((run / "jobs" / "8.json").read_text())
    assert (stored["job"], stored["command"][3:], stored["runs"]) == ("8", words[1:], [str(run)])
    kept_recipe = recipe.load(str(run / "recipe.yaml"))
    assert (kept_recipe.seed, kept_recipe.purpose) == (5, "a 'b'")
    files = [path for path in tools.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if b"canary" in path.read_bytes()]
    assert main(words) == 0, "the same command again is the same run"
    with pytest.raises(UserError, match="another recipe"):
        main([*words, "--seed", "6"])
    run_dir.write_outcome(run, 0, {"outcome": "finished"})
    assert main(words) == 0, "a finished run is no mistake"
    assert not (tools.parent / "submitted.10").exists()


def test_a_dry_run_submits_nothing(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--dry-run", "--", "train", "digits-resnet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# Job 1 to start at 2026-01-01\n#!/usr/bin/env bash\n")
    assert not (tools.parent / "submitted.8").exists()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("sbatch", "note"),
    [
        (None, "not checked by Slurm: sbatch was not found on this machine"),
        (
            "cat >/dev/null; echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1",
            "not checked by Slurm: no controller answers this machine",
        ),
        (
            "cat >/dev/null; echo 'allocation failure: Unable to contact slurm controller (connect failure)' >&2; exit 1",
            "not checked by Slurm: no controller answers this machine",
        ),
    ],
)
def test_a_dry_run_needs_no_slurm(
    sbatch: str | None, note: str, tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if sbatch is None:
        (tools / "sbatch").unlink()
        (tools / "bash").symlink_to("/bin/bash")
        monkeypatch.setenv("PATH", str(tools))
    else:
        write(tools, "sbatch", sbatch)
    assert main(["slurm", "--dry-run", "--", "train", "digits-resnet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"# {note}\n#!/usr/bin/env bash\n")
    assert "#SBATCH --job-name=digits-resnet\n" in said
    with pytest.raises(UserError, match=r"has no Slurm|Slurm refuses this job"):
        main(["slurm", "--", "train", "digits-resnet"])
    assert list(Path().iterdir()) == []


def test_a_dry_run_shows_a_refusal(tools: Path) -> None:
    write(tools, "sbatch", "cat >/dev/null; echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(UserError, match="Slurm refuses this job: invalid partition specified: x"):
        main(["slurm", "--dry-run", "--", "train", "digits-resnet"])


def test_each_of_a_chain_waits_for_the_one_before(tools: Path) -> None:
    assert main(["slurm", "--", "train", "digits-vit", "--", "train", "digits-resnet", "--", "train", "digits-distill"]) == 0
    scripts = [(tools.parent / f"submitted.{number}").read_text() for number in (8, 9, 10)]
    waits = [re.findall(r"^#SBATCH (--dependency=\S+|--kill\S+)$", text, re.MULTILINE) for text in scripts]
    assert waits == [[], ["--dependency=afterok:8", "--kill-on-invalid-dep=yes"], ["--dependency=afterok:9", "--kill-on-invalid-dep=yes"]]


def test_the_second_of_a_chain_may_wait_for_another_job_too(tools: Path) -> None:
    with pytest.raises(UserError, match="--dependency"):
        main(["slurm", "--dependency", "afterok:3", "--", "train", "digits-vit", "--", "train", "digits-resnet"])


def test_what_slurm_refuses_is_said_before_anything_is_kept(tools: Path) -> None:
    write(tools, "sbatch", "cat >/dev/null; echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(UserError, match="Slurm refuses this job: invalid partition specified: x"):
        main(["slurm", "--", "train", "digits-resnet"])
    assert list(Path().iterdir()) == []


def test_the_state_of_a_job(tools: Path, tmp_path: Path) -> None:
    write(tools, "squeue", "echo 'RUNNING|None|n[1-2]'")
    assert client.state("8") == "RUNNING on n[1-2]"
    write(tools, "squeue", "echo 'PENDING|Dependency|'")
    assert client.state("8") == "PENDING (Dependency)"
    write(tools, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    write(tools, "scontrol", f"echo 'JobCompType             = jobcomp/filetxt'; echo 'JobCompLoc              = {tmp_path}/completed'")
    assert "unknown to Slurm" in client.state("8")
    (tmp_path / "completed").write_text(
        "JobId=18 Name=a JobState=FAILED \nJobId=8 Name=a JobState=CANCELLED \nJobId=8 Name=a JobState=COMPLETED \n"
    )
    assert client.state("8") == "COMPLETED"
    write(tools, "sacct", "echo TIMEOUT")
    assert client.state("8") == "TIMEOUT"


def test_looking_at_a_folder_without_jobs(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no job"):
        main(["status", str(tmp_path)])


def test_cancel_tells_slurm(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["slurm", "--", "train", "digits-resnet"])
    write(tools, "scancel", 'echo "$@" > "$FAKE_HOME/cancelled"')
    assert main(["cancel", "runs/digits-resnet"]) == 0
    assert (tools.parent / "cancelled").read_text() == "8\n"
    write(tools, "scancel", "echo 'scancel: error: Invalid job id' >&2; exit 1")
    with pytest.raises(UserError, match="Invalid job id"):
        main(["cancel", "runs/digits-resnet"])


RECORD = {"job": "8", "target": "slurm", "time": 1.0, "runs": []}


@pytest.mark.parametrize(
    "record",
    [
        *({**RECORD, "job": job} for job in ("--user=root", "-8", "8 --me", "8\n9", "8_4_4", "alone", "", "8" * 9 + "x", 8, None, ["8"])),
        *({**RECORD, "time": time} for time in ("1", None, True, float("nan"))),
        *({**RECORD, "runs": runs} for runs in ("ab", None, [1], {"a": 1})),
        {**RECORD, "target": 3},
        [RECORD],
        "8",
    ],
    ids=lambda record: json.dumps(record)[:40],
)
@pytest.mark.parametrize("verb", ["cancel", "status"])
def test_a_record_of_somebody_else_reaches_no_command_of_slurm(tools: Path, tmp_path: Path, record: object, verb: str) -> None:
    for name in ("scancel", "squeue", "sacct", "scontrol"):
        write(tools, name, 'echo "$@" >> "$FAKE_HOME/called"')
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    (tmp_path / "run" / "jobs" / "8.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no record of a job|numbers such as 123"):
        main([verb, str(tmp_path / "run")])
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"job": "8', "1" * 5000])
def test_a_record_that_is_no_json_is_named(tools: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    (tmp_path / "run" / "jobs" / "8.json").write_text(content)
    with pytest.raises(UserError, match=r"8\.json"):
        main(["cancel", str(tmp_path / "run")])


@pytest.mark.parametrize("said", ["", "Welcome to the cluster", "job=8", "-8"])
def test_sbatch_that_names_no_number_is_said(tools: Path, said: str) -> None:
    write(tools, "sbatch", f"case $1 in --test-only) cat >/dev/null ;; *) echo '{said}' ;; esac")
    with pytest.raises(UserError, match="printed no job number"):
        main(["slurm", "--", "train", "digits-resnet"])
    assert not list(Path("runs/digits-resnet/jobs").glob("*.json"))


def test_a_finished_run_is_no_mistake_but_one_of_a_chain_is(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir.create(Path("runs/digits-resnet"), recipe.load("digits-resnet"))
    (Path("runs/digits-resnet") / "outcome.json").write_text('{"outcome": "finished", "generation": 1}')
    for words in (["slurm", "--", "train", "digits-resnet"], ["local", "--", "train", "digits-resnet"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "is finished already" in said
        assert "-- train RECIPE --folder" in said
    assert not (Path("runs/digits-resnet") / "jobs").exists()
    with pytest.raises(UserError, match="out of the chain"):
        main(["slurm", "--", "train", "digits-resnet", "--", "train", "digits-vit"])


def test_a_greeting_before_the_number_is_passed_over(tools: Path) -> None:
    write(tools, "sbatch", "case $1 in --test-only) cat >/dev/null ;; *) echo Welcome; echo '8;cluster' ;; esac")
    assert main(["slurm", "--", "train", "digits-resnet"]) == 0
    assert Path("runs/digits-resnet/jobs/8.json").is_file()


def test_a_controller_that_does_not_answer_is_not_waited_for(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_S", 0.3)
    write(tools, "squeue", "exec sleep 60")
    write(tools, "sbatch", "exec sleep 60")
    with pytest.raises(MachineError, match="squeue has not answered for 0 s"):
        client.state("12")
    with pytest.raises(MachineError, match="look with `squeue --me`"):
        client.submit(tools / "some.sbatch")
