"""Sets, answers withheld, strangers and views of a run: fitted on its val, kept in its folder, the same in predict and evaluate."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_files import digit_folder, digit_image
from sklearn.metrics import f1_score, roc_auc_score

import tltrain
from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import open_images
from tltrain.data.views import PIXELS_VERSION
from tltrain.evaluation.evaluate import augment_of_views, evaluate
from tltrain.evaluation.predict import evaluation_view, predict, several_views
from tltrain.evaluation.promises import kept
from tltrain.evaluation.promises.command import figures_of
from tltrain.evaluation.promises.fitted import Wanted, groups_of, rules_for, strangers_of, val_answers
from tltrain.evaluation.trained import load_trained
from tltrain.runs import manifest, run_dir
from tltrain.training.run import train

Made = Callable[..., Recipe]


def quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run trained on a folder of four digits, that folder)."""
    from conftest import made_recipe

    root = tmp_path_factory.mktemp("promises")
    images = digit_folder(root / "images")
    recipe = made_recipe(data={"source": f"folder:{images}", "resize": 36, "per_class": None, "eval_limit": None})
    assert train(recipe, RunFlags(folder=root / "run", workers=0))["outcome"] == "finished"
    return root / "run", images


@pytest.fixture
def run(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_a_run_keeps_its_answers_on_val_and_shows_them_on_test(run: Path, made: tuple[Path, Path]) -> None:
    val = kept.read_val(run)
    assert val is not None
    files = sorted((made[1] / "val").rglob("*.png"))
    shares = [(p, Path(p.id).parent.name) for p in predict(load_trained(run), files)]
    own = [p.shares[load_trained(run).classes.index(label)] for p, label in shares if p.shares is not None]
    assert val.own == pytest.approx(own, abs=1e-5)
    assert val.right.tolist() == [p.label == label for p, label in shares]
    assert val.confidence == pytest.approx([p.confidence for p, _ in shares], abs=1e-5)
    test = run_dir.test_metrics(run)
    assert test is not None
    (sets,) = test["sets"]  # 12 val images promise 90 %, and no more
    assert (sets["coverage"], sets["num_val"], sets["n"]) == (0.9, 12, 16)
    assert sets["threshold"] == np.sort(val.own)[0]
    with (run / "test_predictions.csv").open(encoding="utf-8") as file:
        right = [row["label"] == row["predicted"] for row in csv.DictReader(file)]
    assert sets["covered"] >= sum(right)
    assert test["answered_curve"][-1] == [1.0, pytest.approx(np.mean(right))]
    page = run_dir.report_file(run).read_text(encoding="utf-8")
    assert "What it does not know" in page
    with pytest.raises(UserError, match="at least 19"):
        rules_for(run, Wanted(coverage=0.95), quiet)


def test_what_is_worked_out_again_is_what_the_run_kept(run: Path) -> None:
    before = kept.read_val(run)
    assert before is not None
    kept.val_file(run).unlink()
    said: list[str] = []
    after = val_answers(run, said.append)
    assert any("answered once" in line for line in said)
    for name in ("confidence", "own", "right"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-5)
    kept_again = kept.read_val(run)
    assert kept_again is not None
    assert (kept_again.own == after.own).all()
    flipped = bytearray(kept.val_file(run).read_bytes())
    flipped[-1] ^= 1
    kept.val_file(run).write_bytes(flipped)
    with pytest.raises(UserError, match=r"not as its run wrote it.*delete it: it is made again"):
        kept.read_val(run)
    figures = figures_of(run, None, "test", 16, Wanted())
    assert "sets" not in figures
    assert "delete it: it is made again" in figures["notes"][-1], "nobody asked for it"


def test_a_rule_on_the_images_that_it_was_fitted_on_says_so(run: Path) -> None:
    for split, says in (("val", "fitted on these very images"), ("train", "trained on these"), ("all", "among these are")):
        assert "sets" not in figures_of(run, None, split, 16, Wanted())
        assert says in figures_of(run, None, split, 16, Wanted(coverage=0.9))["notes"][-1]
    assert figures_of(run, None, "test", 16, Wanted(coverage=0.9))["notes"] == []


def test_the_runs_own_images_by_another_path_are_known_by_their_bytes(run: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    said = "32 of these {} images were trained on, 12 are of its val: figures, sets and thresholds look better"
    every = f"folder:{made[1].parent}/./{made[1].name}"
    for asked in (Wanted(), Wanted(coverage=0.9)):
        figures = figures_of(run, every, "all", 16, asked)
        assert sum(said.format(figures["n"]) in note for note in figures["notes"]) == 1
    copied = shutil.copytree(made[1] / "val", tmp_path / "others")
    assert "12 of these 12 images are of its val" in figures_of(run, f"folder:{copied}", "all", 16, Wanted())["notes"][0]
    assert figures_of(run, every, "test", 16, Wanted())["notes"] == []


def test_changed_data_is_said_and_what_it_gives_is_not_kept(run: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    images = Path(shutil.copytree(made[1], tmp_path / "images"))
    recipe = run / "recipe.yaml"
    manifest.uncover(run, [recipe])
    recipe.write_text(recipe.read_text().replace(str(made[1]), str(images)))
    next((images / "val").rglob("*.png")).unlink()
    kept.val_file(run).unlink()
    said: list[str] = []
    assert len(val_answers(run, said.append)) == 11
    strangers_of(run, said.append)
    assert sum("images keep the splits of the training (32 of 32 train, 11 of 12 val" in line for line in said) == 2
    assert sum("not kept, since the data has changed" in line for line in said) == 2
    assert all(line[7] == " " and line[8] != " " for line in said), "labels of eight columns"
    assert not kept.val_file(run).exists()
    assert not kept.strangers_file(run).exists()
    (run / "data.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"promise nothing.*which image was in which split is not known"):
        val_answers(run, said.append)


def test_groups_of_val_are_counted_kept_and_said(run: Path) -> None:
    runtime_images = open_images(run_dir.read_recipe(run).data)
    assert groups_of(runtime_images, runtime_images.val) is None, "each image is drawn by itself"
    source = runtime_images.source
    assert source is not None
    alike = replace(runtime_images, source=replace(source, groups=source.numbers // 4))
    assert groups_of(alike, alike.val) == len(set((alike.val.source_index // 4).tolist()) if alike.val is not None else ())
    val = kept.read_val(run)
    assert val is not None
    kept.write_val(run, replace(val, num_groups=3))
    said: list[str] = []
    rules_for(run, Wanted(coverage=0.9, abstain=0.5), said.append)
    assert sum("lie in 3 groups" in line for line in said) == 1
    figures = figures_of(run, None, "test", 16, Wanted())
    assert sum("lie in 3 groups" in note for note in figures["notes"]) == 1


def test_views_with_other_pixels_are_answered_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = kept.read_val(run)
    assert val is not None
    kept.write_val(run, val, 3)
    assert kept.read_val(run, 3) is not None
    monkeypatch.setitem(PIXELS_VERSION, "light", 99)
    assert kept.read_val(run, 3) is None
    assert kept.read_val(run) is not None


def test_answers_of_other_weights_are_not_used(run: Path) -> None:
    weights = run_dir.weights_file(run)
    manifest.uncover(run, [weights])
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert kept.read_val(run) is None


def test_a_set_and_a_decision_are_what_the_probabilities_say(
    run: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(run), str(made[1] / "test"), "--csv", "--probabilities", "--coverage", "0.9", "--abstain", "0.5"]
    assert main(words) == 0
    out = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out.out)))
    asked = rules_for(run, Wanted(0.9, 0.5), quiet)
    classes = load_trained(run).classes
    assert len(rows) == 16
    for row in rows:
        p = {name: float(row[f"p:{name}"]) for name in classes}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert max(p, key=lambda name: p[name]) == row["label"]
        wanted = [name for name in sorted(p, key=lambda n: -p[n]) if p[name] >= asked.sets[0].threshold or name == row["label"]]
        assert json.loads(row["set"]) == wanted
        assert row["decision"] == ("answers" if float(row["confidence"]) > asked.abstentions[0].threshold else "abstains")
    answered = sum(row["decision"] == "answers" for row in rows)
    assert f"{answered} of 16 images answered, abstains on {16 - answered}" in out.err
    assert "at least 90 % hold the true class; by the luck of its 12 val images" in out.err
    assert main(["predict", str(run), str(made[1] / "test"), "--json", "--probabilities", "--coverage", "0.9"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["set"] == json.loads(rows[0]["set"])
    assert first["probabilities"] == pytest.approx({name: float(rows[0][f"p:{name}"]) for name in classes}, abs=1e-5)
    assert "decision" not in first


def test_several_views_are_a_mean_of_probabilities_in_predict_and_evaluate(run: Path, made: tuple[Path, Path]) -> None:
    trained, files = load_trained(run), sorted((made[1] / "test").rglob("*.png"))
    asked = rules_for(run, Wanted(num_views=3), quiet)
    several = list(predict(trained, files, asked=asked, batch=7))
    assert augment_of_views(trained.recipe) == "light"
    for p, file in zip(several, files, strict=True):
        views = several_views(file, trained, "light", 3)
        assert isinstance(views, torch.Tensor)
        assert torch.equal(views[0], torch.as_tensor(evaluation_view(file, trained.preprocess)))
        with torch.no_grad():
            mean = torch.stack([trained.chain(view[None]).double().softmax(1)[0] for view in views]).mean(0)
        assert p.shares == pytest.approx(mean.numpy(), abs=1e-5)
    one = [p.label for p in predict(trained, files)]
    figures = evaluate(run, None, "test", 5, asked)
    labels = [Path(file).parent.name for file in map(str, files)]
    assert figures["top1"] == pytest.approx(np.mean([p.label == label for p, label in zip(several, labels, strict=True)]))
    own = [float(p.shares[trained.classes.index(label)]) for p, label in zip(several, labels, strict=True) if p.shares is not None]
    assert figures["calibration"]["ece"] != pytest.approx(evaluate(run, None, "test", 5)["calibration"]["ece"])
    alone = np.mean([a == label for a, label in zip(one, labels, strict=True)])
    assert figures["views"]["num"] == 3
    assert figures["views"]["top1_of_one"] == pytest.approx(alone)
    assert figures["views"]["difference"] == pytest.approx(figures["top1"] - alone)
    assert len(own) == 16


def test_the_command_says_it_in_lines_of_a_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--views", "2", "--abstain", "0.5", "--coverage", "0.8", "--strangers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line[:18].strip(): line[18:] for line in lines}
    assert {"set of 80 %", "abstain 50 %", "known images", "2 views"} <= set(said)
    assert "hold the true class, mean size" in said["set of 80 %"]
    assert "promised" in said["abstain 50 %"]
    assert "against one view" in said["2 views"]
    assert max(map(len, lines)) <= 80
    assert main(["evaluate", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["sets"][0]["coverage"] == 0.9, "without being asked, what the run kept"
    assert main(["evaluate", str(run)]) == 0
    said = {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}
    assert said["test images"] == "16"
    ends = f"{100 * figures['top1_low']:.1f} to {100 * figures['top1_high']:.1f}"
    assert said["accuracy"] == f"{100 * figures['top1']:.1f} % ({ends}, 95 % interval)"
    assert said["F1, mean"] == f"{100 * figures['f1_macro']:.1f} %"
    assert said["loss"] == f"{figures['loss']:.3f}"
    assert not {"top5", "f1_weighted", "top1_low", "split", "top-5 accuracy"} & set(said), "plain names, and nothing that says nothing"


def test_a_val_that_is_too_small_promises_nothing_of_answers_withheld(
    run: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """12 images of val, all of them right, promise 60 % and no more: the usual accuracies take 57 or more."""
    test = run_dir.test_metrics(run)
    assert test is not None
    assert (test["abstain"], test["fitted_on"]) == ([], {"n": 12, "groups": None})
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "nothing is promised: val has 12 images, too few (90 % takes 57, 95 % 117, 99 % 597, all right)" in said
    page = run_dir.report_file(run).read_text(encoding="utf-8").replace("\u202f", " ")
    assert "Val has 12 images, too few to promise anything of answers withheld: 90 % takes 57" in page
    words = ["predict", str(run), str(made[1] / "test"), "--csv", "--abstain"]
    before = kept.read_val(run)
    assert before is not None
    val = replace(before, confidence=np.linspace(0.5, 1, 12), right=np.ones(12, bool))
    kept.write_val(run, val)
    assert main([*words, "0.9"]) == 0
    said = capsys.readouterr().err
    assert "val has 12 images, too few to promise anything of other images: to promise that 90 % of answers are right takes" in said
    assert "promised for other images" not in said
    assert main([*words, "0.6"]) == 0
    assert "at least 60.7 % of answers are right" in capsys.readouterr().err
    kept.write_val(run, replace(val, num_groups=3))
    assert main([*words, "0.6"]) == 0
    assert "val has 12 images in 3 groups, too few" in capsys.readouterr().err, "images that are alike count once"


def test_python_gives_what_the_verb_gives(run: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    images = made[1] / "test"
    words = ["--coverage", "0.8", "--abstain", "0.5", "--strangers", "--views", "2"]
    assert main(["predict", str(run), str(images), "--json", *words]) == 0
    out = capsys.readouterr()
    opened = tltrain.load(run)
    files = [row["path"] for row in json.loads(out.out)]
    answers = opened.predict(files, coverage=0.8, abstain=0.5, strangers=True, views=2)
    assert "hold the true class" in capsys.readouterr().err
    for p, row in zip(answers, json.loads(out.out), strict=True):
        assert (p.label, p.set, p.decision) == (row["label"], tuple(row["set"]), row["decision"])
        assert (p.confidence, p.strangeness) == pytest.approx((row["confidence"], row["strangeness"]), abs=1e-5)
    one = opened.predict(files[0], coverage=0.8, abstain=0.5, strangers=True, views=2)
    assert (one.set, one.decision) == (answers[0].set, answers[0].decision)
    assert capsys.readouterr().err == "", "said once"
    assert opened.predict(files[0]).decision is None
    with pytest.raises(UserError, match=r"abstain is 95; it must be between 0 and 1.*did you mean 0\.95"):
        opened.predict(files[0], abstain=95)


def subset(images: Path, out: Path, renamed: dict[str, str]) -> Path:
    """The test images of some classes, under other names, in the order of those names."""
    for name, new in renamed.items():
        shutil.copytree(images / "test" / name, out / new)
    return out


def test_other_images_may_hold_some_of_the_classes_in_any_order(run: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    whole = evaluate(run, f"folder:{made[1] / 'test'}", "all", 16)
    own = evaluate(run, None, "test", 16)
    assert whole["confusion"] == own["confusion"]
    # zeros that are called ones: the network answers with a class that has no image here
    some = subset(made[1], tmp_path / "some", {"digit 3": "digit 3", "digit 0": "digit 1"})
    table = tmp_path / "some.csv"
    lines = [f"{file},{file.parent.name}" for file in sorted(some.rglob("*.png"), reverse=True)]
    table.write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    pairs = [(k, j) for k, seen in ((1, 0), (3, 3)) for j, num in enumerate(own["confusion"][seen]) for _ in range(num)]
    label, predicted = zip(*pairs, strict=True)
    for source in (f"folder:{some}", f"csv:{table}"):
        figures = evaluate(run, source, "all", 16)
        assert figures["n"] == 8
        assert [sum(row) for row in figures["confusion"]] == [0, 4, 0, 4]
        assert figures["confusion"][1] == own["confusion"][0]
        assert figures["confusion"][1][0] > 0
        assert figures["f1_macro"] == pytest.approx(f1_score(label, predicted, labels=[1, 3], average="macro", zero_division=0))
        assert "2 of the run's 4 classes have no image here: digit 0, digit 2" in figures["notes"][0]


def test_a_class_that_the_run_does_not_know_is_refused_or_counted_as_strange(
    run: Path, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = subset(made[1], tmp_path / "mixed", {f"digit {k}": f"digit {k}" for k in range(4)})
    (mixed / "noise").mkdir()
    from PIL import Image

    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(mixed / "noise" / f"{n}.png")
    with pytest.raises(UserError, match="5 images are of classes that the run does not know: noise"):
        evaluate(run, f"folder:{mixed}", "all", 16)
    figures = figures_of(run, f"folder:{mixed}", "all", 16, Wanted(strangers=True))
    assert figures["n"] == 16
    assert figures["confusion"] == evaluate(run, None, "test", 16)["confusion"]
    capsys.readouterr()
    assert main(["predict", str(run), str(mixed), "--csv", "--strangers"]) == 0
    rows = rows_of(capsys)
    score, strange = [float(row["strangeness"]) for row in rows], ["noise" in row["path"] for row in rows]
    assert figures["strangers"]["auroc"] == pytest.approx(roc_auc_score(strange, score), abs=1e-4)
    assert figures["strangers"]["strange"]["n"] == 5
    marked = [row["decision"] == "stranger" for row in rows]
    assert marked == [s > 1 for s in score]
    assert sum(marked) == figures["strangers"]["strange"]["marked"] + figures["strangers"]["known"]["marked"]
    assert all(m for m, s in zip(marked, strange, strict=True) if s), "noise is like no digit"
    only = subset(made[1], tmp_path / "only", {"digit 0": "zero", "digit 1": "one"})
    kept.strangers_file(run).unlink()
    with pytest.raises(UserError, match="no image is of a class of the run"):
        figures_of(run, f"folder:{only}", "all", 16, Wanted(strangers=True))
    assert not kept.strangers_file(run).exists(), "refused before the run's features are computed"


def test_strangers_are_told_by_what_the_head_is_given(run: Path, made: tuple[Path, Path]) -> None:
    found = strangers_of(run, quiet)
    again = kept.read_strangers(run)
    assert again is not None
    assert again.limit == found.limit
    trained, given = load_trained(run), []
    trained.chain.net.get_submodule("fc").register_forward_pre_hook(lambda _, args: given.append(args[0]))
    for file in sorted((made[1] / "train").rglob("*.png")):
        view = evaluation_view(file, trained.preprocess)
        assert isinstance(view, torch.Tensor)
        with torch.no_grad():
            trained.chain.net(trained.chain.normalise(view[None]))
    features = torch.cat(given).numpy()
    assert len(found.unit_ND) == len(features) == 32
    assert found.unit_ND == pytest.approx(features / np.linalg.norm(features, axis=1, keepdims=True), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"coverage": 90.0}, "did you mean 0.9"), ({"abstain": 0.0}, "between 0 and 1"), ({"num_views": 0}, "views is 0")],
)
def test_a_value_that_cannot_be_had_is_refused_before_anything_is_read(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        rules_for(Path("/no/run"), Wanted(**changes), quiet)


@pytest.mark.parametrize("word", ["--batch", "--top"])
def test_no_image_at_a_time_is_refused(run: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept.val_file(run).unlink()
    assert main(["predict", str(run), "x", word, "0", "--coverage", "0.9"]) == 2
    assert f"{word[2:]} is 0; it must be at least 1" in capsys.readouterr().err


def test_a_run_without_val_promises_nothing(made_recipe: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import HEAD

    recipe = made_recipe(stages=[HEAD | {"carry": "last"}], data={"val_fraction": 0})
    train(recipe, RunFlags(folder=tmp_path / "run", workers=0))
    assert not kept.val_file(tmp_path / "run").exists()
    digit_image(0).save(tmp_path / "0.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "0.png"), "--coverage", "0.9"]) == 2
    assert "has no val images" in capsys.readouterr().err
