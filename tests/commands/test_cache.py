"""`tltrain cache`: what it lists, what it computes again, what it deletes, and what it says where it cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_words import mistake
from digit_files import digit_folder

from benchmarks import same, trials
from benchmarks.trials import HEAD, LAST
from tltrain.cache import disk_store, feature_table, image_cache
from tltrain.cache.disk_store import Store
from tltrain.cli.main import main
from tltrain.commands import cache as command
from tltrain.commands.cache_verify import _begin
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import validate
from tltrain.data import open_images
from tltrain.data.views import Preprocess
from tltrain.runs import run_dir
from tltrain.training.experiment import Experiment
from tltrain.training.run import train

STAGES = [
    LAST | {"views": 1, "eval_epochs": 1},
    HEAD | {"steps": 10, "views": 2, "augment": "light", "eval_epochs": 1},  # behind weights that the stage before has trained
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """A cache with what a run of two stages and a teacher stores: logits for each stage, features of train and val for the second."""
    folder = tmp_path_factory.mktemp("filled")
    distill = {"teacher": {"weights": str(finished_run)}, "weight": 0.5}
    spec = validate(trials.recipe(name="taught", distill=distill, stages=STAGES), "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLTRAIN_CACHE", str(folder / "cache"))
        patch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)
        assert train(spec, RunFlags(folder=folder / "run", workers=0, cache="always"))["outcome"] == "finished"
    return folder / "cache"


@pytest.fixture
def root(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its stores, to spoil."""
    shutil.copytree(filled, tmp_path / "cache")
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_table, "SHARD_ROWS", same.SHARD_ROWS)
    return tmp_path / "cache" / "store"


Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Exit code and words of `tltrain cache ...`."""

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["cache", *words])
        captured = capsys.readouterr()
        assert captured.err == ""
        return code, captured.out

    return call


def named(root: Path, kind: str, split: str, augmented: bool) -> str:
    """The one store of a kind, a split and a way to augment."""
    found = [
        s for s in disk_store.stores(root) if s.kind == kind and s.made_by["split"] == split and (s.key["augment"] is not None) == augmented
    ]
    assert len(found) == 1
    return found[0].path.name


def rewritten(root: Path, name: str, key: dict[str, Any] | None = None, made_by: dict[str, Any] | None = None) -> str:
    """A store whose about.json says something else, under the name that goes with it."""
    about = json.loads((root / name / disk_store.ABOUT).read_text())
    about["key"] |= key or {}
    about["made_by"] |= made_by or {}
    (root / name / disk_store.ABOUT).write_text(json.dumps(about))
    (root / name).rename(root / f"{about['kind']}-{disk_store.digest(about['key'])}")
    return f"{about['kind']}-{disk_store.digest(about['key'])}"


def exchange(root: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], shard: int = 0) -> str:
    """Write a shard again with other numbers in it, and the checksum that goes with them."""
    found = next(s for s in disk_store.stores(root) if s.path.name == name)
    file = sorted(found.path.glob("*.safetensors"))[shard]
    tensors = {k: t.clone() for k, t in disk_store.read(file).items()}
    change(tensors)
    file.unlink()
    with Store(root, found.kind, found.key, found.made_by) as opened:
        opened.write(file.name.partition(".")[0], tensors)
    return file.name.partition(".")[0]


def lines(text: str) -> dict[str, list[str]]:
    """What is said of each store."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines()[:-1]:
        found.setdefault(line.split()[0], []).append(line)
    return found


# --- ls


def test_ls_says_what_each_store_holds(root: Path, said: Said) -> None:
    code, text = said("ls")
    assert code == 0
    *rows, total = text.splitlines()
    assert all(re.match(r"(features|logits)-[0-9a-f]{20}  .*  used \d{4}-\d\d-\d\d \d\d:\d\d$", row) for row in rows)
    assert sorted("  ".join(re.split("  +", row)[1:-2]) for row in rows) == [
        "features before head of train (taught, stage head)  2 views  120 rows",
        "features before head of val (taught, stage head)  1 view  143 rows",
        "the teacher's logits of train (taught, stage all)  1 view  60 rows",
        "the teacher's logits of train (taught, stage head)  2 views  120 rows",
    ]
    assert re.fullmatch(rf"4 caches, [\d.]+ KB, in {re.escape(str(root))}", total)


def test_ls_fits_a_terminal_and_its_short_names_are_understood(root: Path, said: Said) -> None:
    described = [command.describe(store) for store in disk_store.stores(root)]
    now = described[-1]["used"] + 120.0
    whole = command.table(described, None, now)
    assert command.table(described, 200, now) == whole, "nothing is cut where there is room"
    head, *rows = command.table(described, 80, now)
    assert head.split() == ["cache", "holds", "rows", "size", "used"]
    assert max(map(len, [head, *rows])) <= 80 < max(map(len, whole))
    assert sorted(row[19:].split("  ")[0] for row in rows)[1] == "before head of val, taught, head"
    assert all(row.endswith(" ago") or row.endswith("now") for row in rows)
    short = rows[0].split()[0]
    assert f"{described[0]['name']}" in said("clear", short)[1]
    assert len(disk_store.stores(root)) == 3


def test_a_beginning_of_several_names_deletes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is the beginning of features-" in mistake(["cache", "clear", "features-"], capsys)
    assert len(disk_store.stores(root)) == 4


def test_ls_for_programs_and_what_is_in_use(root: Path, said: Said) -> None:
    name = named(root, "features", "val", augmented=False)
    found = next(s for s in disk_store.stores(root) if s.path.name == name)
    with Store(root, found.kind, found.key, found.made_by):
        _, text = said("ls", "--json")
        assert len(re.findall("  in use$", said("ls")[1], re.MULTILINE)) == 1
    listed = json.loads(text)
    assert listed["root"] == str(root)
    assert listed["bytes"] == sum(file.stat().st_size for file in root.glob("*/*.safetensors"))
    row = next(row for row in listed["caches"] if row["name"] == name)
    assert {k: v for k, v in row.items() if k not in ("used", "bytes", "run")} == {
        "name": name, "kind": "features", "what": "features before head of val", "recipe": "taught", "stage": "head", "views": 1,
        "rows": 143, "in_use": True, "owner": None,
    }  # fmt: skip
    assert [r["in_use"] for r in listed["caches"]].count(True) == 1
    assert listed["caches"][-1]["name"] == name, "the one unused for longest comes first"


def test_ls_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path))
    assert said("ls") == (0, f"0 caches, 0 B, in {tmp_path / 'store'}\n")
    assert json.loads(said("ls", "--json")[1])["caches"] == []
    assert said("verify") == (0, f"0 caches in {tmp_path / 'store'}, 0 with something wrong\n")
    assert said("clear", "--all")[0] == 0


# --- verify


def test_verify_computes_every_kind_again(root: Path, said: Said) -> None:
    code, text = said("verify", "--rows", "70")
    assert code == 0, text
    assert text.splitlines()[-1] == f"4 caches in {root}, 0 with something wrong"
    ends = sorted(line.split("  ", 1)[1] for line in text.splitlines()[:-1])
    assert ends == [
        "2 shards sound; 60 of 60 rows computed again, 60 equal bit for bit",
        "4 shards sound; 70 of 120 rows computed again, 70 equal bit for bit",
        "4 shards sound; 70 of 120 rows computed again, 70 equal bit for bit",
        "5 shards sound; 70 of 143 rows computed again, 70 equal bit for bit",
    ]


def test_verify_names_a_row_that_differs_by_one_bit(root: Path, said: Said) -> None:
    name = named(root, "features", "train", augmented=True)

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["rows"].view(torch.int32)[5, 3] ^= 1

    shard = exchange(root, name, flip, shard=3)
    assert shard == "v0001-000001"
    code, text = said("verify", name, "--rows", "120")
    assert code == 1
    train_split = open_images(validate(trials.recipe(), "test").data).train
    where = re.escape(f"{train_split.ids[32 + 5]}, view 1, shard {shard}")
    assert re.search(rf"^{name}  {where}: not what is computed now; remove it: tltrain cache clear {name}$", text, re.MULTILINE)
    assert "120 of 120 rows computed again, 119 equal bit for bit" in text
    assert text.endswith("1 with something wrong\n")
    assert said("verify", name, "--rows", "0")[0] == 0, "its checksum is right"
    codes: set[int] = set()
    for seed in range(40):  # half of the rows each time
        codes.add(said("verify", name, "--rows", "60", "--seed", str(seed))[0])
        if len(codes) == 2:
            break
    assert codes == {0, 1}, "other rows are drawn"


def test_verify_removes_a_damaged_shard_which_the_next_run_makes_again(root: Path, said: Said) -> None:
    name = named(root, "logits", "train", augmented=True)
    file = sorted((root / name).glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    code, text = said("verify")
    assert code == 1
    shard = file.name.partition(".")[0]
    assert lines(text)[name] == [
        f"{name}  shard {shard} was damaged, and is removed: the next run that needs it computes it again",
        f"{name}  3 shards sound; 64 of 92 rows computed again, 64 equal bit for bit"
        if shard.endswith("1")
        else f"{name}  3 shards sound; 64 of 88 rows computed again, 64 equal bit for bit",
    ]
    assert not file.exists()
    assert text.endswith("1 with something wrong\n")
    assert said("verify", name)[0] == 0


def test_verify_of_a_store_of_damaged_shards_alone(root: Path, said: Said) -> None:
    name = named(root, "logits", "train", augmented=False)
    for file in (root / name).glob("*.safetensors"):
        file.write_bytes(b"")
    code, text = said("verify", name)
    assert code == 1
    assert text.count("was damaged, and is removed") == 2
    assert "0 shards sound" in text


def test_verify_says_what_it_cannot_compute_again_and_why(root: Path, tmp_path: Path, said: Said) -> None:
    """None of it is the store's fault: exit code 0."""
    train_, val = named(root, "features", "train", augmented=True), named(root, "features", "val", augmented=False)
    made_by = next(s for s in disk_store.stores(root) if s.path.name == val).made_by
    rewritten(root, train_, made_by={"run": str(tmp_path / "gone")})
    other = json.loads(json.dumps(made_by["recipe"]))
    other["stages"][0]["lr"] = 0.77
    rewritten(root, val, made_by={"recipe": other})
    first, second = named(root, "logits", "train", augmented=False), named(root, "logits", "train", augmented=True)
    device = ["cuda", "NVIDIA H200", "bf16", True]
    first, second = (
        rewritten(root, first, key={"device": device}),
        rewritten(root, second, key={"versions": {"torch": "1.0", "numpy": "0.9"}}),
    )
    code, text = said("verify")
    assert code == 0, text
    found = {name: one for name, (one,) in lines(text).items()}
    gone = tmp_path / "gone" / "stages" / "0-all" / "weights.safetensors"
    assert "no row can be computed again here" in found[train_]
    assert f"{gone}, with the weights that stage head began with, is gone" in found[train_]
    assert f"{made_by['run']} holds another run now" in found[val]
    assert "it was made with device ['cuda', 'NVIDIA H200', 'bf16', True], and here is ['cpu'" in found[first]
    assert "it was made with versions {'torch': '1.0', 'numpy': '0.9'" in found[second]
    assert "0 with something wrong" in text


def test_verify_of_a_stage_whose_prefix_no_stage_has_trained_needs_no_run_folder(root: Path, tmp_path: Path, said: Said) -> None:
    """The weights of the start serve as well, wherever the key says that they are the same."""
    deeper = HEAD | {"name": "second", "views": 1}
    spec = validate(trials.recipe(name="two", stages=[HEAD | {"views": 1}, deeper | {"unfreeze": "layer4"}]), "test")
    train(spec, RunFlags(folder=tmp_path / "two", workers=0, cache="always"))
    shutil.rmtree(tmp_path / "two")
    names = [s.path.name for s in disk_store.stores(root) if s.made_by["recipe"]["name"] == "two"]
    assert len(names) == 4
    code, text = said("verify", *names)
    assert code == 0
    assert text.count("equal bit for bit") == 4


def test_verify_sees_that_about_json_is_another_stores(root: Path, said: Said) -> None:
    name = named(root, "features", "val", augmented=False)
    about = json.loads((root / name / disk_store.ABOUT).read_text())
    files.write_json(root / name / disk_store.ABOUT, about | {"key": about["key"] | {"chunk": 7}})
    code, text = said("verify", name)
    assert code == 1
    assert f"about.json does not say what this is; remove it: tltrain cache clear {name}" in text


@pytest.fixture
def photos(root: Path, tmp_path: Path) -> str:
    """A store of base images of a folder of files, beside the others; its name."""
    digit_folder(tmp_path / "photos")
    raw = trials.recipe(name="photos", data={"source": f"folder:{tmp_path / 'photos'}", "size": 32, "resize": 36})
    images, preprocess = open_images(validate(raw, "test").data), Preprocess(32, 36)
    key = image_cache.key(images.fingerprint, "train", preprocess)
    with Store(root, image_cache.KIND, key, {"recipe": raw, "run": str(tmp_path / "run"), "split": "train"}) as opened:
        made = image_cache.ImageCache(opened.path, images.train, preprocess)
        for name, tensors in made.make(made.names()):
            opened.write(name, tensors)
        return opened.path.name


def test_base_images_are_listed_and_decoded_again(photos: str, root: Path, tmp_path: Path, said: Said) -> None:
    row = next(line for line in said("ls")[1].splitlines() if line.startswith(photos))
    assert re.search(r"base images of train \(photos\) +32 rows", row)
    code, text = said("verify", photos)
    assert code == 0
    assert "1 shard sound; 32 of 32 rows computed again, 32 equal bit for bit" in text

    def darken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["pixels"][-1] ^= 1

    exchange(root, photos, darken)
    code, text = said("verify", photos)
    assert code == 1
    assert "31 equal bit for bit" in text
    next((tmp_path / "photos" / "train").rglob("*.png")).unlink()
    code, text = said("verify", photos)
    assert code == 0
    assert "no row can be computed again here: the images, their labels or their splits have changed" in text
    shutil.rmtree(tmp_path / "photos")
    code, text = said("verify", photos)
    assert code == 0
    assert re.search(rf"no row can be computed again here: .*{re.escape(str(tmp_path / 'photos'))}", text)


def test_a_run_stores_its_base_images_and_verify_decodes_them_again(root: Path, tmp_path: Path, said: Said) -> None:
    digit_folder(tmp_path / "photos")
    data = {"source": f"folder:{tmp_path / 'photos'}", "size": 32, "resize": 36, "flip": False}
    spec = validate(trials.recipe(name="photos", data=data, stages=[LAST | {"augment": "light"}]), "test")
    for name, how in (("online", "never"), ("stored", "always")):
        train(spec, RunFlags(folder=tmp_path / name, workers=0, cache="never", cache_images=how))  # type: ignore[arg-type]
    assert trials.differences(tmp_path / "stored", tmp_path / "online") == []
    names = [s.path.name for s in disk_store.stores(root) if s.kind == image_cache.KIND]
    code, text = said("verify", *names)
    assert code == 0
    assert sorted(line.partition("  ")[2] for line in text.splitlines()[:-1]) == [
        "1 shard sound; 12 of 12 rows computed again, 12 equal bit for bit",
        "1 shard sound; 32 of 32 rows computed again, 32 equal bit for bit",
    ]


# --- clear


def test_clear_deletes_what_is_named(root: Path, said: Said) -> None:
    name = named(root, "features", "val", augmented=False)
    code, text = said("clear", name)
    assert code == 0
    assert re.search(rf"^freed   73.6 KB: {name}$", text, re.MULTILINE)
    assert not (root / name).exists()
    assert len(disk_store.stores(root)) == 3
    assert said("clear", "--all")[0] == 0
    assert not list(root.iterdir())


def test_clear_leaves_what_is_in_use(root: Path, said: Said) -> None:
    name = named(root, "features", "val", augmented=False)
    found = next(s for s in disk_store.stores(root) if s.path.name == name)
    with Store(root, found.kind, found.key, found.made_by):
        code, text = said("clear", name)
        assert code == 1, "it was asked for by name"
        assert f"in use  73.6 KB: {name}, which stays: a run has it open" in text
        code, text = said("clear", "--all")
        assert code == 0
        assert text.splitlines()[-1].endswith(f"freed in {root}, 1 in use")
        assert [s.path.name for s in disk_store.stores(root)] == [name]
        assert said("verify", name, "--rows", "3")[0] == 0, "it can be read meanwhile"
    assert said("clear", name)[0] == 0


# --- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cache"], "ls|verify|clear"),
        (["cache", "list"], "list"),
        (["cache", "clear"], "takes names of caches (`tltrain cache ls`), or --all"),
        (["cache", "clear", "features-1", "--all"], "not both"),
        (["cache", "clear", "nothing"], "no cache in"),
        (["cache", "verify", "nothing"], "see `tltrain cache ls`"),
        (["cache", "verify", "--rows", "-1"], "--rows is -1; it must be at least 0"),
        (["cache", "verify", "--rows", "many"], "many"),
    ],
)
def test_mistakes(words: list[str], says: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in mistake(words, capsys)
    assert len(disk_store.stores(root)) == 4


def test_a_name_with_a_slip_is_guessed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = named(root, "features", "val", augmented=False)
    assert f"did you mean {name}?" in mistake(["cache", "clear", f"{name[:-1]}x"], capsys)


def test_the_words_are_read_without_torch() -> None:
    calls = "main(['cache', 'clear']), main(['cache', 'verify', '--rows', '-1'])"
    code = f"import sys; from tltrain.cli.main import main; print({calls}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 2 False", done.stderr


def test_weights_that_a_stage_began_with_are_read_with_their_checksum(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    recipe = run_dir.read_recipe(run)
    images = open_images(recipe.data)
    opened = Experiment.open(recipe, images)
    assert _begin(opened.student, recipe, run, opened.plan, opened.plan[1]) is None
    file = run_dir.stage_weights_file(run, opened.plan[0].name)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1  # other weights, and a whole file of safetensors
    file.write_bytes(content)
    with pytest.raises(UserError, match="its checksum is not the one"):
        _begin(opened.student, recipe, run, opened.plan, opened.plan[1])
