"""What W&B is given beside the rows: axes, summary, plan, pictures, mistakes, weights with their teacher. Read from its offline file."""

from __future__ import annotations

import json
import shlex
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tracked_starts import Start, png, resumed, train_row, values
from wandb_files import history, mirrored, offline_records, row

from tltrain.core import files
from tltrain.runs import trackers
from tltrain.runs.trackers import Trackers
from tltrain.runs.trackers.values import MOST_CONFUSIONS


def test_everything_stands_in_the_offline_file(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "w.safetensors").write_bytes(b"student")
    (tmp_path / "t.safetensors").write_bytes(b"teacher")
    Image.new("RGB", (20, 10)).save(tmp_path / "preview.png")
    mirror, _ = mirrored(tmp_path, said)
    mirror.plan("head  <0.01>")
    mirror.preview(tmp_path / "preview.png")
    mirror.log(row("val", 0, 0, loss=2.0, top1=0.1, best=True))
    mirror.log(row("train", 0, 5, loss=1.0))
    mirror.log({**row("val", 1, 10, loss=0.5, top1=0.7, best=True), "run_step": 20})
    mirror.log({**row("val", 1, 20, loss=0.6, top1=0.6, best=False), "run_step": 30})
    mirror.confusion([[3, 1], [0, 4]], ["a", "b"])
    mirror.mistakes([{"id": "x/1.png", "png": png(), "label": "a", "predicted": "b", "confidence": 0.9}])
    mirror.summary({"test/top1": 0.65})
    (tmp_path / "report.html").write_text("<!doctype html><p>The page</p>")
    mirror.report(tmp_path / "report.html")
    mirror.weights(tmp_path / "w.safetensors", "student", (tmp_path / "t.safetensors", "teacher"))
    mirror.close()
    assert ["\nwandb sync " in line for line in said] == [True]
    records = list(offline_records(tmp_path))
    started = next(r.run for r in records if r.HasField("run"))
    assert (started.run_group, started.display_name, started.project) == ("digits", "n", "p")
    assert [json.loads(item.value_json) for item in started.config.update if item.key == "seed"] == [3]
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric") and r.metric.glob_name}
    assert axes["train/*"] == axes["val/*"] == "stages"
    entries = history(tmp_path)
    assert [e["stages"] for e in entries if "stages" in e][:4] == [0.0, 0.5, 1.5, 2.0]
    keys = {str(key) for e in entries for key in e}
    for name in ("plan", "preview", "test/confusion_table", "test/mistakes"):
        assert any(key.startswith(f"{name}/") for key in keys), name
    assert next(e["_step"] for e in entries) == 0
    summary = {u.key: json.loads(u.value_json) for r in records if r.HasField("summary") for u in r.summary.update if u.key}
    assert (summary["best/top1"], summary["best/stage_index"], summary["test/top1"]) == (0.7, 1, 0.65)
    (artifact,) = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model"]
    names = [f"{name}-{files.sha256(tmp_path / file)[:12]}" for name, file in (("student", "w.safetensors"), ("teacher", "t.safetensors"))]
    assert artifact.name == names[0]
    assert json.loads(artifact.metadata)["teacher"] == names[1]
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/test/mistakes*.json")]
    assert tables[0]["columns"] == ["id", "seen", "label", "predicted", "confidence"]
    assert tables[0]["data"][0][2:] == ["a", "b", 0.9]
    assert [p.read_text() for p in tmp_path.glob("wandb/offline-run-*/files/media/html/report*.html")] == ["<!doctype html><p>The page</p>"]
    assert [p.read_text() for p in tmp_path.glob("wandb/offline-run-*/files/media/html/plan*.html")] == ["<pre>head  &lt;0.01&gt;</pre>"]


def test_after_resumes_one_folder_has_each_row_once_and_all_of_them(tmp_path: Path) -> None:
    """`wandb sync` uploads each folder from the begin of the run on, so that a second one overwrites the first."""
    said = resumed(tmp_path, "wandb")
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 1
    assert f"wandb sync {shlex.quote(str(folders[0]))}" == said[-1].splitlines()[-1]
    names = ("train/loss", "val/loss", "val/top1")
    seen = Counter((name, entry["_step"], entry[name]) for entry in history(tmp_path) for name in names if name in entry)
    assert seen == values(tmp_path, "loss", "top1")
    records = list(offline_records(tmp_path))
    best = {u.key: json.loads(u.value_json) for r in records if r.HasField("summary") for u in r.summary.update if u.key}
    assert best["best/step"] == 8, "the summary is that of the whole run"
    assert {record.run.run_id for record in records if record.HasField("run")} == {(tmp_path / "wandb_id").read_text()}
    assert len(list(tmp_path.glob("wandb/replaced/*-offline-run-*/run-*.wandb"))) == 2, "nothing that W&B had written is deleted"


def test_a_start_killed_before_its_rows_were_written_loses_none(tmp_path: Path) -> None:
    Start(tmp_path, "wandb", 1).rows([train_row(1)]).rows([train_row(2), train_row(3)], told=False).close()
    Start(tmp_path, "wandb", 2, [0, 3, False]).rows([train_row(4)]).close()
    assert [entry["_step"] for entry in history(tmp_path) if "train/loss" in entry] == [1, 2, 3, 4]


def test_of_many_classes_only_the_worst_confusions_are_logged(tmp_path: Path) -> None:
    count = 1000
    matrix = [
        [40 if predicted == actual else int((predicted - actual) % count < 6) for predicted in range(count)] for actual in range(count)
    ]
    matrix[7][900] = 9
    mirror, _ = mirrored(tmp_path, [])
    mirror.confusion(matrix, [f"class {k}" for k in range(count)])
    mirror.close()
    (table,) = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/test/confusion*.json")]
    assert table["data"][0] == ["class 7", "class 900", 9]
    assert len(table["data"]) == MOST_CONFUSIONS


class Recorder:
    """In the place of an online run: what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def use_artifact(self, artifact: Any) -> None:
        self.calls.append(("use", artifact.name))

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.calls.append(("log", artifact.name))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def online(tmp_path: Path, said: list[str], run: Recorder) -> Trackers:
    mirror, wandb = mirrored(tmp_path, said)
    mirror.close()
    wandb.run, wandb.online, wandb.at_end = run, True, lambda: None
    said.clear()
    return Trackers({"wandb": lambda: wandb}, said.append)


def test_a_teacher_is_an_input_and_has_the_name_that_its_own_run_gives_it(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"student")
    (tmp_path / "t.safetensors").write_bytes(b"teacher")
    of_teacher, of_student = Recorder(), Recorder()
    online(tmp_path, [], of_teacher).weights(tmp_path / "t.safetensors", "big")
    online(tmp_path, [], of_student).weights(tmp_path / "w.safetensors", "small", (tmp_path / "t.safetensors", "big"))
    assert of_teacher.calls == [("log", of_student.calls[0][1])]
    assert [call for call, _ in of_student.calls] == ["use", "log"]


def test_weights_go_out_only_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"student")
    said: list[str] = []
    mirror, _ = mirrored(tmp_path, said, wandb_weights=False)
    mirror.weights(tmp_path / "w.safetensors", "student", (tmp_path / "none.safetensors", "teacher"))
    mirror.close()
    assert len(said) == 1
    assert [r for r in offline_records(tmp_path) if r.HasField("artifact") and r.artifact.type == "model"] == []


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Recorder):
        def finish(self) -> None:
            asked.set()
            answer.wait()

    said: list[str] = []
    asked, answer = threading.Event(), threading.Event()
    mirror = online(tmp_path, said, Stuck())
    monkeypatch.setattr(trackers, "UPLOAD_S", 0.2)
    mirror.close()  # it returns, and the answer comes only after that
    answer.set()
    assert asked.is_set()
    assert "no answer for 0 s" in said[0]


def test_what_fails_beside_the_rows_is_said_and_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    mirror, wandb = mirrored(tmp_path, said)
    run = wandb.run
    mirror.weights(tmp_path / "none.safetensors", "x")
    mirror.preview(tmp_path / "none.png")
    mirror.close()
    run.finish()
    assert len(said) == 2
    assert "none.safetensors" in said[0]
    assert "kept offline" in said[1]
