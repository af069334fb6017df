"""Averages of finished runs: what they are, what is measured of them, and what cannot be averaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEAD, made_recipe
from safetensors.torch import load_file

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.trained import load_trained
from tltrain.models.metadata import read_card, write_weights
from tltrain.runs import run_dir
from tltrain.runs.record import read_run
from tltrain.training.run import train
from tltrain.training.weights.mixing import mix
from tltrain.training.weights.soup import soup

STAGE = HEAD | {"name": "all", "unfreeze": "all", "steps": 6, "lr": 2e-3}


def seed(number: int, **changes: Any) -> Recipe:
    return made_recipe(seed=number, select="loss", stages=[STAGE | changes.pop("stage", {})], **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds; the last learned too fast, and spoils an average."""
    folder = tmp_path_factory.mktemp("seeds")
    for number in range(3):
        recipe = seed(number, stage={"lr": 2e-1} if number == 2 else {})
        assert train(recipe, RunFlags(folder=folder / f"{number}", workers=0))["outcome"] == "finished"
    return [folder / f"{number}" for number in range(3)]


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[str, Recipe], Path]:
    def make(name: str, recipe: Recipe) -> Path:
        assert train(recipe, RunFlags(folder=tmp_path / name, workers=0))["outcome"] == "finished"
        return tmp_path / name

    return make


def test_a_soup_is_the_mean_and_a_run_folder_of_its_own(runs: list[Path], tmp_path: Path) -> None:
    done = soup(runs, tmp_path / "soup", "uniform", with_test=True, device_batch=16)
    states = [load_file(run / "weights.safetensors") for run in runs]
    mean = load_file(tmp_path / "soup" / "weights.safetensors")
    assert mean.keys() == states[0].keys()
    for name in ("conv1.weight", "fc.weight", "layer4.0.bn2.bias"):
        assert torch.allclose(mean[name], sum(state[name].double() for state in states).float() / 3, atol=1e-7)  # type: ignore[union-attr]
    rows = {row.name: row for row in done.rows}
    assert list(rows) == [*map(str, runs), "uniform", "greedy"]
    for name, path in [(str(run), run) for run in runs] + [("uniform", tmp_path / "soup")]:
        for split in ("val", "test"):
            found, want = getattr(rows[name], split), evaluate(path, None, split, 16)
            assert (found["n"], found["loss"], found["top1"]) == (want["n"], want["loss"], want["top1"])
    ours, theirs = (read_card(path / "weights.safetensors") for path in (tmp_path / "soup", runs[0]))
    assert ours is not None
    assert theirs is not None
    assert (ours.name, ours.classes, ours.size) == (theirs.name, theirs.classes, theirs.size)
    assert ours.temperature != theirs.temperature, "fitted anew, on val"
    assert read_run(tmp_path / "soup").outcome == run_dir.outcome(tmp_path / "soup")


def test_greedy_keeps_what_val_is_not_worse_with(runs: list[Path], tmp_path: Path) -> None:
    done = soup(runs, tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    loss = {row.name: row.val["loss"] for row in done.rows}
    assert loss[str(runs[2])] > 2 * loss[str(runs[0])], "the last spoils an average"
    assert done.kept[0] == min(map(str, runs), key=loss.__getitem__)
    assert str(runs[2]) not in done.kept
    assert loss["greedy"] <= min(loss[str(run)] for run in runs)
    states = [load_file(Path(run) / "weights.safetensors") for run in done.kept]
    mean = load_file(tmp_path / "soup" / "weights.safetensors")
    assert torch.allclose(mean["fc.weight"], torch.stack([s["fc.weight"] for s in states]).double().mean(0).float(), atol=1e-7)
    assert all(row.test is None for row in done.rows)
    assert evaluate(tmp_path / "soup", None, "val", 16)["loss"] == loss["greedy"]
    assert torch.equal(load_trained(tmp_path / "soup").chain.net.state_dict()["conv1.weight"], mean["conv1.weight"])


def test_a_soup_of_equal_runs_is_that_run(runs: list[Path]) -> None:
    state = load_file(runs[0] / "weights.safetensors")
    mean = mix([state, dict(state), dict(state)], [1 / 3] * 3)
    assert all(torch.equal(mean[name], tensor) for name, tensor in state.items())


def test_a_mean_of_batchnorms_has_the_mean_deviation() -> None:
    states = [{"bn.running_var": torch.tensor([v]), "bn.num_batches_tracked": torch.tensor(n)} for v, n in ((1.0, 3), (9.0, 5))]
    assert mix(states, [0.5, 0.5])["bn.running_var"].item() == 4.0
    assert mix(states, [0.25, 0.75])["bn.num_batches_tracked"].item() == 5
    assert torch.equal(mix(states, [0.0, 1.0])["bn.running_var"], states[1]["bn.running_var"])


def test_the_table_of_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soup", *map(str, runs[:2]), "--out", str(tmp_path / "soup"), "--test"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("uniform", "greedy", "val loss", "test loss"))
    assert str(tmp_path / "soup") in said.replace("\n", "")
    assert main(["soup", *map(str, runs[:2]), "--out", str(tmp_path / "other"), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in plain["rows"]] == [*map(str, runs[:2]), "uniform", "greedy"]
    assert f"of {'1 run' if len(plain['kept']) == 1 else '2 runs'}: " in said
    assert main(["report", str(tmp_path / "soup")]) == 0
    assert main(["soup", *map(str, runs[:2]), "--out", str(tmp_path / "soup")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_soup_is_the_backbone_of_another_run(runs: list[Path], tmp_path: Path, finished: Callable[[str, Recipe], Path]) -> None:
    soup(runs[:2], tmp_path / "soup", "uniform", with_test=False, device_batch=16)
    run = finished("next", made_recipe(backbone={"weights": str(tmp_path / "soup")}, stages=[HEAD | {"steps": 1}]))
    ours, theirs = (load_file(path / "weights.safetensors")["conv1.weight"] for path in (run, tmp_path / "soup"))
    assert torch.equal(ours, theirs)


def test_what_cannot_be_averaged_is_refused(runs: list[Path], tmp_path: Path, finished: Callable[[str, Recipe], Path]) -> None:
    short = {"stage": {"steps": 1}}
    others = {
        "their networks are": seed(0, backbone={"weights": "shipped:vit-tiny-printed"}, **short),
        "has another val split": seed(0, data={"seed": 1}, **short),
        "their values of mean": seed(0, backbone={"weights": "shipped:resnet-tiny-printed", "mean": (0.1, 0.2, 0.3)}, **short),
    }
    for number, (said, recipe) in enumerate(others.items()):
        other = finished(f"{number}", recipe)
        with pytest.raises(UserError, match=said):
            soup([runs[0], other], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    with pytest.raises(UserError, match="two runs or more"):
        soup([runs[0], runs[0]], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    with pytest.raises(UserError, match="no run folder"):
        soup([runs[0], tmp_path], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    assert not (tmp_path / "soup").exists()


def test_folds_are_not_averaged(runs: list[Path], tmp_path: Path, finished: Callable[[str, Recipe], Path]) -> None:
    folds = [finished(f"{f}", seed(0, data={"folds": 3, "fold": f, "seed": 0}, stage={"steps": 1})) for f in range(2)]
    with pytest.raises(UserError, match=r"is fold 0 of 3 and .* fold 1 of 3: one has learned from what the other is tested on"):
        soup(folds, tmp_path / "soup", "uniform", with_test=False, device_batch=16)
    with pytest.raises(UserError, match=r"is no fold and .* fold 0 of 3"):
        soup([runs[0], folds[0]], tmp_path / "soup", "uniform", with_test=False, device_batch=16)


def test_an_unfinished_run_and_other_classes_are_refused(runs: list[Path], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    run_dir.create(begun, seed(0))
    with pytest.raises(UserError, match="no finished run: it has not ended yet"):
        soup([runs[0], begun], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    run_dir.write_outcome(begun, 1, {"outcome": "stopped"})
    with pytest.raises(UserError, match="no finished run: it stopped"):
        soup([runs[0], begun], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
    other = shutil.copytree(runs[1], tmp_path / "other")
    (other / "manifest.json").unlink()
    card = read_card(other / "weights.safetensors")
    assert card is not None
    write_weights(other / "weights.safetensors", load_file(runs[1] / "weights.safetensors"), replace(card, classes=("a", *"123456789")))
    with pytest.raises(UserError, match="their classes are others"):
        soup([runs[0], other], tmp_path / "soup", "greedy", with_test=False, device_batch=16)
