"""Short words on the command line: what they mean, what is said, and what a mistake costs: two lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_words import mistake

from tltrain.cli.main import main
from tltrain.core.arguments.parsing import parse
from tltrain.core.arguments.short_help import EXAMPLES
from tltrain.core.arguments.words import understood
from tltrain.core.errors import UserError
from tltrain.core.recipe import load


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder of photos and a table."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "table.csv").write_text("path,label\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["photos"], "data.source", "folder:photos"),
        (["table.csv"], "data.source", "csv:table.csv"),
        (["cifar10"], "data.source", "cifar10"),
        (["--smoke", "photos"], "data.source", "folder:photos"),
        (["--seed", "1", "photos"], "data.source", "folder:photos"),
        (["--data", "photos"], "data.source", "folder:photos"),
        (["--data=folder:elsewhere"], "data.source", "folder:elsewhere"),
        (["--size", "128"], "data.size", 128),
        (["--batch", "8"], "batch", 8),
        (["--stages.top.lr", "0.5"], "stages.1.lr", 0.5),
        (["--lr=0.25", "--stages.all.lr", "0.5"], "stages.2.lr", 0.5),
        (["--lr=0.25", "--stages.all.lr", "0.5"], "stages.1.lr", 0.25),
        (["--backbone.mean", "0.5,0.25,1"], "backbone.mean", (0.5, 0.25, 1.0)),
        (["--backbone.std=1,2,3"], "backbone.std", (1.0, 2.0, 3.0)),
        (["table.csv", "--data.label_columns", "a,b"], "data.label_columns", ("a", "b")),
        (["table.csv", "--data.label-columns=a,b"], "data.label_columns", ("a", "b")),
        (["table.csv", "--data.label_columns", "a", "b, c"], "data.label_columns", ("a", "b, c")),
    ],
)
def test_short_words_are_overrides(here: Path, words: list[str], path: str, value: object) -> None:
    recipe, _ = parse("train", ["digits-resnet", *words])
    held = recipe.flat()[path]
    assert (tuple(held) if isinstance(held, list) else held) == value


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["--workers", "2", "photos"], "folder:photos"),
        (["--smoke", "photos"], "folder:photos"),
        (["--epochs=2", "photos"], "folder:photos"),
        (["--folder", "photos"], "digits"),
        (["--trackers", "wandb", "printed"], "digits"),
        (["--backbone.mean", "0", "0", "0", "photos"], None),
        (["--backbone.mean", "0, 0,0", "photos"], "folder:photos"),
        (["--backbone.mean=0, 0,0", "photos"], "folder:photos"),
    ],
)
def test_the_last_word_is_the_data_where_no_flag_takes_it(
    here: Path, words: list[str], data: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tltrain.core.registry._others", lambda kind: {"printed": None} if kind == "trackers" else {})
    if data is None:
        with pytest.raises(UserError):
            parse("train", ["digits-resnet", *words])
        return
    assert parse("train", ["digits-resnet", *words])[0].data.source == data


def test_one_word_with_commas_is_a_whole_list_unless_it_is_a_path(here: Path) -> None:
    (here / "runs" / "a,b").mkdir(parents=True)
    recipe = load("digits-resnet")
    assert understood(recipe, ["--data.label_columns", "cat, dog", "photos"]).rest == ["--data.label_columns", "cat", "dog"]
    assert understood(recipe, ["--data.label_columns", "cat, dog", "photos"]).changes == {"data.source": "folder:photos"}
    for argv in (["--distill.ensemble", "run:runs/a,b"], ["--distill.ensemble=run:runs/a,b"], ["--distill.ensemble", "runs/a,b"]):
        assert understood(recipe, argv).rest == argv
    parted = ["--distill.ensemble", "run:runs/a", "run:runs/c"]
    assert understood(recipe, ["--distill.ensemble", "run:runs/a,run:runs/c"]).rest == parted


def test_what_was_decided_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _ = parse("train", ["digits-resnet", "photos", "--epochs", "2"])
    assert [stage.epochs for stage in recipe.stages] == [2, 2, 2]
    assert capsys.readouterr().err == (
        "note    the data is folder:photos\n"
        "note    digits-resnet was made for digits, and what it says of data holds for folder:photos too: --data.flip False\n"
        "note    --epochs 2 is of every stage: head (was 3), top (was 4), all (was 6); of one: --stages.all.epochs 2\n"
    )


def test_epochs_take_the_place_of_steps_and_the_ratio_of_sizes_stays(here: Path) -> None:
    (here / "r.yaml").write_text(
        "name: r\nbatch: 8\ndata: {source: digits, size: 32, resize: 40}\nbackbone: {name: resnet-micro}\n"
        "stages: [{name: head, unfreeze: head, steps: 7, lr: 0.1}]\n"
    )
    recipe, _ = parse("train", ["r.yaml", "--epochs", "0.5", "--size", "64"])
    assert (recipe.stages[0].steps, recipe.stages[0].epochs, recipe.data.resize) == (None, 0.5, 80)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digits-resnet", "nowhere"], "'nowhere', which is no folder"),
        (["digits-resnet", "--data", "nowhere"], "'nowhere', which is no folder"),
        (["digits-resnet", "photos", "--data", "digits"], "give one of them"),
        (["digits-resnet", "--epochs", "three"], "--epochs is 'three'; it must be a number, such as --epochs 3"),
        (["digits-resnet", "--lr", "-1"], "--lr is -1; it must be above 0"),
        (["digits-resnet", "--lr"], "--lr needs a value behind it"),
        (["digits-resnet", "--size", "big"], "--size is 'big'; it must be a whole number of pixels"),
        (["digits-resnet", "--lr", "1", "--lr=2"], "--lr stands twice"),
        (["digits-resnet", "--stages.haed.lr", "1"], "its stages are head, top, all"),
        (["digits-resnet", "--siez", "3"], "there is no flag --siez"),
        ([], "such as\n  tltrain train folder-resnet50 photos"),
        (["photos", "--epochs", "3"], "you probably mean:\n  tltrain train folder-resnet50 photos --epochs 3\n"),
        (["photos", "--minuts", "3"], "there is no flag --minuts"),
        (["--epochs", "3"], "such as\n  tltrain train folder-resnet50 photos"),
    ],
)
def test_a_mistake_costs_two_lines(here: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(["train", *words], capsys)
    assert says in message
    assert message.count("\n") <= 2
    assert "\u2500" not in message


@pytest.mark.parametrize("data", ["photos", "folder:photos"])
def test_data_in_place_of_a_recipe_is_told_the_command(here: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`tltrain train photos` chooses a recipe (`tltrain fit`); what shows a recipe cannot."""
    assert mistake(["plan", data], capsys).endswith("you probably mean:\n  tltrain plan folder-resnet50 photos\n")


def test_a_run_folder_in_place_of_a_recipe_is_told_how_to_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run").mkdir()
    (here / "run" / "recipe.yaml").write_text(load("digits-resnet").to_yaml())
    assert "tltrain train run/recipe.yaml --folder run\n" in mistake(["train", "run"], capsys)


def test_the_purpose_does_not_name_a_backbone_that_is_not_there(here: Path) -> None:
    assert parse("train", ["folder-resnet50", "--backbone.name", "resnet18"])[0].purpose == "folder-resnet50 with resnet18"
    assert parse("train", ["folder-resnet50", "photos"])[0].purpose == load("folder-resnet50").purpose
    assert parse("train", ["folder-resnet50", "--backbone.name", "resnet18", "--purpose", "mine"])[0].purpose == "mine"


def test_plan_says_which_flags_of_train_it_does_not_use(capsys: pytest.CaptureFixture[str]) -> None:
    parse("plan", ["digits-resnet", "--save-minutes", "3", "--workers", "1"])
    assert capsys.readouterr().err == "note    tltrain plan does not use --save-minutes\n"


@pytest.mark.parametrize("verb", ["train", "plan", "preview"])
def test_help_fits_one_screen_and_all_has_every_option_once(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for words in (["--help"], ["folder-resnet50", "--help"], ["--help", "all"]):
        with pytest.raises(SystemExit) as end:
            main([verb, *words])
        assert not end.value.code
        texts.append(capsys.readouterr().out)
        assert max(map(len, texts[-1].splitlines())) <= 80
    short, named, whole = texts
    assert short.count("\n") <= 40
    assert "IMAGENET1K_V2" in named
    assert whole.count("--stages.NAME.warmup") == 1
    assert "--stages.0" not in whole
    assert ("--wandb-project" in whole) == (verb == "train")


@pytest.mark.parametrize("verb", ["train", "plan", "preview"])
def test_the_commands_that_the_help_shows_are_understood(here: Path, verb: str) -> None:
    for example in EXAMPLES[verb]:
        words = example.split()
        parse(verb, [word for word in words if word not in ("--rows", "4")])
