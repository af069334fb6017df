"""Files of a run folder that were damaged after the run wrote them: whoever reads one again is told which, and what helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import made_recipe

from tltrain.cli.main import main
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.evaluation.evaluate import evaluate
from tltrain.evaluation.trained import load_trained
from tltrain.models import weights
from tltrain.runs import manifest
from tltrain.runs.metrics_log import read_rows
from tltrain.runs.record import read_predictions, read_run
from tltrain.training.run import train


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def flip(file: Path, share: float = 0.5) -> None:
    """One bit, at a share of the file."""
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)


def test_everything_that_is_read_again_is_covered(run: Path) -> None:
    names = set(json.loads((run / manifest.NAME).read_text())["files"])
    stages = {f"stages/{stage}/weights.safetensors" for stage in ("0-head", "1-all")}
    assert names == stages | {
        "recipe.yaml", "env.json", "plan.txt", "preview.png", "metrics-000001.jsonl", "weights.safetensors", "test_metrics.json",
        "test_predictions.csv", "mistakes.json", "right_answers.json", "uncertainty/val.safetensors",
    }  # fmt: skip
    assert evaluate(run, None, "test", 64)["notes"] == [], "and what is whole is read as ever"
    read_run(run)


READERS: dict[str, list[Callable[[Path], object]]] = {
    "weights.safetensors": [lambda run: evaluate(run, None, "test", 64), load_trained],
    "stages/1-all/weights.safetensors": [
        lambda run: weights.fingerprint(
            weights.open_once(made_recipe(backbone={"weights": str(run / "stages/1-all/weights.safetensors")}).backbone)
        )
    ],
    "test_metrics.json": [read_run, lambda run: evaluate(run, None, "test", 64)],
    "mistakes.json": [read_run],
    "right_answers.json": [read_run],
    "env.json": [read_run],
    "plan.txt": [read_run],
    "preview.png": [read_run],
    "recipe.yaml": [read_run, load_trained],
    "metrics-000001.jsonl": [read_run, read_rows],
    "test_predictions.csv": [read_predictions],
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("share", [0.4, 0.97])
def test_a_flipped_bit_is_told_with_the_file(name: str, share: float, run: Path) -> None:
    flip(run / name, share)
    for read in READERS[name]:
        with pytest.raises(UserError, match=f"{name} is not as its run wrote it.*backup"):
            read(run)


def test_a_damaged_manifest_is_told_and_can_be_deleted(run: Path) -> None:
    flip(run / manifest.NAME)
    with pytest.raises(UserError, match=r"manifest.json is damaged .*delete it"):
        load_trained(run)
    (run / manifest.NAME).unlink()
    load_trained(run)


def test_what_a_start_writes_anew_is_not_taken_for_damaged_if_it_is_killed(run: Path) -> None:
    """The weights of a stage, and what the end of a run writes: dropped before, covered after."""
    file = run / "weights.safetensors"
    manifest.uncover(run, [file])
    flip(file)
    manifest.check(file)
    manifest.cover(run, [file])
    manifest.check(file)
    flip(file)
    with pytest.raises(UserError, match="not as its run wrote it"):
        manifest.check(file)


def test_a_run_that_goes_on_covers_its_files_anew(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "stopped", "generation": 1}))
    assert train(made_recipe(), RunFlags(folder=run, workers=0))["outcome"] == "finished"
    for name in json.loads((run / manifest.NAME).read_text())["files"]:
        manifest.check(run / name)
    assert "metrics-000002.jsonl" in (run / manifest.NAME).read_text()


DAMAGED: dict[str, bytes] = {
    "recipe.yaml": b"name: \xff\xfe\n",
    "outcome.json": b"[1, 2",
    "env.json": b"[]",
    "metrics-000001.jsonl": b'{"kind": "start", "from": null}\n{"kind": "train", "st\n{"kind": "train"}\n',
    "mistakes.json": b'{"a": 1}',
    "right_answers.json": b'{"a": 1}',
    "test_metrics.json": b"{}",
    "test_predictions.csv": b"id,label\n1,2\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_without_a_manifest_a_damaged_file_is_one_message(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of tltrain 0.1.0 have none."""
    (run / manifest.NAME).unlink()
    (run / name).write_bytes(DAMAGED[name])
    verb = ["compare", str(run), str(run), "--out", str(tmp_path / "page.html")] if name.endswith("csv") else ["report", str(run)]
    assert main(verb) == 2
    told = capsys.readouterr().err
    assert name in told
    assert "Traceback" not in told
    assert "backup" in told


def test_a_last_row_that_was_cut_short_is_left_out(run: Path) -> None:
    (run / manifest.NAME).unlink()
    rows, file = read_rows(run), run / "metrics-000001.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "train", "st')
    assert read_rows(run) == rows


def test_an_evaluation_that_differs_from_the_run_s_own_test_says_so(run: Path) -> None:
    (run / manifest.NAME).unlink()
    file = run / "test_metrics.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"top1": kept["top1"] - 0.2}))
    assert "on the same images" in evaluate(run, None, "test", 64)["notes"][0]
