"""Backbones compared by solved heads: the figures are scikit-learn's, nothing leaks, and one bad backbone does not end the others."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_files import digit_folder, digit_image
from page_reader import Page, assert_self_contained
from rich.console import Console as RichConsole
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import tltrain
from tltrain.analysis.at_hand import AtHand, Candidate, named
from tltrain.analysis.features import FeatureBank
from tltrain.analysis.probe import judge, terminal
from tltrain.analysis.probe.judge import Ask, Probed, probe, recipe_of
from tltrain.analysis.probe.page import edge, probe_page
from tltrain.cli.main import main
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.data.splits import folds
from tltrain.evaluation.multilabel.judged import by_right
from tltrain.heads.solve import solve
from tltrain.runs.report.stats import wilson

QUIET, FLAGS = Console(False), RunFlags(workers=0)
NETS = ("resnet-tiny", "vit-tiny")


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "time_frozen", lambda frozen, side, device: (0.001 * (frozen.stop or 9), 512))  # seconds, bytes


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("digits"))


def _candidates(*names: str) -> list[Candidate]:
    return [named(name) for name in names]


def _plain(ask: Ask, fold_N: np.ndarray, features_ND: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Whether each image is right by scikit-learn's ridge regression on one-hot targets, of the strength that a solved head has."""
    right_N = np.zeros(len(label_N), dtype=bool)
    for fold in range(fold_N.max() + 1):
        rest = fold_N != fold
        strength = solve("ridge", torch.from_numpy(features_ND[rest]), label_N[rest], label_N.max() + 1, seed=ask.seed).strength
        scale = StandardScaler().fit(features_ND[rest])
        head = Ridge(alpha=strength).fit(scale.transform(features_ND[rest]), np.eye(label_N.max() + 1)[label_N[rest]])
        right_N[~rest] = head.predict(scale.transform(features_ND[~rest])).argmax(1) == label_N[~rest]
    return right_N


def test_rows_are_what_scikit_learn_gives_on_the_same_features(digits: Path) -> None:
    ask = Ask(f"folder:{digits}", ("head", "layer4"), k=4, seed=3)
    probed = probe(ask, _candidates("resnet-tiny"), FLAGS, QUIET)
    assert probed.num_images == 4 * 11, "train and val; test stays unseen"
    with FeatureBank.open(recipe_of(ask, named("resnet-tiny")), FLAGS, QUIET) as bank:
        fold_N = folds(bank.labels, bank.groups, 4, 3)
        right = {cut: _plain(ask, fold_N, bank.features(cut).double().numpy(), bank.labels) for cut in ask.cuts}
        features_ND = bank.features().double().numpy()
        labels = bank.labels
    assert {row.cut: row.right for row in probed.rows} == {cut: tuple(right_N.tolist()) for cut, right_N in right.items()}
    best, other = probed.rows
    assert best.accuracy == np.mean(best.right) >= other.accuracy > 0.5
    assert other.difference == pytest.approx(other.accuracy - best.accuracy)
    assert other.difference_low <= other.difference <= other.difference_high
    near = []  # an unweighted vote agrees with the weighted one on nearly all
    for fold in range(4):
        rest, unit = fold_N != fold, features_ND - features_ND.mean(0)
        near += (KNeighborsClassifier(5, metric="cosine").fit(unit[rest], labels[rest]).predict(unit[~rest]) == labels[~rest]).tolist()
    assert next(row for row in probed.rows if row.cut == "head").neighbours == pytest.approx(np.mean(near), abs=0.1)


def test_images_of_a_group_are_never_in_two_folds(tmp_path: Path) -> None:
    """Each of 24 pictures stands there twice, with a label drawn at random: who has seen its twin is always right."""
    label_N = np.random.default_rng(0).integers(0, 2, 24)
    rows = [["path", "label", "group"]]
    for i, label in enumerate(label_N.tolist()):
        digit_image(i).save(tmp_path / f"{i}.png")
        digit_image(i).resize((44, 40)).save(tmp_path / f"{i}b.png")
        rows += [[f"{i}.png", f"c{label}", str(i)], [f"{i}b.png", f"c{label}", str(i)]]
    for name, columns in (("groups.csv", 3), ("single.csv", 2)):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows(row[:columns] for row in rows)
    grouped, single = (
        probe(Ask(f"csv:{tmp_path / name}", k=12, everything=True, seed=1), _candidates("resnet-tiny"), FLAGS, QUIET).rows[0]
        for name in ("groups.csv", "single.csv")
    )
    assert grouped.accuracy < 0.8 < 0.9 < single.accuracy
    assert grouped.neighbours < 0.8 < 0.9 < single.neighbours
    width = grouped.high - grouped.low
    assert width > 1.2 * (wilson(grouped.accuracy, 48)[1] - wilson(grouped.accuracy, 48)[0]), "24 pictures, not 48"


def test_one_bad_backbone_of_three_is_named_and_the_others_go_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    words = ["probe", str(digits), "--workers", "0", "--size", "32", "--backbones"]
    assert main([*words, "resnet-tiny,resnet-tny,vit-tiny=gone.pth,vit-tiny"]) == 0
    said = capsys.readouterr().out
    assert f"data    folder:{digits}" in said
    assert "did you mean resnet-tiny" in said
    assert "'gone.pth', and there is no such file" in said
    assert "left    could not be judged, and why stands above: resnet-tny, vit-tiny=gone.pth" in said
    assert "page    probe.html" in said
    page = Page(tmp_path / "probe.html")
    assert_self_contained(page)
    assert "resnet-tny" in page.text
    assert main([*words, "resnet-tiny,resnet-tny,vit-tiny", "--json", "--cuts", "head,layer4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(row["backbone"], row["cut"]) for row in answer["rows"] if row["backbone"] == "vit-tiny"] == [("vit-tiny", "head")]
    assert set(answer["problems"]) == {"resnet-tny", "vit-tiny before layer4"}
    assert "no block of vit-tiny is called that; its blocks: head, block.3" in answer["problems"]["vit-tiny before layer4"]
    assert answer["images"] == 44
    assert answer["rows"] == sorted(answer["rows"], key=lambda row: -row["accuracy"])


def test_a_signal_stops_a_probe(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def busy(self: Console, text: str | None) -> None:
        if text is not None and "train: row" in text:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "busy", busy)
    assert main(["probe", str(digits), "--backbones", "resnet-tiny", "--workers", "0", "--out", str(tmp_path / "p.html")]) == 75
    assert "stopped by SIGTERM; the features that were stored stay" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbones", "resnet-tny"], "no backbone could be probed:\n  resnet-tny: backbone.name is 'resnet-tny'; did you mean"),
        (["--backbones", "resnet-tiny", "--cuts", "layer9"], "resnet-tiny: cut 'layer9': no block of resnet-tiny is called that"),
        (["--backbones", "resnet-tiny", "--k", "1"], "cannot be parted into 1 folds"),
        (["--backbones", "resnet-tiny", "--k", "100"], "cannot be parted into 100 folds: 44 images"),
        (["--backbones", "resnet-tiny", "--cuts", ","], "names no block"),
        (["--backbones", "vit-tiny", "--size", "33"], "data.size is 33"),
    ],
)
def test_mistakes(words: list[str], message: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(digits), "--workers", "0", "--out", str(tmp_path / "p.html"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_data_that_cannot_be_judged(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a").symlink_to(digits / "train/digit 0")
    assert main(["probe", str(tmp_path / "one"), "--backbones", "resnet-tiny"]) == 2
    assert "has 1 class (a)" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "nothing"), "--backbones", "resnet-tiny"]) == 2
    assert "is no folder, no CSV file and no source" in capsys.readouterr().err


def test_all_takes_the_test_split_too_and_small_classes_are_named(digits: Path) -> None:
    probed = probe(Ask(f"folder:{digits}", k=20, everything=True), _candidates("resnet-tiny"), FLAGS, QUIET)
    assert probed.num_images == 60
    (note,) = [note for note in probed.notes if "fewer images than the 20 folds" in note]
    assert "digit 0 (15)" in note
    assert not [note for note in probed.notes if "unseen" in note]


def test_from_python(digits: Path) -> None:
    rows = tltrain.probe(digits, ["resnet-tiny"], cuts=["head"], workers=0)
    assert [(row.backbone, row.cut) for row in rows] == [("resnet-tiny", "head")]
    assert rows[0].low < rows[0].accuracy <= rows[0].high


def _row(name: str, accuracy: float, image_s: float, **changes: Any) -> judge.ProbeRow:
    plain = {
        "backbone": name, "weights": "DEFAULT", "cut": "head", "accuracy": accuracy, "low": accuracy - 0.04, "high": accuracy + 0.03,
        "difference": -0.123, "difference_low": -0.456, "difference_high": -0.101, "neighbours": 0.7, "image_s": image_s,
        "num_parameters": 3_370_000, "num_features": 4, "row_bytes": 5120, "solve_s": 1.0, "judged": by_right(np.ones(1, bool)),
    }  # fmt: skip
    return judge.ProbeRow(**{**plain, **changes})


def _probed(*rows: judge.ProbeRow) -> Probed:
    return Probed(Ask("folder:photos", k=5), rows, {"<b>bad</b>": "why & how"}, (), 485, 8, 0.3)


BEST = _row("timm:tf_efficientnet_lite0", 0.81, 0.066, difference=0.0, difference_low=0.0, difference_high=0.0)
CHEAP = _row("resnet18", 0.80, 0.012, difference=-0.01, difference_low=-0.03, difference_high=0.002)
DEAR = _row("hf:facebook/dinov2-with-registers-base", 0.79, 0.5, cut="encoder.layer.11")
WEAK = _row("<i>tiny</i>", 0.40, 0.001)


def test_the_knee_is_the_quickest_that_may_be_as_good() -> None:
    probed = _probed(BEST, CHEAP, DEAR, WEAK)
    assert probed.knee is CHEAP
    assert "resnet18 may be as good (-1.0 points, -3.0 to +0.2) and takes 12 of 66 ms" in " ".join(terminal.verdict(probed))
    assert edge(probed.rows) == [(1.0, 0.40), (12.0, 0.80), (66.0, 0.81)]
    assert len(terminal.verdict(_probed(BEST, WEAK))) == 1


def test_the_table_fits_80_columns() -> None:
    console = RichConsole(width=80)
    with console.capture() as shown:
        console.print(terminal.table(_probed(BEST, CHEAP, DEAR, WEAK)))
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80
    for figures in ("77.0-84.0", "-12.3 -45.6..-10.1", " 66 3.37 M 5.12 KB"):
        assert any(figures in line for line in lines), figures


def test_a_long_name_is_broken_behind_its_words() -> None:
    """As a backbone with a file of weights."""
    name = "timm:tf_efficientnet_lite0=/data/weights/efficientnet-lite0-57934424.pth"
    console = RichConsole(width=80)
    with console.capture() as shown:
        console.print(terminal.table(_probed(BEST, _row(name, 0.80, 0.012), WEAK)))
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80
    first = next(i for i, line in enumerate(lines) if "80.0" in line)
    parts = [line.split(maxsplit=1)[0] for line in lines[first:-1]]
    assert "".join(parts) == name
    assert all(part[-1] in "_=/-" for part in parts[:-1]), parts
    assert "efficientnet_<wbr>lite0=<wbr>/<wbr>data/<wbr>" in probe_page(_probed(BEST, _row(name, 0.80, 0.012)), None)


def test_the_page_shows_each_row_and_escapes_names(tmp_path: Path) -> None:
    here = AtHand((), {"resnet50": "curl <url>"}, ("other",))
    file = tmp_path / "probe.html"
    file.write_text(probe_page(_probed(BEST, CHEAP, DEAR, WEAK), here), encoding="utf-8")
    page = Page(file)
    assert_self_contained(page)
    for text in ("<i>tiny</i>", "<b>bad</b>", "why & how", "curl <url>", "other", "hf:facebook/dinov2-with-registers-base before encoder"):
        assert text in page.text
    marks = page.all("span", class_="mark")
    assert len(marks) == 4
    lefts = [float(mark["style"].split("left:")[1].split("%")[0]) for mark in marks]
    assert lefts[3] < lefts[1] < lefts[0] < lefts[2], "the slower, the further to the right"
