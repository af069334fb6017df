"""`tltrain doctor SOURCE`: what it finds in planted data, what it suggests, and that training takes its table as it is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_words import mistake
from photo_files import scene
from PIL import Image, ImageFilter

from benchmarks.doctor import KINDS
from tltrain.analysis.doctor import labels, looks, twins
from tltrain.analysis.doctor.copies import copies, leak
from tltrain.analysis.doctor.findings import (
    BLANK,
    BLURRED,
    IDENTICAL,
    OUTLIER,
    THIN,
    TINY,
    TWIN,
    TWIN_LABELS,
    TWIN_SPLITS,
    WRONG,
    Finding,
    settled,
    table,
)  # fmt: skip
from tltrain.analysis.doctor.twins import Twin
from tltrain.analysis.samples import Samples
from tltrain.cli.main import main
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, Split, open_images

NUM = 12


def picture(seed: int, width: int = 100, height: int = 80) -> Image.Image:
    return Image.fromarray(scene(width, height, seed))


def looked(images: list[Image.Image]) -> list[looks.Look]:
    return list(looks.look_at(lambda i: images[i], range(len(images))))


def test_single_images_are_named_by_what_is_wrong_with_them() -> None:
    rng = np.random.default_rng(0)
    sharp = [
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((256, 192), Image.Resampling.NEAREST) for _ in range(8)
    ]
    images = [
        *sharp,
        Image.new("RGB", (200, 200), (201, 200, 198)),
        sharp[0].filter(ImageFilter.GaussianBlur(8)),
        sharp[1].resize((50, 40)),
        sharp[2].resize((400, 60)),
    ]
    found = looks.pixel_problems(looked(images), [str(i) for i in range(len(images))], size=224)
    assert {(f.path, f.problem) for f in found} == {("8", BLANK), ("9", BLURRED), ("10", TINY), ("11", THIN)}
    assert {f.suggestion for f in found if f.problem == BLANK} == {"exclude"}
    assert {f.suggestion for f in found if f.problem != BLANK} == {"look"}


def test_a_set_of_small_images_is_no_set_of_tiny_ones() -> None:
    images = [picture(seed, 32, 32) for seed in range(6)]
    assert TINY not in {f.problem for f in looks.pixel_problems(looked(images), list("abcdef"), size=224)}
    found = looks.pixel_problems(looked([*images[:2], *(picture(seed, 200, 200) for seed in range(4))]), list("abcdef"), size=224)
    assert {f.path for f in found if f.problem == TINY} == {"a", "b"}


def test_no_image_of_an_even_set_is_blurred() -> None:
    assert not looks.pixel_problems(looked([picture(seed) for seed in range(20)]), [str(i) for i in range(20)], size=64)


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
def test_a_changed_copy_is_a_twin_and_another_picture_is_none(change: Callable[[Image.Image, np.random.Generator], Image.Image]) -> None:
    images = [picture(seed) for seed in range(NUM)]
    images += [change(image, np.random.default_rng(i)) for i, image in enumerate(images)]
    found, cut = twins.twins(looked(images), lambda i: images[i], range(2 * NUM))
    assert {(pair.first, pair.second) for pair in found} == {(i, i + NUM) for i in range(NUM)}
    assert not cut


def test_features_bring_pairs_to_the_comparison_and_do_not_decide() -> None:
    """Equal features of other pictures are no twins; a shift that the grey copies do not show is found by features."""
    images = [picture(seed) for seed in range(4)]
    features_ND = torch.eye(4)[[0, 0, 1, 2]]
    assert twins.twins(looked(images), lambda i: images[i], range(4), features_ND)[0] == []


def test_blank_images_are_no_twins_of_each_other() -> None:
    images = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(4)]
    assert twins.twins(looked(images), lambda i: images[i], range(4))[0] == []


def test_clusters_join_what_is_connected() -> None:
    assert twins.clusters(6, [(4, 5), (1, 4), (0, 2)]).tolist() == [0, 1, 0, 3, 1, 1]


def _samples(rows: list[tuple[str, str, int]], digests: tuple[str, ...] = ()) -> Samples:
    """rows: (id, split, label), in the order train, val, test."""
    splits = []
    for name in ("train", "val", "test"):
        own = [(i, label) for i, (_, split, label) in enumerate(rows) if split == name]
        numbers = np.array([i for i, _ in own], dtype=np.int64)
        names = tuple(rows[i][0] for i in numbers)
        splits.append(Split(name, np.array([label for _, label in own], dtype=np.int64), names, numbers, lambda i: picture(i)))
    images = DataSplits(("cat", "dog"), splits[0], splits[1], splits[2], "x")
    samples = Samples(images, tuple(splits))
    samples.__dict__["digests"] = digests
    return samples


def test_the_copy_in_test_stays_then_the_larger_one() -> None:
    rows = [("a", "train", 0), ("b", "train", 0), ("c", "train", 1), ("d", "train", 1), ("e", "train", 0), ("f", "test", 0)]
    samples = _samples(rows, ("1", "2", "3", "3", "4", "5"))
    seen = looked([picture(0, *size) for size in ((80, 60), (90, 70), (80, 60), (80, 60), (200, 200), (80, 60))])
    pairs = [Twin(0, 1, 0.98), Twin(2, 3, 1.0), Twin(4, 5, 0.97)]
    found = copies(samples, seen, pairs, twins.clusters(6, [(0, 1), (2, 3), (4, 5)]))
    said = {(f.path, f.problem, f.suggestion, f.other) for f in found}
    assert said == {("a", TWIN, "exclude", "b"), ("d", IDENTICAL, "exclude", "c"), ("e", TWIN_SPLITS, "exclude", "f")}


def test_a_picture_under_two_classes_is_looked_at() -> None:
    samples = _samples([("a", "train", 0), ("b", "train", 1)])
    (found,) = copies(samples, looked([picture(0), picture(0)]), [Twin(0, 1, 0.99)], np.array([0, 0]))
    assert (found.path, found.other, found.problem, found.suggestion) == ("a", "b", TWIN_LABELS, "look")


def test_the_accuracy_is_told_with_and_without_leaked_images() -> None:
    """Labels that nothing tells: a copy in train gives the answer away, and only that."""
    rng = np.random.default_rng(0)
    features_ND = torch.from_numpy(rng.normal(size=(40, 64)))
    label_N = rng.integers(0, 2, 40)
    rows = [(str(i), "train" if i < 20 else "test", int(label_N[i])) for i in range(40)]
    cluster_N = np.arange(40)
    for i in range(20, 30):
        features_ND[i] = features_ND[i - 20]
        rows[i] = (str(i), "test", rows[i - 20][2])
        cluster_N[i] = i - 20
    found = leak(_samples(rows), cluster_N, features_ND, 0)
    assert found is not None
    assert (found.num_test, found.num_leaked) == (20, 10)
    assert found.accuracy > found.accuracy_without + 0.1
    assert leak(_samples(rows), np.arange(40), features_ND, 0) is None


def _classes(num: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    label_N = np.arange(num) % 3
    return torch.from_numpy(4 * np.eye(3, 16)[label_N] + rng.normal(size=(num, 16))).float(), label_N


def test_wrong_labels_are_named_with_the_class_that_they_should_have() -> None:
    features_ND, true_N = _classes(120)
    label_N = true_N.copy()
    planted = {5: 0, 40: 2, 77: 0}
    for i, label in planted.items():
        assert label != true_N[i]
        label_N[i] = label
    names, classes = [str(i) for i in range(120)], ["a", "b", "c"]
    found = labels.wrong_labels(labels.unseen_probabilities(features_ND, label_N, np.arange(120), 3, 0), label_N, names, classes)
    assert {f.path: f.other for f in found} == {str(i): classes[true_N[i]] for i in planted}
    assert all(f.suggestion in ("look", f"relabel:{f.other}") for f in found)
    assert any(f.suggestion != "look" for f in found)


def test_a_copy_does_not_vouch_for_a_wrong_label() -> None:
    features_ND, label_N = _classes(120)
    features_ND[1], label_N[1] = features_ND[0], 2
    features_ND[2], label_N[2] = features_ND[0], 2
    group_N = np.array([0, 0, 0, *range(3, 120)])
    p_NK = labels.unseen_probabilities(features_ND, label_N, group_N, 3, 0)
    assert p_NK[1].argmax() == 0
    assert p_NK[1, 2] < 0.1


def test_an_outlier_is_far_from_its_class_also_if_it_has_a_copy() -> None:
    features_ND, label_N = _classes(90)
    features_ND[7], features_ND[10] = torch.eye(16)[9] * 8, torch.eye(16)[9] * 8 + 0.01
    group_N = np.arange(90)
    group_N[10] = 7
    strange_N = labels.strangeness(features_ND, label_N, group_N)
    assert set(np.argsort(-strange_N)[:2].tolist()) == {7, 10}
    assert {f.path for f in labels.outliers(strange_N, [str(i) for i in range(90)])} >= {"7", "10"}


def test_an_image_gets_one_suggestion_that_changes_anything() -> None:
    found = settled([
        Finding("a", WRONG, "relabel:dog", 0.9, "dog"),
        Finding("a", TWIN, "exclude", 0.99, "b"), Finding("a", TWIN_SPLITS, "exclude", 0.98, "c"),
        Finding("b", WRONG, "relabel:cat", 0.95, "cat"), Finding("b", OUTLIER, "look", 3.0),
    ])  # fmt: skip
    acting = [(f.path, f.suggestion) for f in found if f.suggestion != "look"]
    assert sorted(acting) == [("a", "exclude"), ("b", "relabel:cat")]
    assert len(found) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, with a mirrored copy under a hostile name, a blank image and a byte-identical one."""
    root = tmp_path_factory.mktemp("doctor") / "photos"
    for k, name in enumerate(("a<b>", "=b")):
        (root / name).mkdir(parents=True)
        for i in range(NUM):
            picture(100 * k + i, 90, 80).save(root / name / f"{i:02d}.png")
    picture(100, 90, 80).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "=b" / "<img src=x>.png")
    Image.new("RGB", (90, 80), "white").save(root / "a<b>" / "blank.png")
    (root / "=b" / "again.png").write_bytes((root / "=b" / "03.png").read_bytes())
    return root


def test_a_folder_is_examined_and_training_takes_the_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "d.html", tmp_path / "d.csv"
    words = ["doctor", str(folder), "--backbone", "resnet-tiny", "--out", str(out), "--csv", str(file)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "near-duplicate" in said
    table_lines = said.partition("problem ")[2].partition("page ")[0].splitlines()
    assert max(map(len, table_lines)) <= 80
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert list(rows[0]) == ["path", "problem", "suggestion", "score", "other"]
    excluded = {row["path"] for row in rows if row["suggestion"] == "exclude"}
    assert "a<b>/blank.png" in excluded
    assert {"'=b/again.png", "'=b/<img src=x>.png"} & excluded
    page = out.read_text(encoding="utf-8")
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
    assert "data:image/jpeg;base64," in page
    images = open_images(Data(source=f"folder:{folder}", exclude=str(file), relabel=str(file), val_fraction=0, test_fraction=0))
    assert len(images.train) == 2 * NUM + 3 - len(excluded)


def test_without_a_network_pixels_are_looked_at_and_json_says_everything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", f"folder:{folder}", "--backbone", "none", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backbone"] is None
    assert {f["problem"] for f in said["findings"]} <= {BLANK, TWIN, TWIN_SPLITS, IDENTICAL, TINY, BLURRED, THIN, TWIN_LABELS}
    assert [f["path"] for f in said["findings"] if f["problem"] == BLANK] == ["a<b>/blank.png"]
    assert (tmp_path / "doctor.html").is_file()
    assert "doctor.csv exists, and may hold what you decided" in mistake(["doctor", str(folder), "--backbone", "none"], capsys)


def test_what_is_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is no folder, no CSV file and no source" in mistake(["doctor", "nowhere"], capsys)
    assert "drop one" in mistake(["doctor", "digits", "--backbone", "none", "--weights", "x.pth"], capsys)


def test_the_table_keeps_names_that_look_like_formulas() -> None:
    text = table([Finding("=a/1.png", WRONG, "relabel:+x", 0.91234, "+x")])
    assert text == "path,problem,suggestion,score,other\n'=a/1.png,wrong label,relabel:+x,0.9123,'+x\n"
