"""Predictions of files: the same as the run's own, a row for every file, however odd it is."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_files import digit_folder, digit_image, run_with_weights
from PIL import Image
from rich.cells import cell_len

from tltrain.commands.predict import Columns, predict_files, table, write_csv, write_json
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data.views import Preprocess
from tltrain.evaluation.evaluate import Asked
from tltrain.evaluation.predict import Prediction, evaluation_view, find_files, predict
from tltrain.evaluation.trained import load_trained
from tltrain.training.run import train
from tltrain.uncertainty.conformal import Sets
from tltrain.uncertainty.strangers import Strangers

Made = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run trained on a folder of images, that folder)."""
    from conftest import made_recipe

    root = tmp_path_factory.mktemp("folder")
    images = digit_folder(root / "images")
    recipe = made_recipe(data={"source": f"folder:{images}", "resize": 36, "per_class": None, "eval_limit": None})
    assert train(recipe, RunFlags(folder=root / "run", workers=0))["outcome"] == "finished"
    return root / "run", images


def test_a_folder_gives_the_runs_own_test_predictions(folder_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, images = folder_run
    with (run / "test_predictions.csv").open(encoding="utf-8") as file:
        own = {row["id"]: row for row in csv.DictReader(file)}
    assert predict_files(run, [str(images / "test")], "csv", 1)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {Path(row["path"]).relative_to(images).as_posix() for row in rows} == set(own)
    assert len({row["label"] for row in rows}) > 1
    for row in rows:
        mine = own[Path(row["path"]).relative_to(images).as_posix()]
        assert row["label"] == mine["predicted"]
        assert float(row["confidence"]) == pytest.approx(float(mine["confidence"]), abs=1e-5)


def test_csv_under_another_encoding_names_files_that_exist(
    folder_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What people read may have ~ for a sign that is not there; a program would look for a file of that name."""
    run, images = folder_run
    names = ["caf\u00e9\u2026.png", "a\u2500b.png"]
    for name in names:
        shutil.copy(next((images / "test").rglob("*.png")), tmp_path / name)
    for encoding in ("ascii", "latin-1"):
        written = io.BytesIO()
        out = io.TextIOWrapper(written, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert predict_files(run, [str(tmp_path)], "csv", 1)
        out.flush()
        rows = list(csv.DictReader(io.StringIO(os.fsdecode(written.getvalue()))))
        assert sorted(Path(row["path"]).name for row in rows) == sorted(names)
        assert all(Path(row["path"]).is_file() for row in rows)


def test_the_batch_changes_nothing(folder_run: tuple[Path, Path]) -> None:
    run, images = folder_run
    files = find_files([str(images / "test")], iter(()))
    whole, single = (list(predict(load_trained(run), files, 3, batch)) for batch in (64, 3))
    assert [p.id for p in whole] == [p.id for p in single] == files
    for a, b in zip(whole, single, strict=True):
        assert [name for name, _ in a.top] == [name for name, _ in b.top]
        assert [share for _, share in a.top] == pytest.approx([share for _, share in b.top], abs=1e-5)


def test_the_temperature_changes_probabilities_and_no_class(made_recipe: Made, tmp_path: Path) -> None:
    classes = tuple("abcde")
    plain, warm = (
        load_trained(run_with_weights(tmp_path / f"{t}", made_recipe(data={"size": 32}), classes, temperature=t)) for t in (1.0, 2.5)
    )
    pictures = [digit_image(n) for n in range(5)]
    views = torch.stack([v for p in pictures if isinstance(v := evaluation_view(p, plain.preprocess), torch.Tensor)])
    shares = (plain.chain(views).double() / 2.5).softmax(1)
    for p, row in zip(predict(warm, pictures, top=5), shares, strict=True):
        assert [share for _, share in p.top] == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-6)
        assert p.label == classes[int(row.argmax())]
        assert p.id.isdigit()


def test_images_of_12_bits_have_the_runs_white(made_recipe: Made, tmp_path: Path) -> None:
    recipe = made_recipe(data={"size": 32, "white": 4095})
    trained = load_trained(run_with_weights(tmp_path / "run", recipe, tuple("abcde")))
    plain = digit_image(3).convert("L")
    Image.fromarray((np.asarray(plain).astype(np.uint32) * 4095 // 255).astype(np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        seen = [p.top for p in predict(trained, [tmp_path / "deep.png", opened, plain])]
    assert seen[0] == seen[1] == seen[2]


def odd_files(folder: Path) -> dict[str, Image.Image | None]:
    """Files that are odd to read; the name of each with the plain image a person sees in it, or None where it cannot be read."""
    folder.mkdir()
    seen = digit_image(3).resize((96, 80))
    (folder / "notes.txt").write_text("not an image")
    seen.save(folder / "whole.jpg", quality=95)
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    grey = np.asarray(seen.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    seen.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    sticker = seen.convert("L").convert("RGBA")  # light paper becomes transparent, over a dark colour that must not show
    light = np.asarray(sticker)[..., 0] > 200
    pixels = np.where(light[..., None], np.array([60, 0, 0, 0], np.uint8), np.asarray(sticker))
    Image.fromarray(pixels.astype(np.uint8)).quantize(64).save(folder / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side: turn clockwise to see it upright
    seen.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=95, exif=turned)
    seen.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", seen.size, "black")] * 3, duration=40)
    Image.new("RGB", (1, 1), (200, 30, 30)).save(folder / "pixel.png")
    on_white = Image.fromarray(np.where(light[..., None], 255, np.asarray(sticker)[..., :3]).astype(np.uint8))
    return {
        "notes.txt": None, "whole.jpg": seen, "truncated.jpg": None, "deep.png": seen.convert("L").convert("RGB"), "cmyk.jpg": seen,
        "palette.png": on_white, "turned.jpg": seen, "moving.gif": seen, "pixel.png": Image.new("RGB", (8, 8), (200, 30, 30)),
    }  # fmt: skip


def test_every_odd_file_gets_a_right_row(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    trained = load_trained(folder_run[0])
    seen = odd_files(tmp_path / "odd")
    rows = {Path(p.id).name: p for p in predict(trained, find_files([str(tmp_path / "odd")], iter(())))}
    assert set(rows) == set(seen)
    assert rows["notes.txt"].problem == "not an image of a kind that is read here"
    assert "truncated" in str(rows["truncated.jpg"].problem)
    for name, plain in seen.items():
        if plain is None:
            assert (rows[name].label, rows[name].confidence, rows[name].top) == (None, None, ())
            continue
        view = evaluation_view(tmp_path / "odd" / name, trained.preprocess)
        expected = evaluation_view(plain, trained.preprocess)
        assert isinstance(view, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        off = (view.int() - expected.int()).abs().float()
        assert off.mean() < 4, name  # JPEG and palettes lose a little
        assert rows[name].problem is None
        assert rows[name].label == next(predict(trained, [plain])).label, name


def test_an_opened_image_lies_as_its_file_does(made_recipe: Made, tmp_path: Path) -> None:
    """A camera notes how it was held: the file and the image that somebody opened are turned alike."""
    trained = load_trained(run_with_weights(tmp_path / "run", made_recipe(), tuple("abcde")))
    upright, paths = digit_image(7), []
    for orientation in range(1, 9):
        noted = Image.Exif()
        noted[0x0112] = orientation
        paths.append(tmp_path / f"{orientation}.png")
        upright.save(paths[-1], exif=noted)
    opened = [Image.open(path) for path in paths]
    views = [evaluation_view(path, trained.preprocess) for path in paths]
    for path, image, view in zip(paths, opened, views, strict=True):
        assert isinstance(view, torch.Tensor)
        assert torch.equal(view, torch.as_tensor(evaluation_view(image, trained.preprocess))), path.name
    assert len({view.numpy().tobytes() for view in views if isinstance(view, torch.Tensor)}) == 8
    of_files, of_images = list(predict(trained, paths)), list(predict(trained, opened))
    assert [p.top for p in of_files] == [p.top for p in of_images]


def test_files_folders_and_standard_input(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/c.txt", ".hidden", ".git/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    words = [str(tmp_path), "-", "no-such.png"]
    found = find_files(words, iter(["x y.png\n", "\n", "z.png"]))
    assert [Path(f).name for f in found] == ["a.jpg", "b.png", "c.txt", "x y.png", "z.png", "no-such.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in"):
        find_files([str(tmp_path / "empty")], iter(()))


def test_a_folder_is_predicted_once_however_its_links_go(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    digit_image(3).save(root / "deep" / "a.png")
    (root / "self").symlink_to(".")
    (root / "deep" / "up").symlink_to("../..")
    (root / "again").symlink_to("deep")
    assert [Path(f).name for f in find_files([str(root)], iter(()))] == ["a.png"]


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert evaluation_view(tmp_path / "pipe.png", Preprocess(8, 8)) == "a named pipe, not a file"


def test_tensors_are_images_and_what_is_none_is_refused(folder_run: tuple[Path, Path]) -> None:
    trained = load_trained(folder_run[0])
    image = digit_image(7)
    bytes_ = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    of_file, of_bytes, of_floats = predict(trained, [image, bytes_, bytes_ / 255])
    assert of_file.top == of_bytes.top == of_floats.top
    for wrong in (torch.zeros(1, 3, 8, 8), torch.full((3, 8, 8), 2.0), torch.zeros(3, 8, 8, dtype=torch.int64)):
        with pytest.raises(UserError, match="tensor of"):
            list(predict(trained, [wrong]))
    with pytest.raises(UserError, match="top is 0"):
        list(predict(trained, [image], top=0))


ROWS = [
    Prediction("a, b.png", (("cat", 0.75), ("dog", 0.25))),
    Prediction("d\udcff.png", (), "not an image"),
]


def test_json_and_csv_are_read_back() -> None:
    out = io.StringIO()
    write_json(ROWS, out, Columns(2))
    first, second = json.loads(out.getvalue())
    assert first == {
        "path": "a, b.png", "label": "cat", "confidence": 0.75, "problem": None,
        "top": [{"label": "cat", "confidence": 0.75}, {"label": "dog", "confidence": 0.25}],
    }  # fmt: skip
    assert (second["path"], second["label"], second["problem"]) == ("d\udcff.png", None, "not an image")
    out = io.StringIO()
    write_csv(ROWS, out, Columns(2))
    one, two = csv.DictReader(io.StringIO(out.getvalue()))
    assert (one["path"], one["label"], one["confidence_2"], one["problem"]) == ("a, b.png", "cat", "0.250000", "")
    assert (two["label"], two["label_2"], two["problem"]) == ("", "", "not an image")


UNREAD = Prediction("a.txt", (), "not an image")
ONE = Prediction("a.png", (("cat", 0.75),), shares=np.array([0.75, 0.25]), set=("cat",), strangeness=0.5, decision="answers")
SEVERAL = Prediction("b.png", (("cat", 0.75),), shares=np.array([0.75, 0.625, 0.25]), labels=("cat", "dog"))
FITTED = Asked(sets=[Sets(0.9, 0.5, 20)], strangers=Strangers(np.zeros((2, 3), np.float32), 1.0))


@pytest.mark.parametrize(
    ("read", "columns", "keys"),
    [
        (ONE, Columns(1), ["label", "confidence", "top"]),
        (ONE, Columns(1, ("cat", "dog"), FITTED), ["label", "confidence", "top", "set", "strangeness", "decision", "probabilities"]),
        (SEVERAL, Columns(1, ("cat", "dog", "owl"), labels=True), ["labels", "top", "probabilities"]),
    ],
)
def test_every_object_has_the_same_keys_also_of_what_cannot_be_read(read: Prediction, columns: Columns, keys: list[str]) -> None:
    out = io.StringIO()
    write_json([read, UNREAD], out, columns)
    first, second = json.loads(out.getvalue())
    assert set(first) == set(second) == {"path", "problem", *keys}
    assert {key: second[key] for key in keys} == {key: ([] if key == "top" else None) for key in keys}
    if "probabilities" in keys:
        assert first["probabilities"] == dict(zip(columns.classes, read.shares if read.shares is not None else (), strict=True))


def test_labels_beyond_the_named_classes_keep_their_confidence() -> None:
    head, row, _ = (text.plain for text in table([SEVERAL, UNREAD], None, ("cat", "dog", "owl")))
    assert row.split("  ") == ["b.png", "cat, dog", "75.0, 62.5"]
    assert head.split() == ["file", "class", "sure"], "no class stands behind them"


def test_the_table_is_for_people() -> None:
    head, first, second = (text.plain for text in table(ROWS, 100))
    assert head.split() == ["file", "class", "sure", "then"]
    assert first.split() == ["a,", "b.png", "cat", "75.0", "%", "dog", "25.0"]
    assert second == "d\\xff.png  cannot be read  not an image"
    assert next(text.plain for text in table([], 80)).startswith("file")


LONG = [
    Prediction("photos/2024/summer/DSC_0001.jpg", (("sunflower", 0.5), ("dandelion", 0.3), ("rose", 0.2)), decision="answers"),
    Prediction("photos/2024/summer/a very long name of one.jpg", (("dandelion", 0.4), ("rose", 0.3), ("oak", 0.3)), decision="abstains"),
    Prediction("photos/\u82b1/\u82b1\u82b1.jpg", (("rose", 0.4), ("oak", 0.3)), set=("rose", "oak", "sunflower"), decision="stranger"),
    Prediction("photos/notes.txt", (), "not an image of a kind that is read here, and more words than there is room for"),
]  # fmt: skip


def test_the_table_fits_the_terminal_and_cuts_what_matters_least_first() -> None:
    whole = [text.plain for text in table(LONG, None)]
    assert max(map(cell_len, whole)) > 110
    assert "photos/2024/summer/a very long name of one.jpg" in whole[2], "in a pipe nothing is cut"
    assert "more words than there is room for" in whole[4]
    assert "set: rose, oak, sunflower" in whole[3]
    for width in (100, 80, 60, 40, 30):
        lines = [text.plain for text in table(LONG, width)]
        assert max(map(cell_len, lines)) <= width, width
        starts = {cell_len(line[: line.index(word)]) for line, word in zip(lines[1:4], ("50.0 %", "40.0 %", "40.0 %"), strict=True)}
        assert len(starts) == 1, "columns stand below each other, wide characters too"
    at_80 = [text.plain for text in table(LONG, 80)]
    assert at_80[1].startswith("photos/202\u2026/DSC_0001.jpg ")
    assert "abstains (dandelion?)" in at_80[2]
    assert "none of these (rose?)" in at_80[3]
    assert at_80[1].endswith("dandelion 30.0, +1")
    at_40 = [text.plain for text in table(LONG, 40)]
    assert "sunflower" in at_40[1], "class names are cut last"


def test_a_folder_that_is_no_run_or_has_no_weights_is_refused(made_recipe: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        load_trained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(made_recipe().to_yaml())
    with pytest.raises(UserError, match=r"no weights\.safetensors yet"):
        load_trained(tmp_path)
