"""Comparisons: figures as computed independently, seeds grouped, recipes as a difference."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from fake_run import fake_run
from page_reader import Page, assert_self_contained
from rich.console import Console
from scipy.stats import t as student_t
from sklearn.metrics import f1_score

from tltrain.commands.compare import compare, names, rendered
from tltrain.core.errors import UserError
from tltrain.core.recipe import parse
from tltrain.runs.pages.comparison import ComparedRun, compared_run, differing, grouped, paired, welch
from tltrain.runs.record import read_run
from tltrain.runs.report.stats import bootstrap, f1_macro

CLASSES = ["ant", "bee", "cat"]


def answer(run: Path, label: list[str], predicted: list[str]) -> Path:
    """Make of a run one with these predictions."""
    with (run / "test_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", "confidence"])
        writer.writerows([f"x/{i}.png", a, b, 0.9] for i, (a, b) in enumerate(zip(label, predicted, strict=True)))
    test = json.loads((run / "test_metrics.json").read_text())
    test |= {"n": len(label), "top1": float(np.mean([a == b for a, b in zip(label, predicted, strict=True)]))}
    test["f1_macro"] = float(f1_score(label, predicted, average="macro"))
    (run / "test_metrics.json").write_text(json.dumps(test))
    return run


def known(num_both: int, num_a: int, num_b: int, num_none: int) -> tuple[list[str], list[str], list[str]]:
    """(labels, predictions of a, predictions of b) with so many images right in both, in a alone, in b alone, in none."""
    n = num_both + num_a + num_b + num_none
    label = [CLASSES[i % 3] for i in range(n)]
    wrong = [CLASSES[(i + 1) % 3] for i in range(n)]
    a_right = [True] * (num_both + num_a) + [False] * (num_b + num_none)
    b_right = [True] * num_both + [False] * num_a + [True] * num_b + [False] * num_none
    a, b = ([x if right else y for x, y, right in zip(label, wrong, rights, strict=True)] for rights in (a_right, b_right))
    return label, a, b


def entries_of(*runs: Path) -> list[ComparedRun]:
    return [compared_run(run.name, read_run(run)) for run in runs]


def resampled(*columns: np.ndarray) -> np.ndarray:
    """(4000, columns) means of columns (N,) over images drawn again, counted by the multinomial they follow."""
    n = len(columns[0])
    weight = np.random.default_rng(7).multinomial(n, np.full(n, 1 / n), size=4000) / n
    return np.stack([weight @ column for column in columns], axis=1)


def test_mcnemar_and_the_bootstrap_are_as_computed_independently(tmp_path: Path) -> None:
    label, a, b = known(180, 22, 9, 29)
    runs = [fake_run(tmp_path / name, CLASSES, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    first, second = entries_of(answer(runs[0], label, a), answer(runs[1], label, b))
    pair = paired(first, second)
    assert pair is not None
    assert (pair.only_first, pair.only_second) == (22, 9)
    assert pair.p == pytest.approx(2 * sum(math.comb(31, k) for k in range(10)) / 2**31)  # both tails of 31 coins
    right_a, right_b = (np.array([x == y for x, y in zip(label, said, strict=True)], float) for said in (a, b))
    means = resampled(right_a, right_b)
    assert pair.gain.value == pytest.approx(13 / 240)
    assert (pair.gain.low, pair.gain.high) == pytest.approx(np.percentile(means[:, 0] - means[:, 1], [2.5, 97.5]), abs=0.006)
    for e, column in ((first, 0), (second, 1)):
        assert e.accuracy is not None
        assert (e.accuracy.low, e.accuracy.high) == pytest.approx(np.percentile(means[:, column], [2.5, 97.5]), abs=0.006)
    out = compare(runs, tmp_path / "c.html")
    text = Page(out).text
    assert "a alone is right on 22, b alone on 9 (exact McNemar test, p = 0.029)" in text
    assert "+5.4" in text


def test_f1_of_resampled_images_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(4, size=(5, 30)), rng.integers(5, size=(5, 30))
    expected = [f1_score(a, b, average="macro", zero_division=0) for a, b in zip(label, predicted, strict=True)]
    np.testing.assert_allclose(f1_macro(label, predicted), expected)
    low, high = bootstrap(f1_macro, label[0], predicted[0])
    again = rng.integers(30, size=(2000, 30))
    ends = np.percentile(f1_macro(label[0][again], predicted[0][again]), [2.5, 97.5])
    assert (low, high) == pytest.approx(ends, abs=0.03)


def test_runs_on_other_images_are_not_paired(tmp_path: Path) -> None:
    label, a, b = known(30, 4, 2, 4)
    runs = [fake_run(tmp_path / name, CLASSES, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    other = [*label[1:], "ant"] if label[0] != "ant" else [*label[1:], "bee"]
    first, second = entries_of(answer(runs[0], label, a), answer(runs[1], other, b))
    assert paired(first, second) is None
    assert "On the same images" not in Page(compare(runs, tmp_path / "c.html")).text


def test_a_perfect_run_is_not_taken_for_certain(tmp_path: Path) -> None:
    label, _, _ = known(50, 0, 0, 0)
    (e,) = entries_of(answer(fake_run(tmp_path / "a", CLASSES), label, label))
    assert e.accuracy is not None
    assert e.accuracy.low == pytest.approx(50 / (50 + 1.959964**2))  # Wilson's
    assert e.accuracy.high == pytest.approx(1)


def test_seeds_of_one_recipe_are_grouped_and_judged_over_seeds(tmp_path: Path) -> None:
    skills = {"staged": (0.90, 0.92, 0.91), "plain": (0.80, 0.83, 0.79)}
    paths = [
        fake_run(tmp_path / f"{name}-{seed}", CLASSES, skill=skill, seed=seed, lr=0.01 if name == "staged" else 0.02)
        for name, values in skills.items()
        for seed, skill in enumerate(values)
    ]
    for path in paths:
        recipe = path / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("digits-resnet", path.name.split("-")[0]))
    entries = entries_of(*paths)
    groups = grouped(entries)
    assert [(group.name, len(group.entries)) for group in groups] == [("staged", 3), ("plain", 3)]
    tops = [[json.loads((path / "test_metrics.json").read_text())["top1"] for path in part] for part in (paths[:3], paths[3:])]
    assert [group.mean for group in groups] == pytest.approx([mean(t) for t in tops])
    assert [group.spread for group in groups] == pytest.approx([stdev(t) for t in tops])
    tested = welch(*groups)
    assert tested is not None
    errors = [stdev(t) ** 2 / 3 for t in tops]
    error = math.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(e**2 / 2 for e in errors)  # Welch and Satterthwaite
    half = student_t.ppf(0.975, freedom) * error
    assert tested[0] == pytest.approx(
        (mean(tops[0]) - mean(tops[1]), mean(tops[0]) - mean(tops[1]) - half, mean(tops[0]) - mean(tops[1]) + half)
    )
    page = Page(compare(paths, tmp_path / "c.html"))
    assert_self_contained(page)
    assert "the mean of 3 seeds" in page.text
    assert "Welch's t over seeds" in page.text
    assert "Over seeds" in page.text


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, CLASSES) for name in "ab"]
    assert [len(group.entries) for group in grouped(entries_of(*runs))] == [1, 1]


def test_recipes_are_shown_as_a_difference(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, CLASSES, lr=lr, seed=i) for i, (name, lr) in enumerate((("a", 1e-3), ("b", 2e-3)))]
    assert differing(grouped(entries_of(*runs))) == [("stages.1.lr", [0.001, 0.002])]
    text = Page(compare(runs, tmp_path / "c.html")).text
    assert "stages.1.lr" in text
    assert "stages.0.lr" not in text


def test_the_terminal_says_the_same(tmp_path: Path) -> None:
    label, a, b = known(180, 22, 9, 29)
    runs = [fake_run(tmp_path / name, CLASSES, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    (runs[0] / "env.json").write_text(json.dumps({"accelerate": {"processes": 4}}))
    (runs[0] / "outcome.json").write_text(json.dumps({"outcome": "finished", "peak_bytes": 1.5e9}))
    entries = entries_of(answer(runs[0], label, a), answer(runs[1], label, b))
    (cut,) = entries_of(fake_run(tmp_path / "cut", CLASSES, lr=3e-3))
    (cut.run.path / "test_metrics.json").unlink()
    entries.append(compared_run("cut", read_run(cut.run.path)))
    console = Console(width=200, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(rendered(entries))
    text = console.export_text().replace("\u202f", " ").replace("\u00a0", " ")
    for words in (
        "2 min 45 s",
        "84.2 %",
        "p = 0.029",
        "device time",
        "1.5 GB",
        "stages.1.lr",
        "0.003",
        "a gets the most test images right",
    ):
        assert words in text, words


def test_a_run_may_stand_beside_itself(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", CLASSES)
    compare([run, run], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count('class="strip') == 2


def test_the_table_fits_a_terminal_of_80_columns_and_ranks_the_runs(tmp_path: Path) -> None:
    label, a, b = known(180, 22, 9, 29)
    runs = [fake_run(tmp_path / "evidence" / name / "in stages", CLASSES, lr=lr) for name, lr in (("seed-0", 1e-3), ("seed-1", 2e-3))]
    entries = entries_of(answer(runs[0], label, b), answer(runs[1], label, a))
    named = [compared_run(name, e.run) for name, e in zip(names(runs), entries, strict=True)]
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(rendered(named))
    lines = console.export_text().replace("\u202f", " ").replace("\u00a0", " ").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "seed-1/in", "seed-0/in"], lines
    assert not lines[3].strip(), "a run takes one line"
    assert "device time" not in lines[0], "one process: it is the time"


def test_names_and_what_cannot_be_compared(tmp_path: Path) -> None:
    assert names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert names([Path("x/a"), Path("y/a"), Path("y/b")]) == ["x/a", "y/a", "b"]
    assert names([Path("x/z/a"), Path("y/z/a")]) == ["x/z/a", "y/z/a"], "no more of the path than is needed, and no less"
    assert names([Path("x/a"), Path("x/a")]) == ["a", "a"], "one folder twice has one name, and no longer one than alone"
    assert names([Path("/a"), Path("/x/a")]) == ["/a", "x/a"]
    run = fake_run(tmp_path / "a", CLASSES)
    with pytest.raises(UserError, match="two run folders"):
        compare([run], tmp_path / "c.html")
    with pytest.raises(UserError, match="is no run folder, but holds some"):
        compare([run, tmp_path], tmp_path / "c.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        compare([run, tmp_path / "empty"], tmp_path / "c.html")
    several = fake_run(tmp_path / "several", CLASSES)
    recipe = parse((several / "recipe.yaml").read_text(), "of several labels")
    changes = {"data.source": "csv:sets.csv", "data.label_separator": "|", "select": "map"}
    (several / "recipe.yaml").write_text(recipe.override(changes).to_yaml())
    with pytest.raises(UserError, match="sets of labels"):
        compare([run, several], tmp_path / "c.html")


def test_groups_of_seeds_of_one_recipe_name_are_named_by_what_their_runs_share(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / f"seed-{seed}_lr-{lr}", CLASSES, seed=seed, lr=lr) for lr in (0.001, 0.002) for seed in (0, 1)]
    assert [group.name for group in grouped(entries_of(*paths))] == ["lr-0.001", "lr-0.002"]
    alone = [fake_run(tmp_path / name, CLASSES, seed=i % 2, lr=lr) for i, (name, lr) in enumerate((("a", 1), ("b", 1), ("c", 2), ("d", 2)))]
    assert [group.name for group in grouped(entries_of(*alone))] == ["a and 1 more", "c and 1 more"]


def test_the_run_of_a_fit_is_named_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "recipe.yaml").touch()
    assert names([tmp_path / "student" / "run", tmp_path / "teacher"]) == ["student/run", "teacher"]
    assert names([tmp_path / "other" / "run", tmp_path / "teacher"]) == ["run", "teacher"]
