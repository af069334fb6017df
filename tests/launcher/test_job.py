"""A job's options, its script, the words it is given: pure functions, and nothing in them is ever run by accident."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launcher import command, shell
from launcher.cli import main
from launcher.slurm import script, site
from launcher.slurm.job import Job, header, sbatch_arguments, seconds, settings
from launcher.slurm.target import prepare
from tltrain.core import recipe
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags

ROOT = Path(__file__).resolve().parents[2]
PIECES = [
    "$(touch canary)", "`touch canary`", ";touch canary;", "&& touch canary", "|touch canary", ">canary", "\ntouch canary\n",
    "'", '"', "\\", " ", "\t", "\r\n", "\r", "$HOME", "${IFS}", "*", "?", "[a]", "~", "#", "!", "!!", "%j", "%%", "{a,b}",
    "--", "-", "=", "\x01", "\x7f", "é", "日本", "\u200b", "\u2028", "😀", "\u0301", "a", "0", "afterok:1", "64G", "4:00:00", "gpu",
    "#SBATCH --wrap=x", "\n#SBATCH --partition=x", "<<E", "E", "$'\\n'", "\\n", "\x1b[31m",
]  # fmt: skip


def values(number: int, seed: int) -> list[str]:
    """Generated words: shell syntax, spaces, newlines, control characters, unicode, in every order."""
    draw = random.Random(seed)
    return ["".join(draw.choice(PIECES) for _ in range(draw.randint(0, 6))) for _ in range(number)]


def captured(lines: Sequence[str], cwd: Path) -> list[bytes]:
    """Run bash over lines that end in `printf '%s\\0' …` and return what it printed, word by word."""
    text = "\n".join(lines).encode()
    assert subprocess.run(["bash", "-n"], input=text, capture_output=True, cwd=cwd).returncode == 0
    done = subprocess.run(["bash"], input=text, capture_output=True, cwd=cwd, check=True)
    assert done.stderr == b""
    return done.stdout.split(b"\0")[:-1]


def test_ten_thousand_words_reach_a_command_as_they_are(tmp_path: Path) -> None:
    many = values(10_000, seed=1)
    for start in range(0, len(many), 500):
        part = many[start : start + 500]
        assert captured([f"printf '%s\\0' {shell.quote(word)}" for word in part], tmp_path) == [word.encode() for word in part]
    assert list(tmp_path.iterdir()) == [], "nothing was run"
    script_text = "".join(f"x={shell.quote(word)}\n" for word in many)
    assert script_text.count("\n") == len(many), "one statement a line"
    assert "\r" not in script_text
    assert not [line for line in script_text.split("\n") if line.startswith("#SBATCH")]


def test_ten_thousand_values_of_every_field_arrive_or_are_refused(tmp_path: Path) -> None:
    """A field's value stands unchanged in a #SBATCH line or in the script's settings, or the job is refused; nothing is run."""
    texts = [field.name for field in fields(Job) if "str" in str(field.type) and field.name != "setup"]
    arrived, refused = dict.fromkeys(texts, 0), dict.fromkeys(texts, 0)
    lines: list[str] = []
    expected: list[bytes] = []
    for number, value in enumerate(values(10_000, seed=2)):
        name = texts[number % len(texts)]
        value = {"array": f"seed={value}", "constraint": value[:3], "container": value}.get(name, value)
        try:
            given: dict[str, Any] = {name: value}
            job = Job(**given)
        except UserError as error:
            refused[name] += 1
            told = str(error)
            assert repr(value) in told or value in told
            continue
        arrived[name] += 1
        text = settings(job, "python", ["train"])
        if name in ("accelerate", "container"):
            lines += [text, 'printf \'%s\\0\' "$accelerate" "${python[@]}"']
            expected += [(job.accelerate or "").encode(), *(word.encode() for word in job.container_argv), b"python"]
        else:
            (line,) = [
                line for line in header(sbatch_arguments(job, "n", "l")).splitlines() if line.startswith(f"#SBATCH --{_option(name)}=")
            ]
            told = line.partition("=")[2]
            assert told == (f"0-{len(job.array_values) - 1}" if name == "array" else value)
            assert re.fullmatch(r"[\x21-\x7e]+", told), "one word for Slurm"
    for start in range(0, len(lines), 1000):
        assert subprocess.run(["bash", "-n"], input="\n".join(lines[start : start + 1000]).encode(), capture_output=True).returncode == 0
    assert captured(lines, tmp_path) == expected
    assert list(tmp_path.iterdir()) == [], "nothing was run"
    assert min(arrived.values()) > 0
    assert min(count for name, count in refused.items() if name != "accelerate") > 0


def _option(name: str) -> str:
    return {"memory": "mem", "name": "job-name"}.get(name, name)


def test_run_folders_and_flags_arrive_or_are_refused(tmp_path: Path) -> None:
    """What the job's command is given, for generated folders and W&B projects; overrides travel inside the kept recipe."""
    template = recipe.load("digits-resnet")
    lines, expected = [], []
    refused = 0
    for value in values(300, seed=3):
        run = tmp_path / ("r" + value.replace("/", "_"))
        training = command.Training(template, RunFlags(folder=run, wandb_project=value), run)
        lines += ["set --", settings(Job(), "python", script.argv_of(training)), "printf '%s\\0' \"$@\""]
        expected += [word.encode() for word in training.argv]
        assert recipe.parse(template.model_copy(update={"purpose": value}).to_yaml(), "x").purpose == value
        try:
            assert script.log_pattern(run, array=False).startswith(str(run))
        except UserError:
            refused += 1
    assert captured(lines, tmp_path) == expected
    assert list(tmp_path.iterdir()) == []
    assert 0 < refused < 300


def test_overrides_with_shell_syntax_reach_the_kept_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in values(40, seed=4):
        submission = prepare(Job(gpus_per_node=0), ["train", "digits-resnet", "--purpose=p" + value, "--folder", "run"], ["x"])
        assert submission.runs[0].recipe.purpose == "p" + value
        assert subprocess.run(["bash", "-n"], input=submission.script.encode(), capture_output=True).returncode == 0
    assert list(tmp_path.iterdir()) == [], "preparing touches nothing"


def test_a_zero_byte_is_refused() -> None:
    with pytest.raises(UserError, match="zero byte"):
        shell.quote("a\0b")


def test_the_options_of_sbatch() -> None:
    job = Job(
        nodes=2,
        gpus_per_node=8,
        memory="64G",
        time="4:00:00",
        partition="gpu",
        account="lab",
        qos="high",
        constraint="a100|h100",
        dependency="afterok:7",
    )
    assert sbatch_arguments(job, "digits", "/r/jobs/%j.log") == [
        "--job-name=digits", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8", "--mem=64G", "--time=4:00:00",
        "--partition=gpu", "--account=lab", "--qos=high", "--constraint=a100|h100", "--dependency=afterok:7", "--signal=B:USR2@120",
        "--open-mode=append", "--output=/r/jobs/%j.log", "--requeue", "--kill-on-invalid-dep=yes",
    ]  # fmt: skip
    assert "--gpus-per-node" not in " ".join(sbatch_arguments(Job(gpus_per_node=0), "n", "l")), (
        "a cluster without GPUs knows no such option"
    )
    assert "--array=0-2" in sbatch_arguments(Job(array="seed=0,1,2"), "n", "l")
    assert header(["--output=/a b/%j.log"]) == '#SBATCH "--output=/a b/%j.log"\n'


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"nodes": 0}, "--nodes is 0; it must be at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node"),
        ({"time": "4 hours"}, "H:MM:SS"),
        ({"time": "3", "signal_s": 100}, "told to stop as it starts"),
        ({"memory": "lots"}, "such as 64G"),
        ({"partition": "gpu; rm"}, "--partition is 'gpu; rm'"),
        ({"setup": ("module load a\nrm x",)}, "one whole line"),
        ({"setup": ("echo \\",)}, "one whole line"),
        ({"container": "apptainer 'x"}, "close the quotes"),
        ({"container": " "}, "leave it out"),
        ({"array": "seed=1,1"}, "each value may stand once"),
        ({"array": "1,2"}, "seed=0,1,2"),
        ({"array": "seed=.."}, "seed=0,1,2"),
        ({"gpus_per_node": 0, "accelerate": "ddp"}, "without GPUs choose cpu"),
    ],
)
def test_a_job_that_cannot_be_is_refused(settings_: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        Job(**settings_)


def test_the_script_is_the_template_with_its_own_header_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(nodes=2, setup=("module load cuda", "export A='b c'"), container="apptainer exec --nv 'my image.sif'")
    text = prepare(job, ["train", "digits-resnet", "--seed", "3"], ["tltrain", "launch", "slurm"]).script
    template = (ROOT / "slurm" / "train.sbatch").read_text()
    assert text.endswith(template.partition("# ------")[2].lstrip("-"))
    assert "#SBATCH --nodes=2\n" in text
    assert "module load cuda\nexport A='b c'\npython=(apptainer exec --nv 'my image.sif' python)\n" in text
    assert f"set -- train {tmp_path}/runs/digits-resnet/recipe.yaml --folder {tmp_path}/runs/digits-resnet\n" in text
    assert sys.executable not in text, "a container has its own python"


@pytest.mark.parametrize(
    ("time", "value"),
    [("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:15", 95415)],
)
def test_time_limits_as_slurm_reads_them(time: str, value: int) -> None:
    assert seconds(time) == value


@pytest.mark.parametrize("line", ["if true; then", "cat <<END", "echo 'open", "true &&", "a | "])
def test_set_up_lines_must_be_whole_lines_of_bash(line: str) -> None:
    with pytest.raises(UserError, match="bash does not understand"):
        script.check_bash("true\n", Job(setup=(line,)))


def test_set_up_lines_arrive_as_lines_or_are_refused() -> None:
    """They are bash on purpose: none may reach into the line behind it."""
    arrived = 0
    for value in values(300, seed=5):
        try:
            job = Job(setup=(f"export A={value}",))
            text = settings(job, "python", ["train"])
            script.check_bash(text, job)
        except UserError:
            continue
        arrived += 1
        assert text.startswith(f"export A={value}\npython=(python)\n")
    assert 0 < arrived < 300


def test_an_array_gives_each_value_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    submission = prepare(Job(array="stages.1.lr=1e-3,3e-4"), ["train", "digits-resnet", "--keep", "1"], ["x"])
    assert submission.folder == tmp_path / "runs" / "digits-resnet-by-stages.1.lr"
    assert [run.recipe.stages[1].lr for run in submission.runs] == [1e-3, 3e-4]
    lines = settings(Job(array="stages.1.lr=1e-3,3e-4"), "python", script.argv_of_array(submission.folder, submission.runs))
    text = f"set --\nSLURM_ARRAY_TASK_ID=1\n{lines}"
    folder = f"{submission.folder}/3e-4"
    assert captured([text, "printf '%s\\0' \"$@\""], tmp_path) == [
        word.encode() for word in ("train", f"{folder}/recipe.yaml", "--keep", "1", "--folder", folder)
    ]
    with pytest.raises(UserError, match="stands in the command and in --array"):
        prepare(Job(array="seed=1,2"), ["train", "digits-resnet", "--seed", "3"], ["x"])
    with pytest.raises(UserError, match=r"the recipe has no 'stages\.7\.lr'"):
        prepare(Job(array="stages.7.lr=1,2"), ["train", "digits-resnet"], ["x"])
    patience = prepare(Job(array="stages.1.patience=3,None"), ["train", "digits-resnet", "--smoke"], ["x"]).runs
    assert [(run.recipe.stages[1].patience, run.recipe.stages[1].steps) for run in patience] == [(3, 2), (None, 2)]


def test_site_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site.defaults() == Job()
    file = tmp_path / "tltrain" / "slurm.yaml"
    file.parent.mkdir()
    file.write_text("account: lab\npartition: gpu\ncpus: 12\nsetup: |\n  module load cuda\n  source ~/venv/bin/activate\n")
    assert site.defaults() == Job(account="lab", partition="gpu", cpus=12, setup=("module load cuda", "source ~/venv/bin/activate"))
    for text, says in [
        ("partitoin: gpu", "did you mean partition"),
        ("cpus: many", "whole number"),
        ("time: 240", "put it in quotes"),
        ("- a", "settings such as"),
        ("a: [", "is not YAML"),
        ("nodes: 0", "at least 1"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            site.defaults()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["lokal"], "did you mean local"),
        (["slurm", "--nodes", "2"], "write it behind --"),
        (["slurm", "--", "evaluate", "x"], "only `train RECIPE …`"),
        (["slurm", "--array", "seed=1,2", "--", "train", "digits-resnet", "--", "train", "digits-vit"], "cannot be had at once"),
        (["slurm", "--", "train", "digits-resent"], "digits-resnet"),
        (["local", "--processes", "0", "--", "train", "digits-resnet"], "at least 1"),
        (["local", "--", "train", "digits-resnet", "--", "train", "digits-vit"], "starts one command"),
    ],
)
def test_a_mistake_in_the_words_is_said(given: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(says)):
        main(given)
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere:/bin:/usr/sbin".replace("/bin", "/nowhere"))
    monkeypatch.setattr(script, "check_bash", lambda text, job: None)
    with pytest.raises(UserError, match="has no Slurm"):
        main(["slurm", "--", "train", "digits-resnet"])


def test_start_flags_are_words_again() -> None:
    start = RunFlags(folder=Path("a b"), workers=0, smoke=True, wandb="offline", save_minutes=2.5)
    given = command.flags(start)
    assert given == ["--folder", "a b", "--workers", "0", "--save-minutes", "2.5", "--wandb", "offline", "--smoke"]
    training = command.parse(["train", "digits-resnet", *given])
    assert training.start == replace(start, folder=Path("a b").absolute())


def test_the_launcher_is_quick_on_a_login_node() -> None:
    heavy = {"torch", "transformers", "torchvision", "accelerate", "sklearn", "wandb"}
    modules = "launcher.cli, launcher.local, launcher.slurm.target, launcher.batch, launcher.node"
    code = f"import sys, {modules}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
