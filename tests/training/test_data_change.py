"""A run whose images change between two starts, or before it is evaluated: the splits that it was trained with stay, or it is refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HEAD, made_recipe
from digit_files import digit_image, run_with_weights
from sklearn.datasets import load_digits

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Backbone, Recipe
from tltrain.data import open_images
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.kept_data import for_evaluation
from tltrain.runs import data_record
from tltrain.training.run import train

NUMBERS = [np.flatnonzero(load_digits().target == k) for k in range(5)]
SPLITS = {"val_fraction": 0.2, "test_fraction": 0.3}


def add(root: Path, digit: int, part: slice) -> None:
    folder = root / f"digit {digit}"
    folder.mkdir(parents=True, exist_ok=True)
    for n in NUMBERS[digit][part]:
        digit_image(int(n)).save(folder / f"{n}.png")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, three classes of ten images without splits, and `run`, which was stopped in its second step; each once more as `.kept`."""
    root, steps = tmp_path_factory.mktemp("begun"), iter(range(1, 100))
    for k in range(3):
        add(root / "data", k, slice(0, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "step", lambda self: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 2 else None)
        assert again(of(root), root)["outcome"] == "stopped"
    for name in ("data", "run"):
        shutil.copytree(root / name, root / f"{name}.kept")
    return root


@pytest.fixture
def root(begun: Path) -> Path:
    """The same, as it was."""
    for name in ("data", "run"):
        shutil.rmtree(begun / name)
        shutil.copytree(begun / f"{name}.kept", begun / name)
    return begun


def of(root: Path) -> Recipe:
    return made_recipe(stages=[HEAD | {"steps": 4}], data=SPLITS | {"source": f"folder:{root / 'data'}", "per_class": None})


def again(recipe: Recipe, root: Path, accept: bool = False) -> dict[str, Any]:
    return train(recipe, RunFlags(folder=root / "run", workers=0, accept_data_change=accept))


def splits_of(run: Path) -> dict[str, str]:
    return {sample.id: sample.split for sample in data_record.read_samples(run)}


def test_nothing_has_changed_where_the_images_only_moved_in_time(root: Path) -> None:
    run, data = root / "run", root / "data"
    before = splits_of(run)
    assert sorted(set(before.values())) == ["test", "train", "val"]
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    assert again(of(root), root)["outcome"] == "finished"
    assert splits_of(run) == before


def test_new_images_are_refused_and_left_out_where_accepted(root: Path) -> None:
    """Drawing the splits anew would test on what was trained on."""
    run, data = root / "run", root / "data"
    before = splits_of(run)
    for k in range(3):
        add(data, k, slice(10, 14))
    drawn = open_images(of(root).data)
    trained = {name for name, split in before.items() if split == "train"}
    assert drawn.test is not None
    assert trained & set(drawn.test.ids), "this is what is refused"
    with pytest.raises(UserError, match=r"new images: 12 \(digit 0/\d+.png.*\.\.\.\)\n.*--accept-data-change") as told:
        again(of(root), root)
    assert "gone" not in str(told.value)
    assert again(of(root), root, accept=True)["outcome"] == "finished"
    after = splits_of(run)
    assert {name: after[name] for name in before} == before
    assert {split for name, split in after.items() if name not in before} == {data_record.UNUSED}
    tested = {line.split(",")[0] for line in (run / "test_predictions.csv").read_text().splitlines()[1:]}
    assert tested == {name for name, split in before.items() if split == "test"}


def test_what_was_accepted_once_is_not_asked_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = root / "run", root / "data"
    before, steps = splits_of(run), iter(range(1, 100))
    add(data, 0, slice(10, 15))
    (gone := next(data.glob("digit 1/*.png"))).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", lambda self: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 1 else None)
        assert again(of(root), root, accept=True)["outcome"] == "stopped"
    assert again(of(root), root)["outcome"] == "finished"
    after = splits_of(run)
    assert {name: after.get(name) for name in before} == before | {f"digit 1/{gone.name}": None}


def test_a_table_of_left_out_images_that_changed_is_a_change_of_the_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names the file, and is the same; what stands in it is not."""
    run, table, steps = root / "run", root / "exclude.csv", iter(range(1, 100))
    names = sorted(splits_of(run))
    shutil.rmtree(run)
    recipe = of(root).override({"data.exclude": str(table)})
    table.write_text(f"path\n{names[0]}\n")
    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", lambda self: os.kill(os.getpid(), signal.SIGTERM) if next(steps) == 1 else None)
        assert again(recipe, root)["outcome"] == "stopped"
    assert names[0] not in splits_of(run)
    table.write_text(f"path\n{names[1]}\n")
    with pytest.raises(UserError, match=rf"new images: 1 \({names[0]}\)\n  images that are gone: 1 \({names[1]}\)"):
        again(recipe, root)


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("change", ["rename", "add", "remove"])
def test_other_classes_are_refused_whatever_was_accepted(change: str, accept: bool, root: Path) -> None:
    data = root / "data"
    if change == "rename":
        (data / "digit 0").rename(data / "digit 9")
    elif change == "add":
        add(data, 4, slice(0, 10))
    else:
        shutil.rmtree(data / "digit 2")
    words = {"rename": "classes: digit 0 gone; digit 9 new", "add": "classes: digit 4 new", "remove": "classes: digit 2 gone"}
    with pytest.raises(UserError, match=words[change]) as told:
        again(of(root), root, accept)
    assert "--accept-data-change" not in str(told.value)


def test_names_that_were_given_anew_do_not_move_the_bytes(root: Path) -> None:
    """Files are numbered anew, so that each name has other bytes: an image is known by its bytes."""
    run, data = root / "run", root / "data"
    by_bytes = {(data / name).read_bytes(): split for name, split in splits_of(run).items()}
    for folder in data.iterdir():
        files = sorted(folder.iterdir())
        moved = [path.rename(folder / f"{path.name}.old") for path in files]
        for path, other in zip(moved, [*files[1:], files[0]], strict=True):
            path.rename(other)
    with pytest.raises(UserError, match="renamed images: 30"):
        again(of(root), root)
    assert again(of(root), root, accept=True)["outcome"] == "finished"
    assert {(data / name).read_bytes(): split for name, split in splits_of(run).items()} == by_bytes


def test_other_bytes_are_told_and_keep_their_split(root: Path) -> None:
    run, data = root / "run", root / "data"
    name = next(name for name, split in splits_of(run).items() if split == "test")
    digit_image(1000).save(data / name)
    with pytest.raises(UserError, match=f"images with other bytes: 1 \\({name}\\)"):
        again(of(root), root)
    assert again(of(root), root, accept=True)["outcome"] == "finished"
    assert splits_of(run)[name] == "test"


def test_an_image_that_the_source_puts_into_another_split_is_refused(root: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    rows = [
        f"data/{path.relative_to(data)},{path.parent.name},{'test' if i % 3 else 'train'}" for i, path in enumerate(data.rglob("*.png"))
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    recipe = made_recipe(stages=[HEAD | {"steps": 1}], data={"source": f"csv:{table}", "per_class": None, "val_fraction": 0})
    path = tmp_path / "run"
    assert train(recipe, RunFlags(folder=path, workers=0))["outcome"] == "finished"
    (path / "outcome.json").unlink()
    table.write_text(table.read_text().replace(",test", ",train", 1))
    with pytest.raises(UserError, match=r"images that stand in another split: 1 \(.*test -> train\)"):
        train(recipe, RunFlags(folder=path, workers=0, accept_data_change=True))


def test_the_record_is_refused_where_it_is_damaged(root: Path) -> None:
    file = root / "run" / data_record.NAME
    file.write_bytes(file.read_bytes()[:-20])
    add(root / "data", 0, slice(10, 11))
    with pytest.raises(UserError, match=r"data.jsonl.gz is damaged .*--folder"):
        again(of(root), root)


def test_a_flipped_bit_of_the_record_is_seen_though_its_first_line_alone_is_needed(root: Path) -> None:
    file = root / "run" / data_record.NAME
    content = bytearray(file.read_bytes())
    assert data_record.read(root / "run") is not None
    content[-40] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"data.jsonl.gz is damaged"):
        data_record.read(root / "run")


def test_a_finished_run_is_evaluated_on_the_images_it_was_tested_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = root / "run", root / "data"
    assert again(of(root), root)["outcome"] == "finished"
    first = evaluate(run, None, "test", 64)
    assert first["notes"] == []
    tested = [name for name, split in splits_of(run).items() if split == "test"]
    for k in range(3):
        add(data, k, slice(10, 14))
    add(data, 4, slice(0, 10))
    images, _ = for_evaluation(run, open_images(of(root).data))
    assert images.test is not None
    assert images.test.ids == tuple(tested)
    second = evaluate(run, None, "test", 64)
    assert {name: value for name, value in second.items() if name != "notes"} == {k: v for k, v in first.items() if k != "notes"}
    (data / tested[0]).unlink()
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr()
    assert "new images: 22" in said.err
    assert f"images that are gone: 1 ({tested[0]})" in said.err
    assert f"{len(tested) - 1} of {len(tested)} test" in said.err
    assert f"test images       {len(tested) - 1}\n" in said.out
    (data / "digit 0").rename(data / "zero")
    with pytest.raises(UserError, match=r"class zero, which it does not know .*old names"):
        evaluate(run, None, "test", 64)


def test_a_run_of_an_older_version_is_compared_by_its_hash(root: Path) -> None:
    """It kept no list: what cannot be known is said."""
    run, data = root / "run", root / "data"
    (run / data_record.NAME).unlink()
    add(data, 0, slice(10, 11))
    with pytest.raises(UserError, match=r"did not keep which image was in which split.*--accept-data-change"):
        again(of(root), root)
    assert again(of(root), root, accept=True)["outcome"] == "finished"
    (run / data_record.NAME).unlink()
    add(data, 0, slice(11, 12))
    assert "not what this run was trained on" in evaluate(run, None, "test", 64)["notes"][0]


@pytest.mark.parametrize("changed", ["weights", "teacher", "teacher 2"])
def test_other_weights_than_the_run_began_with_are_refused(changed: str, tmp_path: Path) -> None:
    classes = tuple("0123456789")
    backbone = Backbone(name=None, weights="shipped:resnet-tiny-printed")
    given = {
        name: run_with_weights(tmp_path / name, made_recipe(backbone=backbone.model_dump()), classes)
        for name in ("weights", "teacher", "teacher 2")
    }
    recipe = made_recipe(
        backbone={"weights": str(given["weights"])},
        stages=[HEAD | {"steps": 1}],
        distill={"teacher": {"weights": str(given["teacher"])}, "ensemble": [str(given["teacher 2"])], "temperature": 2.0, "weight": 0.5},
    )
    assert again(recipe, tmp_path)["outcome"] == "finished"
    (tmp_path / "run" / "outcome.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # of a run that has done its stages no teacher is asked again
    shutil.rmtree(given[changed])
    run_with_weights(given[changed], made_recipe(backbone=backbone.model_dump()), classes, seed=1)
    with pytest.raises(UserError, match=f"the {changed} are not those that this run began with"):
        again(recipe, tmp_path, accept=True)


def test_weights_that_learned_from_test_images_are_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the bytes of the images, whatever they are called. Another seed draws another split; the same one is as it should be."""
    assert again(of(root), root)["outcome"] == "finished"
    data = shutil.copytree(root / "data", tmp_path / "data")
    for path in data.rglob("*.png"):
        path.rename(path.with_name(f"renamed {path.name}"))
    (root / "run").rename(tmp_path / "earlier")
    recipe = made_recipe(
        stages=[HEAD | {"steps": 1}],
        data=SPLITS | {"source": f"folder:{root / 'data'}", "per_class": None, "seed": 2},
        backbone={"weights": str(tmp_path / "earlier")},
        distill={"teacher": {"weights": str(tmp_path / "earlier")}},
    )
    assert again(recipe.override({"data.source": f"folder:{data}"}), tmp_path)["outcome"] == "finished"
    trained = {s.digest for s in data_record.read_samples(tmp_path / "earlier") if s.split in ("train", "val")}
    tested = {s.digest for s in data_record.read_samples(tmp_path / "run") if s.split == "test"}
    said = " ".join(capsys.readouterr().out.split())
    assert 0 < len(trained & tested) < len(tested)
    assert tested & {s.digest for s in data_record.read_samples(tmp_path / "earlier") if s.split == "val"}, "val chose the teacher"
    for name in ("weights", "teacher"):
        assert f"the {name}, {tmp_path / 'earlier'}, learned from {len(trained & tested)} of the {len(tested)} test images" in said
    assert again(recipe.override({"data.seed": 0}), root)["outcome"] == "finished"
    assert "learned from" not in capsys.readouterr().out
