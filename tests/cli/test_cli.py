"""The command: what a person types, and what a person's mistake costs: one clear message and exit code 2."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_words import mistake
from PIL import Image

from tltrain.cli.main import VERBS, main
from tltrain.core.arguments.words import SHORT
from tltrain.core.recipe import Recipe, load, shipped


def photos(folder: Path, classes: tuple[str, ...] = ("ant", "bee"), num: int = 6) -> Path:
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(num):
            Image.new("RGB", (40, 30), (40 * i, 10 * j, 90)).save(folder / name / f"{j}.png")
    return folder


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("name: a\nbatch: 8\nbatsch: 8\n", "batsch: unknown key; did you mean batch?"),
        ("name: a\nbatch: many\n", "batch: 'many'"),
        ("version: 99\n", "recipe of version 99"),
        ("- 1\n", "not a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_bad_recipe_file(yaml: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(yaml)
    assert says in mistake(["train", str(tmp_path / "r.yaml")], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "did you mean train?"),
        (["train"], "needs a recipe"),
        (["train", "digits-resnte"], "did you mean digits-resnet?"),
        (["train", "nothing.yaml"], "cannot be read"),
        (["train", "digits-resnet", "--stages.0.lrr", "3"], "--stages.0.lr"),
        (["train", "digits-resnet", "--stages.0.lr", "fast"], "fast"),
        (["train", "digits-resnet", "--stages.0.lr", "-1"], "greater than 0"),
        (["train", "digits-resnet", "--save-minutes", "-1"], "save-minutes"),
        (["train", "digits-resnet", "--data.source", "folder:/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "digits-resnet", "--data.source", "imagenet22k"], "imagenet22k"),
        (["train", "digits-resnet", "--backbone.name", "resnet51"], "resnet51"),
        (["train", "digits-resnet", "--backbone.weights", "/no/such.safetensors"], "/no/such.safetensors"),
        (["train", "digits-resnet", "--stages.1.unfreeze", "layer9"], "layer9"),
        (["plan", "digits-vit", "--data.size", "30"], "30"),
        (["evaluate", "/no/run"], "/no/run"),
        (["report", "/no/run"], "/no/run"),
    ],
)
def test_a_mistake_in_the_words(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in mistake(words, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate"], "the following arguments are required: run; see `tltrain evaluate --help`"),
        (["evaluate", "x", "--bacth", "3"], "there is no flag --bacth (did you mean --batch?); see `tltrain evaluate --help`"),
        (["train", "digits-resnet", "--bacth=3"], "there is no flag --bacth (did you mean --batch?); see `tltrain train digits"),
        (["plan", "digits-resnet", "--zz", "3"], "there is no flag --zz; see `tltrain plan digits-resnet --help`"),
        (["recipes", "a", "b"], "there is no place for b; see `tltrain recipes --help`"),
        (["train", "digits-resnet", "digits", "b"], "there is no place for b; see `tltrain train digits-resnet --help`"),
        (["predict", "x", "y", "--top", "many"], "--top is 'many'; it must be a whole number; see `tltrain predict --help`"),
        (["predict", "x", "y", "--top"], "--top needs a value behind it; see `tltrain predict --help`"),
        (["ls", "--sort", "age"], "--sort is 'age'; it must be one of when, run, recipe, data, state, val, test, time; see"),
        (["cache", "list"], "'list' is none of ls, verify, clear; see `tltrain cache --help`"),
        (["train", "digits-resnet", "--seed"], "--seed needs a value behind it; see `tltrain train digits-"),
        (["launch", "slurm", "--tme", "3", "--", "train", "digits-vit"], "there is no flag --tme (did you mean --time?); see `"),
        (["launch", "local", "--procs", "3", "--", "train", "digits-vit"], "there is no flag --procs (did you mean --processes?); see `"),
        (["evaluate", "x", "--js"], "there is no flag --js"),
    ],
)  # fmt: skip
def test_every_verb_says_a_mistake_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(words, capsys)
    assert message.startswith(f"tltrain: {says}")
    assert message.count("\n") == 1
    assert message.endswith(" --help`\n")


def test_an_empty_class_and_an_image_that_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits-resnet", "--data.source", f"folder:{photos(tmp_path / 'p')}"]
    (tmp_path / "p" / "cat").mkdir()
    assert "cat" in mistake(words, capsys)
    (tmp_path / "p" / "cat").rmdir()
    for name in ("notes.jpg", "more.jpg"):
        (tmp_path / "p" / "ant" / name).write_text("not an image")
    assert "notes.jpg" in mistake(words, capsys)  # 1 % of 14 files is one


def test_every_shipped_recipe_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", num=20)
    for name in shipped():
        assert main(["plan", name, "--cache", "never", "--cache-images", "never"]) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        assert "frozen" in text or all(stage.unfreeze == "all" for stage in load(name).stages)
        assert "batch " in text


def test_plan_says_what_an_override_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits-resnet", "--stages.1.lr", "0.123", "--batch", "48", "--max-device-batch", "20"]) == 0
    text = capsys.readouterr().out
    assert "0.123" in text
    assert "cache   head: features before head, train, 1 view of" in text, "and what is worth storing, timed on this machine"
    assert "batch   48 = 1 process x 3 micro-batches x 16 images" in text


def test_recipes_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped())
    assert main(["recipes", "--backbones"]) == 0
    listed = capsys.readouterr().out
    assert "vit-b16" in listed
    assert "tltrain[timm]" in "".join(listed.split())
    assert main(["recipes", "--backbones", "test_vit"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "timm:test_vit 0.3 M parameters, 160 px; weights: r160_in1k" in found
    assert "resnet" not in found
    assert main(["recipes", "--backbones", "resnet1O1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["recipes", "digits-resnet"]) == 0
    assert capsys.readouterr().out == shipped()["digits-resnet"].read_text()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Recipe.model_json_schema()


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


HELPED = ([], *([verb] for verb in VERBS), ["launch", "slurm"], ["launch", "local"], ["cache", "verify"])


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_every_help_fits_one_screen_of_80_columns(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc")
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_light_verbs_import_no_torch() -> None:
    code = "import sys; from tltrain.cli.main import main; main(['recipes']); main(['schema']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_command_ends_in_silence_with_triton() -> None:
    """Triton 3.9, that of torch 2.15, prints a page about leaks where its objects are kept from the last collection."""
    pytest.importorskip("triton._C.libtriton")
    code = "import sys, triton._C.libtriton; from tltrain.cli.main import main; sys.argv = ['tltrain', '--version']; sys.exit(main())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_train_and_evaluate_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"folder:{photos(tmp_path / 'photos', num=20)}"
    words = ["--data.source", source, "--backbone.name", "resnet-micro", "--backbone.weights", "None", "--workers", "2", "--smoke"]
    assert main(["train", "folder-resnet50", *words, "--data.size", "32", "--data.resize", "None"]) == 0
    run = tmp_path / "runs" / "folder-resnet50-smoke"
    assert "report " in capsys.readouterr().out
    assert main(["evaluate", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "test_metrics.json").read_text())
    assert figures["top1"] == kept["top1"]
    assert figures["loss"] == pytest.approx(kept["loss"], rel=1e-6)
    assert main(["evaluate", str(run), "--data", "photos"]) == 0, "a bare folder, as train takes it"
    assert "all images        16" in capsys.readouterr().out  # smoke evaluates one batch
    assert main(["report", str(run)]) == 0


def launcher_options() -> dict[str, list[str]]:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}
    return {name: [o for action in parser._actions for o in action.option_strings] for name, parser in parsers.items()}


def test_no_flag_of_ours_is_ambiguous_to_a_launcher() -> None:
    """Launchers scan all words: a flag that begins two of theirs ends the launch before our command is reached."""
    from dataclasses import fields

    from tltrain.core.flags import RunFlags

    ours = [f"--{f.name.replace('_', '-')}" for f in fields(RunFlags)] + [f"--{name}" for name in Recipe.model_fields] + list(SHORT)
    for launcher, theirs in launcher_options().items():
        for flag in ours:
            assert sum(option.startswith(flag) for option in theirs) < 2, (launcher, flag)


def test_a_run_folder_that_is_not_there_is_refused_at_once_and_those_near_it_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    mistakes = {
        "evaluate runs/photoz": "there is no folder runs/photoz; did you mean runs/photos?",
        "predict nosuch a.png": "there is no folder nosuch; run folders here: runs/photos",
        "export runs --to hf": "runs is no run folder, but holds some; give one of them: runs/photos",
        "evaluate --corruptions runs/photos": "required: run (--corruptions takes what stands behind it: put it last)",
        "export --to hf --images a.png runs/photos": "required: run (--images takes what stands behind it: put it last)",
        "export runs/photos --to onx": "--to is 'onx'; did you mean onnx?",
        "predict runs/photos a.png --top 0": "--top is 0; it must be at least 1",
        "predict runs/photos a.png --data x": "there is no flag --data; see",
        "report runs/photoz": "there is no folder runs/photoz; did you mean runs/photos?",
        "compare runs/photos runs/photoz": "there is no folder runs/photoz; did you mean runs/photos?",
        "soup runs/photos runs/photoz --out x": "there is no folder runs/photoz; did you mean runs/photos?",
        "fit runz": "runz is no folder and no data source; did you mean runs?",
    }
    for typed, said in mistakes.items():
        assert main(typed.split()) == 2
        assert said in capsys.readouterr().err
    code = "import sys; from tltrain.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for typed in mistakes:
        assert subprocess.run([sys.executable, "-c", code, *typed.split()], capture_output=True).returncode == 0, "before torch is imported"
