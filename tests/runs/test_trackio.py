"""What Trackio is given, read back from its database by its own reader."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tracked_starts import Start, resumed, train_row, val_row, values

pytestmark = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")


@pytest.fixture(autouse=True)
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Trackio with a place of its own: it reads TRACKIO_DIR once, when it is imported."""
    for name in [name for name in os.environ if name.startswith("TRACKIO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "trackio"}
    yield import_module("trackio")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
    sys.modules.update(before)


def _logs(trackio: Any, run: Path) -> list[dict[str, Any]]:
    return trackio.SQLiteStorage.get_logs("tltrain", run.name, run_id=(run / "trackio_id").read_text())


@pytest.mark.parametrize("storage", ["sqlite", "jsonl"])  # the second is how Trackio keeps rows on a network disk
def test_after_resumes_each_row_stands_once_and_none_is_lost(
    storage: str, trackio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", storage)
    run = tmp_path / "run"
    assert all(line.startswith("Trackio kept in") for line in resumed(run, "trackio"))
    trackio.fragments.import_inbox_dir()
    names = ("train/loss", "val/loss", "val/top1")
    assert Counter((name, log["step"], log[name]) for log in _logs(trackio, run) for name in names if name in log) == values(
        run, "loss", "top1"
    )
    assert [(found.id, found.name) for found in trackio.Api().runs("tltrain")] == [((run / "trackio_id").read_text(), "run")]


def test_two_run_folders_of_one_name_are_two_runs(trackio: Any, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        Start(tmp_path / parent / "run", "trackio", 1).rows([train_row(1)]).close()
    Start(tmp_path / "a" / "run", "trackio", 2, [0, 1, False]).rows([train_row(2)]).close()
    assert [len(_logs(trackio, tmp_path / parent / "run")) for parent in ("a", "b")] == [2, 1]


def test_plan_pictures_tables_and_report_stand_beside_the_rows(trackio: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    Start(run, "trackio", 1).rows([val_row(3)]).finished()
    assert capsys.readouterr().out == ""
    shown = {name: value for log in _logs(trackio, run) for name, value in log.items() if isinstance(value, dict)}
    assert {name: value["_type"] for name, value in shown.items()} == {
        "plan": "trackio.markdown", "preview": "trackio.image", "test/confusion": "trackio.table", "test/mistakes": "trackio.table",
        "report": "trackio.html",
    }  # fmt: skip
    assert shown["test/confusion"]["_value"][0] == {"actual": r"d\*g", "predicted": "cat", "images": 3}
    (page,) = (tmp_path / "trackio" / "media").rglob("*.html")
    assert page.read_text() == (run / "report.html").read_text()
    assert {log["step"] for log in _logs(trackio, run)} == {3}
    config = trackio.Api().runs("tltrain")[0].config
    assert config is not None
    assert (config["batch"], config["_Group"]) == (64, "digits")
