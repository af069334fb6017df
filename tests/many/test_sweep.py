"""tltrain sweep: which runs there are, how rungs shorten them, what is chosen, and how much of its lead is luck."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cli_words import mistake

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe, load
from tltrain.many import grid, one_by_one
from tltrain.many.luck import IMAGES, SEEDS, largest_of, luck_of
from tltrain.many.standing import Choice, Ran, Standing, read, verdict
from tltrain.runs import run_dir
from tltrain.runs.listing.lines import line_of

RECIPE = load("digits-resnet")
QUICK = """
name: quick
batch: 32
data: {source: digits, per_class: 8, eval_limit: 64}
backbone: {name: resnet-micro}
stages: [{name: head, unfreeze: head, steps: 4, lr: 0.01}]
"""


def members(*over: str, recipe: Recipe = RECIPE, start: RunFlags | None = None) -> list[grid.Member]:
    return grid.members(recipe, start or RunFlags(), [grid.axis(text) for text in over])


def test_every_combination_is_a_run_in_a_folder_of_its_own() -> None:
    found = members("seed=0..2", "stages.top.lr=1e-3,3e-3")
    assert [each.name for each in found[:2]] == ["seed-0_top.lr-1e-3", "seed-0_top.lr-3e-3"]
    assert [(each.recipe.seed, each.recipe.stages[1].lr) for each in found] == [(s, lr) for s in range(3) for lr in (1e-3, 3e-3)]
    assert found[0].path == Path("runs/digits-resnet-sweep/seed-0_top.lr-1e-3")
    assert len({each.choice for each in found}) == 2, "a seed is repeated, not chosen"


def test_short_words_and_null_are_values_too() -> None:
    long, short = members("epochs=2,4")
    assert [stage.epochs for stage in short.recipe.stages] == [4, 4, 4]
    assert long.name == "epochs-2"
    assert members("stages.all.clip=null,1")[0].recipe.stages[2].clip is None


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ((), "needs --over"),
        (("seed",), "such as seed=0..4"),
        (("seed=1,1",), "each once"),
        (("seed=4..1",), "goes upwards"),
        (("seed=0..1", "seed=2..3"), "give each once"),
        (("sead=0,1",), "no 'sead'"),
        (("lr=fast,1",), "it must be a number"),
        (("batch=0,1",), "batch"),
        (("seed=0..99", "batch=1,2,3,4,5,6,7,8,9,10,11"), "at most 1,000"),
    ],
)
def test_a_mistake_is_refused_before_anything_trains(over: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for text in over for word in ("--over", text)]
    assert says in mistake(["sweep", "digits-resnet", *words], capsys)


def test_a_key_that_is_typed_as_well_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "stands in the command and in --over" in mistake(["sweep", "digits-resnet", "--seed", "3", "--over", "seed=0,1"], capsys)


def test_rungs_keep_one_in_n_and_the_last_is_whole() -> None:
    assert [(rung.part, rung.keep) for rung in grid.rungs(9, 3)] == [(Fraction(1, 9), 3), (Fraction(1, 3), 1), (Fraction(1), 1)]
    assert [rung.keep for rung in grid.rungs(5, 2)] == [3, 2, 1, 1]
    for bad in ((1, 3), (4, 1)):
        with pytest.raises(UserError, match="--halving"):
            grid.rungs(*bad)


def test_a_rung_is_a_whole_run_of_a_shortened_recipe_with_its_seed() -> None:
    member = members("seed=3,4", recipe=RECIPE.override({"stages.0.epochs": None, "stages.0.steps": 10, "stages.1.step_epochs": 9}))[0]
    first, *_, last = grid.rungs(9, 3)
    short = grid.on_rung(member, first)
    assert short.recipe.stages[0].steps == 1
    assert short.recipe.stages[2].epochs == pytest.approx(6 / 9)
    assert short.recipe.stages[1].step_epochs == pytest.approx(1), "drops stay at the same share of the stage"
    assert short.recipe.seed == 3
    assert short.recipe.stages[2].schedule == "cosine", "which ends at zero within the rung"
    assert short.path == Path("runs/digits-resnet-sweep/rung-0/seed-3")
    assert grid.on_rung(member, last) is member


def test_luck_is_the_expected_largest_of_equal_choices() -> None:
    rng = np.random.default_rng(0)
    for num in (2, 5, 20):
        simulated = rng.standard_normal((20_000, num)).max(1).mean()
        assert largest_of(num) == pytest.approx(simulated, abs=0.02)
    values = rng.standard_normal((4_000, 6, 3))  # 4,000 sweeps over 6 equal recipes with 3 seeds each
    lucks = [luck for each in values if (luck := luck_of(each.tolist(), True, False, 0)) is not None]
    assert np.mean([luck.lead for luck in lucks]) == pytest.approx(np.mean([luck.expected for luck in lucks]), rel=0.03)
    assert {luck.source for luck in lucks} == {SEEDS}
    lower = luck_of([[1.0, 1.2], [3.0, 3.2]], higher_is_better=False, is_share=False, num_val=0)
    assert lower is not None
    assert lower.lead == pytest.approx(1.0)


def test_without_seeds_the_number_of_val_images_is_the_noise() -> None:
    luck = luck_of([[0.8], [0.9]], True, True, 100)
    assert luck is not None
    assert luck.source == IMAGES
    assert luck.noise == pytest.approx(math.sqrt(0.85 * 0.15 / 100))
    assert luck_of([[0.8], [0.9]], True, False, 100) is None
    assert luck_of([[0.8, 0.9]], True, True, 100) is None


def standing(tmp_path: Path, values: dict[tuple[str, ...], list[float]], test: float = 0.75) -> Standing:
    """A sweep that has come to these values of val."""
    [member] = members("seed=0", start=RunFlags(folder=tmp_path))
    run_dir.create(member.path, member.recipe)
    ran = {c: [Ran(member, line_of(member.path), value, 200, test) for value in each] for c, each in values.items()}
    return Standing("top1", tuple(Choice(choice, tuple(runs)) for choice, runs in ran.items()))


def test_the_best_by_val_is_named_with_its_test_figure_alone(tmp_path: Path) -> None:
    wide = standing(tmp_path, {("lr=1",): [0.70, 0.72], ("lr=2",): [0.90, 0.92], ("lr=3",): [0.99, math.nan]})
    headline, luck = verdict(wide, wide)
    assert "lr=2" in headline, "a choice one of whose seeds failed is not chosen"
    assert "91.0" in headline
    assert "75.0" in headline
    assert "up to 6\u202f% of that" in luck
    near = standing(tmp_path, {("lr=1",): [0.70, 0.92], ("lr=2",): [0.75, 0.91]})
    assert "all of that may be luck" in verdict(near, near)[1]
    seeds = standing(tmp_path, {(): [0.8, 0.9]})
    assert "quote the average" in verdict(seeds, seeds)[1]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quick.yaml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_a_sweep_with_halving_trains_goes_on_and_shows_what_it_chose(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "quick.yaml", "--over", "stages.head.lr=1e-9,0.1", "--halving", "2"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "2 whole runs at 1/2 of the length; the best 1 of 2 recipes goes on" in first
    parent = quick / "runs" / "quick-sweep"
    assert sorted(path.name for path in parent.iterdir()) == ["head.lr-0.1", "rung-0", "sweep.html"]
    assert run_dir.read_recipe(parent / "rung-0" / "head.lr-1e-9").stages[0].steps == 2
    assert run_dir.read_recipe(parent / "head.lr-0.1").stages[0].steps == 4
    shown = first[first.index("\nrun  ") :]
    assert max(map(len, shown.partition("\n\n")[0].splitlines())) <= 80
    assert "Chosen by val: stages.head.lr=0.1" in shown
    assert "head.lr-1e-9" in (parent / "sweep.html").read_text()
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "2 of 2 runs are finished already" in again
    assert "epoch" not in again, "nothing trains twice"
    assert again[again.index("\nrun  ") :] == shown


def test_a_stopped_run_stops_the_sweep_and_a_failed_one_does_not(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"1e-3": "failed", "1e-2": "stopped", "1e-1": "finished"}
    began = []

    def train(recipe: Recipe, start: RunFlags) -> dict[str, str]:
        assert start.folder is not None
        began.append(start.folder.name.removeprefix("head.lr-"))
        return {"outcome": ends[began[-1]]}

    monkeypatch.setattr(one_by_one, "train", train)
    assert main(["sweep", "quick.yaml", "--over", f"stages.head.lr={','.join(ends)}"]) == 75
    assert began == ["1e-3", "1e-2"]
    assert "2 of 3, into" in capsys.readouterr().out
    assert not (quick / "runs/quick-sweep/sweep.html").exists()


def test_another_recipe_in_the_folder_is_refused_before_the_first_run(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["sweep", "quick.yaml", "--over", "seed=0,1"]
    run_dir.create(quick / "runs/quick-sweep/seed-1", load("quick.yaml").override({"batch": 8, "seed": 1}))
    assert "batch: 8 -> 32" in mistake(sweep, capsys)
    assert not (quick / "runs/quick-sweep/seed-0").exists()
    assert "--folder auto is for one run" in mistake([*sweep, "--folder", "auto"], capsys)


def test_runs_that_were_not_trained_have_no_value(quick: Path) -> None:
    assert read(members("seed=0..1", recipe=load("quick.yaml"))).ranked == []


def test_a_dry_run_and_an_array_name_every_run_and_start_none(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "quick.yaml", "--over", "batch=8,16"]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "runs/quick-sweep/batch-8\nruns/quick-sweep/batch-16\n"
    assert main([*words, "--slurm", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert "values=(batch-8 batch-16)" in script
    assert "#SBATCH --array=0-1" in script
    assert not (quick / "runs").exists()
