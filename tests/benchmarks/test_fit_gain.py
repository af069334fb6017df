"""The benchmark of fit: all contestants learn the same images, what is finished is kept, and the table is of the seeds that all have."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from photo_files import photo_folder

from benchmarks import fit_gain
from benchmarks.fit_gain import Contestant, Task
from tltrain.core.arguments import parsing
from tltrain.core.recipe import Data
from tltrain.data import open_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def out(pictures: Path, tmp_path: Path) -> Path:
    """What `prepare` makes, but for the weights."""
    (tmp_path / "weights.pth").touch()
    fit_gain.prepare(pictures, tmp_path / "unread.pth", tmp_path)
    return tmp_path


def task(out: Path, seed: int = 0) -> Task:
    folder = out / "mine"
    folder.mkdir(exist_ok=True)
    return Task(fit_gain.split(out, seed), out / "weights.pth", folder, seed)


def test_everybody_has_the_split_of_the_seed(pictures: Path, out: Path) -> None:
    """With the pixels as tltrain shows them: upright, and on white where they were transparent."""
    for seed in (0, 1):
        folder = fit_gain.split(out, seed)
        drawn = open_images(Data(source=f"folder:{out / 'pictures'}", seed=seed))
        given = open_images(Data(source=f"folder:{folder}", seed=7))
        found = {}
        for split in (given.train, given.val, given.test):
            assert split is not None
            found[split.name] = {name.partition("/")[2] for name in split.ids}
        for split in (drawn.train, drawn.val, drawn.test):
            assert split is not None
            assert found[split.name] == set(split.ids)
    assert sum(len(names) for names in found.values()) == 75
    whole = Data(source="digits", val_fraction=0, test_fraction=0)
    sources = [whole.model_copy(update={"source": f"folder:{each}"}) for each in (pictures, out / "pictures")]
    before, after = (open_images(source).train for source in sources)
    stems = [Path(name).name.partition(".")[0] for name in before.ids]
    of_stem = {Path(name).name.partition(".")[0]: place for place, name in enumerate(after.ids)}
    assert all(before.read(i).tobytes() == after.read(of_stem[stem]).tobytes() for i, stem in enumerate(stems))


def test_recipes_learn_from_the_folder_of_the_seed(out: Path) -> None:
    for recipe in (fit_gain.small(), fit_gain.probe_of(fit_gain.small()), fit_gain.plain()):
        command = fit_gain._train(task(out, 3), recipe)
        parsed, flags = parsing.parse("train", command[command.index("train") + 1 :])
        assert (parsed.seed, parsed.data.seed, parsed.data.source) == (3, 3, f"folder:{out / 'seed-3' / 'images'}")
        assert (parsed.backbone.name, parsed.backbone.weights) == (fit_gain.NAME, str(out / "weights.pth"))
        assert (flags.folder, flags.workers) == (out / "mine" / "run", 0)
    assert sum(stage.epochs or 0 for stage in fit_gain.plain().stages) == fit_gain.EPOCHS


def test_outside_contestants_take_part_where_they_are_and_see_as_many_images(out: Path) -> None:
    assert not {"fastai", "timm"} & set(fit_gain.contestants(5, None, None))
    given = task(out)
    assert given.num_train == 54
    command = list(fit_gain.contestants(5, "another/python", None)["fastai"].command(given))
    assert command[0] == "another/python"
    assert command[command.index("--images-seen") + 1] == str(54 * 25)
    assert Path(command[1]).is_file()
    many = out / "many" / "train" / "a"
    many.mkdir(parents=True)
    for i in range(300):
        (many / f"{i}.png").touch()
    command = list(fit_gain.contestants(5, None, Path("train.py"))["timm"].command(replace(given, images=out / "many")))
    assert command[command.index("--epochs") + 1] == str(round(300 * 25 / 256)), "the rest of each epoch is dropped"


def writes(top1: float, also: str = "pass") -> Contestant:
    def command(given: Task) -> list[str]:
        return [sys.executable, "-c", f"import os\nopen({str(given.folder / 'top1')!r}, 'w').write('{top1}')\n{also}"]

    return Contestant("somebody", command, lambda folder: {"top1": float((folder / "top1").read_text()), "chose": "ridge"})


def test_a_run_begins_anew_and_counts_its_processor_time(out: Path) -> None:
    given = task(out)
    (given.folder / "half-done").touch()
    found = fit_gain.run(writes(0.5, "assert os.environ['OMP_NUM_THREADS'] == '1'\nsum(range(3_000_000))"), given)
    assert not (given.folder / "half-done").exists()
    assert found["top1"] == 0.5
    assert found["cpu_seconds"] > 0
    assert found["seconds"] > 0
    with pytest.raises(SystemExit, match=r"somebody, seed 0, ended with 3: see .*log"):
        fit_gain.run(writes(0.5, "raise SystemExit(3)"), given)


def test_what_is_finished_is_kept(pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, int]] = []

    def run(contestant: Contestant, given: Task) -> dict[str, Any]:
        ran.append((contestant.title, given.seed))
        return {"top1": 0.5, "seconds": 1.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(fit_gain, "run", run)
    monkeypatch.setattr(fit_gain, "_about", lambda *_: {"who": "us"})
    words = [str(pictures), "--weights", "unread.pth", "--out", str(out), "--only", "ridge", "folder", "--seeds"]
    fit_gain.main([*words, "2"])
    said = capsys.readouterr().out
    assert "| who | n | top-1, mean | sd | ridge on the frozen network has more" in said, "the first that has begun is the base"
    assert "who        us" in said
    assert ran == [(title, seed) for seed in (0, 1) for title in ("ridge on the frozen network", "folder-resnet50's stages")]
    del ran[:]
    fit_gain.main([*words, "3"])
    assert [seed for _, seed in ran] == [2, 2]
    assert "fewer than two seeds" in fit_gain.report(out, fit_gain.contestants(5, None, None), 1)
    with pytest.raises(SystemExit):
        fit_gain.main([*words[:-1], "fastai", "--seeds", "2"])
    assert "--only is fastai, which takes no part" in capsys.readouterr().err


def test_the_table_is_of_the_seeds_that_all_have(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_gain, "_about", lambda *_: {})
    finished = {"fit": (0.8, 0.9, 0.7), "ridge": (0.7, 0.8), "folder-small": (0.8, 0.9, 0.1)}
    for name, values in finished.items():
        for seed, top1 in enumerate(values):
            file = out / f"seed-{seed}" / f"{name}.json"
            file.parent.mkdir(exist_ok=True)
            chose = {"chose": ["ridge", "ridge, then blocks.5", "ridge"][seed]} if name == "fit" else {}
            file.write_text(json.dumps({"top1": top1, "seconds": 300.0, "cpu_seconds": 99.6, **chose}), encoding="utf-8")
    said = fit_gain.report(out, fit_gain.contestants(5, None, None), 3)
    assert "| fit, 5 minutes | 2 | 85.0 | 7.1 |  | 300 | 100 |" in said
    assert "| ridge on the frozen network | 2 | 75.0 | 7.1 | +10.0 (+10.0 to +10.0) | 300 | 100 |" in said
    assert "| folder-small | 2 | 85.0 | 7.1 | +0.0 (+0.0 to +0.0) | 300 | 100 |" in said
    assert "folder-resnet50" not in said
    assert "ridge: 1; ridge, then blocks.5: 1" in said


def test_figures_are_read_where_each_leaves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_gain, "read_figures", lambda path: {"top1": 0.75} if path == tmp_path / "fit" / "run" else {})
    (tmp_path / "fit").mkdir()
    stages = [{"unfreeze": "head", "solve": "ridge"}, {"unfreeze": "blocks.5"}]
    (tmp_path / "fit" / "recipe.yaml").write_text(yaml.safe_dump({"data": {"size": 288}, "stages": stages}), encoding="utf-8")
    assert fit_gain._of_fit(tmp_path) == {"top1": 0.75, "chose": "ridge, then blocks.5 at 288 px"}
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "summary.csv").write_text("epoch,eval_top1\n0,90.0\n1,62.5\n", encoding="utf-8")
    assert fit_gain._of_timm(tmp_path) == {"top1": 0.625}, "the last, not the best"


@pytest.mark.slow
def test_ours_run(pictures: Path, tmp_path: Path) -> None:
    """The probe, from a file of weights to figures."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "random.pth")
    fit_gain.prepare(pictures, tmp_path / "random.pth", tmp_path)
    found = fit_gain.run(fit_gain.contestants(5, None, None)["ridge"], replace(task(tmp_path), folder=tmp_path / "ridge"))
    assert 0 <= found["top1"] <= 1
    assert found["cpu_seconds"] > 1
    assert not (tmp_path / "ridge" / "cache").exists()
