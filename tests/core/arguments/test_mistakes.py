"""Mistakes in what is typed: the value, the rule, and what was likely meant, without names of Python's types."""

from __future__ import annotations

from pathlib import Path

import pytest

from tltrain.cli.main import main
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.many import grid

MISTAKES = {
    "--epoch 3": "there is no flag --epoch (did you mean --epochs?)",
    "--learning-rate 1": "there is no flag --learning-rate (did you mean --lr?)",
    "--output_dir a": "there is no flag --output_dir (did you mean --folder?)",
    "--backbone resnet50": "there is no flag --backbone (did you mean --backbone.name?)",
    "--siz 64": "there is no flag --siz (did you mean --size?)",
    "--seed 1.5": "--seed is '1.5'; it must be a whole number",
    "--save-minutes x": "--save-minutes is 'x'; it must be a number",
    "--data.per-class x": "--data.per-class is 'x'; it must be a whole number or None",
    "--stages.head.lr x": "--stages.head.lr is 'x'; it must be a number or None",
    "--stages.head.freez x": "there is no flag --stages.head.freez (did you mean --stages.head.unfreeze?)",
    "--backbone.mean 1 2 x": "--backbone.mean is '1 2 x'; it must be 3 numbers or None",
    "--cache sometimes": "--cache is 'sometimes'; it must be one of auto, always, never",
    "--folder": "--folder needs a value behind it",
}


@pytest.mark.parametrize(("typed", "said"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_said_in_the_words_of_the_command(typed: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        parsing.parse("plan", ["digits-resnet", *typed.split()])
    assert str(refused.value) == f"{said}; see `tltrain plan digits-resnet --help`"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("folds digits-resnet --folds 2", "there is no flag --folds (did you mean --k?)"),
        ("sweep digits-resnet --ovr seed=0..1", "there is no flag --ovr (did you mean --over?)"),
        ("sweep digits-resnet seed=0..1", "of the data; you probably mean:\n  tltrain sweep digits-resnet --over seed=0..1"),
    ],
)
def test_a_verb_knows_its_own_flags(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed.split()) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_names_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/photos\\?$"):
        parsing.parse("plan", ["folder-resnet50", str(tmp_path / "photoz")])
    with pytest.raises(UserError, match="no source here; sources: "):
        parsing.parse("plan", ["folder-resnet50", str(tmp_path / "other")])


def test_what_a_recipe_keeps_for_other_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """digits-distill learns from 10 images a class, and would do so from anybody's photos."""
    parsing.parse("plan", ["digits-distill", str(tmp_path)])
    assert f"what it says of data holds for folder:{tmp_path} too: --data.per_class 10, --data.flip False" in capsys.readouterr().err
    parsing.parse("plan", ["folder-resnet50", str(tmp_path)])
    parsing.parse("plan", ["digits-distill", "digits"])
    assert "holds for" not in capsys.readouterr().err


@pytest.mark.parametrize("values", ["0..x", "a..4", "0.."])
def test_a_range_that_is_none_is_said_to_be_one(values: str) -> None:
    with pytest.raises(UserError, match=r"a range stands between two whole numbers, such as seed=0\.\.4"):
        grid.axis(f"seed={values}")
    assert grid.axis("backbone.weights=../a,../b").values == ("../a", "../b")
