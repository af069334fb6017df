"""Another package adds a data source, losses and a metric by one file and one line each: no file of ours knows of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from foreign_package import install
from safetensors.torch import load_file

from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import Data, load, validate
from tltrain.data import open_images
from tltrain.evaluation.metrics import Predictions
from tltrain.evaluation.trained import load_trained
from tltrain.runs import run_dir
from tltrain.runs.metrics_log import read_rows
from tltrain.training.losses import objective

PACKAGE = '''
"""Sources, losses and a metric of somebody else."""

import os, signal
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.nn import functional as F

from tltrain.data import Source, SourceKind
from tltrain.evaluation.metrics import Metric

CLASSES, NUM = ("dark", "middle", "bright"), 90


@dataclass(frozen=True)
class Squares:
    """Grey squares, brighter with each class."""

    labels: np.ndarray

    def __call__(self, number):
        return Image.fromarray(np.full((8, 8), 60 * self.labels[number] + number % 50, np.uint8)).convert("RGB")


def source(labels, in_memory):
    numbers = np.arange(len(labels))
    ids, declared = tuple(f"square/{i}" for i in numbers), np.full(len(labels), "train")
    return Source(CLASSES, labels, ids, numbers, declared, numbers, Squares(labels), "squares", in_memory=in_memory)


SQUARES = SourceKind(lambda argument, spec, root: source(np.arange(NUM) % 3, in_memory=True))
FILE = SourceKind(lambda argument, spec, root: source(np.load(argument), in_memory=False), argument="FILE")

asked = 0


def squared_error(logits, labels, smoothing, class_weights):
    """To the label's unit vector; the seventh time, where the environment wants it, Ctrl-C is pressed."""
    global asked
    asked += 1
    if asked == 7 and os.environ.pop("PRESS_CTRL_C", None):
        os.kill(os.getpid(), signal.SIGINT)
    return (logits - F.one_hot(labels, logits.shape[1])).square().sum(1)


def reduced(logits, labels, smoothing, class_weights):
    return F.cross_entropy(logits, labels)


def sevens(student, teacher, temperature):
    return 0 * (student - teacher).sum(1) + 7 * temperature


MISTAKES = Metric(lambda p, num_classes: (p.predicted != p.label).sum(), higher_is_better=False, title="mistakes")
NOTHING = Metric(lambda p, num_classes: None)
'''
ENTRY_POINTS = """
[tltrain.sources]
squares = toy_parts:SQUARES
labels-file = toy_parts:FILE
broken = toy_parts:ABSENT

[tltrain.losses]
squared_error = toy_parts:squared_error
reduced = toy_parts:reduced

[tltrain.distill_losses]
sevens = toy_parts:sevens

[tltrain.metrics]
mistakes = toy_parts:MISTAKES
nothing = toy_parts:NOTHING
"""
STAGE = {"name": "all", "unfreeze": "all", "steps": 10, "lr": 2e-3, "eval_epochs": 0.4, "loss": "squared_error"}
RECIPE: dict[str, Any] = {
    "name": "toy", "batch": 12, "select": "mistakes", "backbone": {"weights": "shipped:resnet-tiny-printed"},
    "data": {"source": "squares", "size": 32, "resize": 32, "val_fraction": 0.2}, "stages": [STAGE],
}  # fmt: skip
STUDENT: dict[str, Any] = RECIPE | {
    "name": "student", "data": {**RECIPE["data"], "source": "labels-file:labels.npy"},
    "distill": {"teacher": {"weights": "whole"}, "loss": "sevens", "temperature": 3.0, "weight": 0.25},
}  # fmt: skip
SESSION = """
import contextlib, io, json, os, sys


def refusal(work, *arguments):
    try:
        work(*arguments)
    except UserError as error:
        return str(error)


def run(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        return [main(list(words)), out.getvalue()]


if __name__ == "__main__":  # a data worker imports this file too
    import numpy as np
    from tltrain.cli.main import main
    from tltrain.data import open_images
    from tltrain.core.errors import UserError
    from tltrain.core.flags import RunFlags
    from tltrain.core.recipe import Data, validate
    from tltrain.training.setup import num_workers

    np.save("labels.npy", np.arange(90) % 3)
    said = {"whole": run("train", "toy.yaml", "--folder", "whole")}
    import toy_parts
    toy_parts.asked, os.environ["PRESS_CTRL_C"] = 0, "yes"
    said["stopped"] = run("train", "toy.yaml", "--folder", "parted")
    said["resumed"] = run("train", "toy.yaml", "--folder", "parted")
    said["plan"] = run("plan", "student.yaml")
    said["student"] = run("train", "student.yaml", "--folder", "student", "--smoke", "--workers", "1")
    said["reduced"] = run("train", "toy.yaml", "--folder", "reduced", "--stages.0.loss", "reduced")
    said["nothing"] = run("train", "toy.yaml", "--folder", "nothing", "--select", "nothing")
    said["workers"] = [num_workers(open_images(Data(source=s)), RunFlags(), 1) for s in ("squares", "labels-file:labels.npy")]
    said["sources"] = {s: refusal(open_images, Data(source=s)) for s in ("squars", "labels-file", "squares:x", "zzzz", "broken")}
    said["names"] = refusal(validate, json.load(open("mistaken.json")), "mine")
    json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in; beside it a package that is installed as pip does it."""
    root = tmp_path_factory.mktemp("toy")
    install(root / "site", "toy_parts", {"toy_parts": PACKAGE}, ENTRY_POINTS)
    for recipe in (RECIPE, STUDENT):
        (root / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    wrong = {"select": "mistake", "stages": [STAGE | {"loss": "squared_eror"}], "distill": STUDENT["distill"] | {"loss": "seven"}}
    (root / "mistaken.json").write_text(json.dumps(RECIPE | wrong))
    (root / "session.py").write_text(SESSION)
    return root


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    """What one session with that package says."""
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2])])
    here = {"PYTHONPATH": path, "TLTRAIN_CACHE": str(folder / "cache"), "TLTRAIN_DATA": str(folder / "data")}
    done = subprocess.run([sys.executable, "session.py"], cwd=folder, env=os.environ | here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run) if row["kind"] == kind]


def test_a_loss_of_another_package_is_trained(folder: Path, said: dict[str, Any]) -> None:
    assert said["whole"][0] == 0, said["whole"][1]
    losses = [row["loss"] for row in rows(folder / "whole", "train")]
    assert losses[0] == 1.0, "a new head says 0 of each class, and the label's should be 1"
    assert 0 < losses[-1] < losses[0]


def test_a_metric_of_another_package_stands_in_the_rows_and_chooses_the_best(folder: Path, said: dict[str, Any]) -> None:
    found = rows(folder / "whole", "val")
    assert [row["mistakes"] for row in found] == [round((1 - row["top1"]) * row["n"]) for row in found]
    assert all(row["nothing"] is None for row in found)
    marked = [row["mistakes"] for row in found if row["best"]]
    assert len(set(marked)) > 1, "the network has learned something"
    assert marked == sorted(marked, reverse=True), "of equal ones those with the lower loss"
    assert marked[-1] == min(row["mistakes"] for row in found)
    names = list(found[0])
    assert names[names.index("ece") :][:3] == ["ece", "mistakes", "nothing"], "ours first"
    test = json.loads((folder / "whole" / "test_metrics.json").read_text())
    assert test["mistakes"] == sum(row["support"] for row in test["per_class"]) - round(test["top1"] * test["n"])
    page = (folder / "whole" / "report.html").read_text()
    assert all(text in page for text in ("Best val mistakes", "Test mistakes", "Val mistakes<"))


def test_a_run_with_parts_of_another_package_resumes(folder: Path, said: dict[str, Any]) -> None:
    assert (said["stopped"][0], said["resumed"][0]) == (75, 0), said["stopped"][1] + said["resumed"][1]
    whole, parted = (load_file(folder / name / "weights.safetensors") for name in ("whole", "parted"))
    assert all(whole[name].equal(parted[name]) for name in whole)
    figures = [[row["mistakes"] for row in rows(folder / name, "val")] for name in ("whole", "parted")]
    assert figures[0] == figures[1]


def test_a_distillation_loss_of_another_package_is_weighed_against_the_labels(folder: Path, said: dict[str, Any]) -> None:
    assert said["student"][0] == 0, said["student"][1]
    first = rows(folder / "student", "train")[0]
    assert first["loss"] == 0.75 * 1.0 + 0.25 * 7 * 3.0
    assert "0.25 x sevens at T = 3, the rest each stage's loss" in said["plan"][1]
    assert any(line.split() == ["loss", "squared_error"] for line in said["plan"][1].splitlines())


def test_only_images_in_memory_have_no_workers(said: dict[str, Any]) -> None:
    assert said["workers"][0] == 0
    assert said["workers"][1] > 0


def test_what_is_wrong_is_suggested(said: dict[str, Any]) -> None:
    names, sources = said["names"], said["sources"]
    assert "select: 'mistake' is unknown; did you mean mistakes?" in names
    assert "stages.0.loss: 'squared_eror' is unknown; did you mean squared_error?" in names
    assert "distill.loss: 'seven' is unknown; did you mean sevens?" in names
    assert sources["squars"] == "data.source is 'squars'; did you mean squares?"
    assert sources["squares:x"] == "data.source is 'squares:x'; did you mean squares?"
    assert sources["labels-file"] == "data.source is 'labels-file'; did you mean labels-file:FILE?"
    assert sources["zzzz"].endswith(
        "it can be cifar10, cifar100, digits, printed, folder:PATH, csv:PATH, zip:FILE, tar:FILE, parquet:GLOB, hf:NAME, webdataset:GLOB, "
        "lmdb:PATH, torchvision:NAME, broken, labels-file:FILE, squares"
    )
    assert "toy_parts:ABSENT of another package provides, and it cannot be imported" in sources["broken"]


def test_what_is_no_loss_and_what_says_nothing_is_refused(folder: Path, said: dict[str, Any]) -> None:
    code, text = said["reduced"]
    assert code == 2
    assert "the loss reduced gives shape () for two samples; it must give one value a sample" in text
    assert not (folder / "reduced").exists()
    code, text = said["nothing"]
    assert code == 2
    assert "select is nothing, which has no value for these" in text


def documented(page: str) -> dict[str, Any]:
    """What the example of a page defines."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    found = types.ModuleType("my_package")
    sys.modules["my_package"] = found  # where its classes are looked up
    exec(text.partition("```python\n")[2].partition("```")[0], found.__dict__)
    return found.__dict__


def test_the_documented_source_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS["sources"], "npz", "my_package:NPZ")
    documented("data.md")
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(60) % 3)
    opened = open_images(Data(source=f"npz:{tmp_path / 'x.npz'}"))
    assert [len(split) for split in (opened.train, opened.val, opened.test) if split] == [42, 6, 12]
    assert opened.in_memory
    assert np.array_equal(np.asarray(opened.train.read(7)), images[opened.train.source_index[7]])


def test_the_documented_losses_and_metric_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = documented("recipes.md")
    for kind, name in (("losses", "focal"), ("distill_losses", "squared")):
        monkeypatch.setitem(registry.KINDS[kind], name, f"my_package:{name}")
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    right = logits.softmax(1)[range(5), labels]
    torch.testing.assert_close(objective.label_loss("focal", 3)(logits, labels, 0.0, None), -((1 - right) ** 2) * right.log())
    torch.testing.assert_close(objective.distill_loss("squared", 3)(logits, logits + 2, 1.0), torch.full((5,), 4.0))
    zeros = np.zeros(3)
    p = Predictions(np.arange(3), np.array([0, 1, 2]), np.array([0, 2, 1]), zeros, zeros, zeros, zeros)
    assert found["MISTAKES"].value(p, 3) == 2


@pytest.mark.usefixtures("said")
def test_a_run_outlives_the_package(folder: Path) -> None:
    """Here it is not installed: the network is there, and training on is refused."""
    assert run_dir.read_recipe(folder / "whole").select == "mistakes"
    assert load_trained(folder / "whole").classes == ("dark", "middle", "bright")
    with pytest.raises(UserError, match="select: 'mistakes' is unknown"):
        load(str(folder / "toy.yaml"))
    with pytest.raises(UserError, match=r"stages\.0\.loss: 'squared_error' is unknown"):
        validate(RECIPE | {"select": "top1"}, "mine")
