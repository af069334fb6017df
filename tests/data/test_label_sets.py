"""Several labels an image: how tables write them, how splits keep them, and who refuses them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_files import label_pictures

from tltrain.core.errors import UserError
from tltrain.core.recipe import Data, validate
from tltrain.data import DataSplits, label_weights, open_images
from tltrain.data.multilabel.label_sets import written
from tltrain.data.multilabel.stratify import cut_label_sets, fold_label_sets
from tltrain.data.sources.names import joined
from tltrain.data.splits import folds, keep_per_class

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}


def _opened(source: str, **data: Any) -> DataSplits:
    return open_images(Data(source=source, **data))


def test_a_cell_and_columns_name_the_same_labels(tmp_path: Path) -> None:
    has_N3 = label_pictures(tmp_path)
    cells = _opened(f"csv:{tmp_path}/sets.csv", label_separator="|", **WHOLE)
    assert cells.classes == ("column", "row", "square")
    assert (cells.train.labels == has_N3[:, [1, 0, 2]]).all()
    columns = _opened(f"csv:{tmp_path}/columns.csv", label_columns=("square", "Row", "column"), **WHOLE)
    assert columns.classes == ("square", "Row", "column")
    assert (columns.train.labels == has_N3[:, [2, 0, 1]]).all()
    assert not has_N3.any(1).all()  # an image of none of the classes is an image all the same
    assert written(cells.train.labels[:3], cells.classes) == ["|".join(sorted(text.split("|"))) for text in _cells(tmp_path)[:3]]


def _cells(root: Path) -> list[str]:
    return [line.partition(",")[2] for line in (root / "sets.csv").read_text(encoding="utf-8").splitlines()[1:]]


def test_a_table_without_a_separator_stays_what_it_was(tmp_path: Path) -> None:
    label_pictures(tmp_path)
    lines = [line for line in (tmp_path / "sets.csv").read_text(encoding="utf-8").splitlines() if not line.endswith(",")]
    (tmp_path / "plain.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    images = open_images(Data(source=f"csv:{tmp_path}/plain.csv", **WHOLE))
    assert "row|column" in images.classes
    assert images.train.labels.ndim == 1
    assert "--data.label_separator '|'" in " ".join(images.notes)
    assert joined(("cat", "dog", "cat, black", "Washington, DC", "dog;old")) == ""
    assert "cat;dog" in joined(("cat", "cat;dog", "dog;owl", "owl"))


def test_a_set_is_written_alike_in_any_order_of_classes() -> None:
    assert written(np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]], np.uint8), ("cat", "ant", "bee")) == ["ant|cat", "", "bee|cat"]


@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        ("path,label\n0.png,row||square\n", {"label_separator": "|"}, "line 2: label is 'row||square', with nothing"),
        ("path,label\n0.png,row|row\n", {"label_separator": "|"}, "line 2: label is 'row|row', which names a class twice"),
        ("path,a,b\n0.png,1,-1\n", {"label_columns": ("a", "b")}, "line 2: column b is '-1'; it must be 1"),
        ("path,a\n0.png,1\n", {"label_columns": ("a", "b")}, "has the columns path, a and not b"),
        ("path,label\n0.png,row;a|b\n", {"label_separator": ";"}, "label 'a|b' has a | in it"),
        ("path,label\n,row\n", {"label_separator": "|"}, "line 2: path is empty; every line needs a path"),
    ],
)
def test_a_table_that_says_no_clear_labels_is_refused(tmp_path: Path, table: str, changes: dict[str, Any], said: str) -> None:
    label_pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    with pytest.raises(UserError) as error:
        _opened(f"csv:{tmp_path}/t.csv", **changes)
    assert said in str(error.value)


def test_a_source_without_labels_refuses_them(tmp_path: Path) -> None:
    label_pictures(tmp_path, 8)
    spec = Data(source=f"csv:{tmp_path}/sets.csv", label_separator="|", **WHOLE)
    with pytest.raises(UserError, match="folder:PATH has one class an image"):
        open_images(spec.model_copy(update={"source": f"folder:{tmp_path}"}))
    with pytest.raises(UserError, match="of tables"):
        open_images(spec.model_copy(update={"source": "digits"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"data.balance": "sampler"}, {"data.label_columns": ["a", "b"]},
        {"stages.0.solve": "nearest_mean", "stages.0.lr": None, "stages.0.steps": None},
        {"stages.0.solve": "ridge", "stages.0.lr": None, "stages.0.steps": None, "data.balance": "weights"},
        {"distill": {"teacher": {"weights": "runs/a"}, "loss": "dkd"}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_recipe_refuses_what_it_cannot_do_with_several_labels(changes: dict[str, Any]) -> None:
    recipe = validate({
        "name": "a", "batch": 8, "data": {"source": "csv:a.csv", "label_separator": "|"}, "backbone": {"name": "resnet-tiny"},
        "stages": [{"name": "head", "unfreeze": "head", "steps": 1, "lr": 0.1}],
    }, "test")  # fmt: skip
    with pytest.raises(UserError, match=r"label_separator|label_columns"):
        recipe.override(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_separator": "|", "label_columns": ("a", "b")}, "two ways"),
        ({"label_columns": ("a", "A")}, "name each class once"),
        ({"label_columns": ("a", "split")}, "neither path, split, group"),
    ],
)
def test_labels_are_named_in_one_clear_way(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Data(source="csv:a.csv", **changes)


def test_splits_keep_the_share_of_each_label_and_whole_groups() -> None:
    generator = np.random.default_rng(1)
    label_NK = (generator.random((600, 5)) < (0.5, 0.3, 0.1, 0.03, 0.01)).astype(np.uint8)
    groups = [[3 * g, 3 * g + 1, 3 * g + 2] for g in generator.permutation(200).tolist()]
    mask_N = cut_label_sets(label_NK, groups, 0.2)
    assert 110 <= mask_N.sum() <= 130
    assert all(len(set(mask_N[group].tolist())) == 1 for group in groups)
    share_K = label_NK[mask_N].sum(0) / label_NK.sum(0)
    assert (abs(share_K[:3] - 0.2) < 0.03).all()  # common labels to a few per cent
    assert (label_NK[mask_N].sum(0) > 0).all()
    assert (label_NK[~mask_N].sum(0) > 0).all()
    assert (cut_label_sets(label_NK, groups, 0.2) == mask_N).all()


def test_a_rare_label_is_in_train_and_where_there_are_two_in_val_as_well() -> None:
    label_NK = np.zeros((40, 3), np.uint8)
    label_NK[:20, 0], label_NK[3:5, 1], label_NK[7, 2] = 1, 1, 1
    for order in (range(40), range(39, -1, -1)):
        mask_N = cut_label_sets(label_NK, [[i] for i in order], 0.1)
        assert label_NK[mask_N].sum(0)[1:].tolist() == [1, 0]
        assert mask_N.sum() == 4


def test_a_group_that_holds_all_images_of_a_label_stays_in_train() -> None:
    label_NK = np.zeros((10, 2), np.uint8)
    label_NK[:, 0], label_NK[:2, 1] = 1, 1
    mask_N = cut_label_sets(label_NK, [[0, 1], *([i] for i in range(2, 10))], 0.6)
    assert not mask_N[:2].any()
    assert mask_N.sum() == 6


def test_each_label_weighs_the_same_with_and_without_it() -> None:
    labels = np.array([[1, 0], [0, 0], [0, 1], [0, 1]], np.uint8)
    weights_2K = label_weights(labels)
    np.testing.assert_allclose(weights_2K, np.array([[4 / 6, 1.0], [2.0, 1.0]]))


def test_folds_share_out_each_label_and_keep_groups_whole() -> None:
    generator = np.random.default_rng(1)
    label_NK = (generator.random((600, 5)) < (0.5, 0.3, 0.1, 0.03, 0.01)).astype(np.uint8)
    fold_N = folds(label_NK, np.arange(600), 5, seed=0)
    count_FK = np.stack([label_NK[fold_N == fold].sum(0) for fold in range(5)])
    assert (np.ptp(count_FK, axis=0) <= 2).all()  # the rarest of them, five images, is in each fold
    assert np.ptp(np.bincount(fold_N)) <= 2
    assert (folds(label_NK, np.arange(600), 5, seed=0) == fold_N).all()
    assert (folds(label_NK, np.arange(600), 5, seed=1) != fold_N).any()
    group_N = np.arange(600) // 3
    in_groups_N = folds(label_NK, group_N, 5, seed=0)
    assert len(np.unique(np.stack([group_N, in_groups_N]), axis=1).T) == 200
    assert set(in_groups_N.tolist()) == set(range(5))


def test_no_fold_is_empty_where_one_image_has_each_label() -> None:
    label_NK = np.zeros((4, 3), np.uint8)
    label_NK[0] = 1
    assert sorted(fold_label_sets(label_NK, [[0], [1], [2], [3]], 4).tolist()) == [0, 1, 2, 3]
    assert set(fold_label_sets(np.ones((3, 2), np.uint8), [[0], [1], [2]], 3).tolist()) == {0, 1, 2}


def test_a_label_of_several_groups_is_in_more_than_one_fold_and_large_groups_come_first() -> None:
    label_NK = np.array([[1, 1], [0, 1], [1, 1], [1, 0], [0, 0]], np.uint8)
    for groups in permutations([[0, 1], [2], [3, 4]]):
        fold_N = fold_label_sets(label_NK, groups, 2)
        assert all(len(set(fold_N[label_NK[:, k] > 0].tolist())) == 2 for k in range(2)), groups
    fold_N = fold_label_sets(np.ones((6, 1), np.uint8), [[0], [1], [2], [3, 4, 5]], 2)
    assert np.bincount(fold_N).tolist() == [3, 3]


def test_per_class_keeps_as_many_of_each_label_and_no_image_that_none_needs() -> None:
    label_NK = (np.random.default_rng(2).random((300, 4)) < (0.5, 0.3, 0.2, 0.02)).astype(np.uint8)
    kept = keep_per_class(label_NK, 5, seed=0)
    count_K = label_NK[kept].sum(0)
    assert (count_K >= np.minimum(5, label_NK.sum(0))).all()
    assert (~label_NK[kept].any(1)).sum() == min(5, (~label_NK.any(1)).sum())
    assert len(kept) <= 5 * 5
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert keep_per_class(label_NK, 5, seed=1).tolist() != kept.tolist()


def test_images_that_are_judged_alone_need_not_have_every_label(tmp_path: Path) -> None:
    label_pictures(tmp_path, 4)
    (tmp_path / "t.csv").write_text("path,label\n0.png,row\n1.png,\n", encoding="utf-8")
    spec = Data(source=f"csv:{tmp_path}/t.csv", label_separator="|", **WHOLE)
    assert open_images(spec, to_train=False).classes == ("row",)
    with pytest.raises(UserError, match=r"the images have 1 class \(row\); training needs at least two"):
        open_images(spec)
    (tmp_path / "t.csv").write_text("path,row,square\n0.png,1,0\n1.png,0,0\n", encoding="utf-8")
    spec = Data(source=f"csv:{tmp_path}/t.csv", label_columns=("row", "square"), **WHOLE)
    assert open_images(spec, to_train=False).train.labels.tolist() == [[1, 0], [0, 0]]
    with pytest.raises(UserError, match="no readable training image of class square"):
        open_images(spec)
