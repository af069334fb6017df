"""What MLflow is given, read back by its own client from the store in the run folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tracked_starts import Start, resumed, train_row, values

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _no_store_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


def _client(monkeypatch: pytest.MonkeyPatch, store: Path) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.MlflowClient(store.as_uri())


def _values(client: Any, run: str, names: tuple[str, ...]) -> Counter[tuple[str, int, float]]:
    return Counter((name, m.step, m.value) for name in names for m in client.get_metric_history(run, name))


def test_after_resumes_each_row_stands_once_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = resumed(tmp_path, "mlflow", wandb_project="pets")
    assert all(line.startswith("MLflow  kept in") for line in said)
    assert not [name for name in os.environ if name.startswith("MLFLOW_")], "what it sets for itself is taken back"
    client = _client(monkeypatch, tmp_path / "mlflow")
    (found,) = client.search_runs([client.get_experiment_by_name("pets").experiment_id])
    assert found.info.run_id == (tmp_path / "mlflow_id").read_text()
    assert _values(client, found.info.run_id, ("train/loss", "val/loss", "val/top1")) == values(tmp_path, "loss", "top1")
    assert found.info.status == "KILLED"


def test_rows_of_two_stages_that_meet_at_a_step_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a stage and the begin of the next have one run_step. A resume repeats both."""
    end, begin = {**train_row(4), "kind": "val"}, {**train_row(4), "kind": "val", "stage_index": 1, "step": 0, "loss": 0.7}
    Start(tmp_path, "mlflow", 1).rows([end, begin, train_row(5)]).close()
    Start(tmp_path, "mlflow", 2, [0, 3, False]).rows([end, begin, train_row(5), train_row(6)]).close()
    client = _client(monkeypatch, tmp_path / "mlflow")
    assert _values(client, (tmp_path / "mlflow_id").read_text(), ("val/loss", "train/loss")) == values(tmp_path, "loss")


def test_recipe_and_files_stand_beside_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Start(tmp_path, "mlflow", 1).rows([train_row(3)]).finished()
    client = _client(monkeypatch, tmp_path / "mlflow")
    found = client.get_run((tmp_path / "mlflow_id").read_text())
    assert found.info.status == "FINISHED"
    assert (found.data.params["stages.0.lr"], found.data.params["batch"], found.data.tags["group"]) == ("0.01", "64", "digits")
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert names == {"plan.txt", "preview.png", "report.html", "recipe.yaml", "test_confusion.csv", "test_mistakes.csv"}
    folder = next((tmp_path / "mlflow").glob("*/*/artifacts"))
    assert (folder / "test_confusion.csv").read_text().splitlines()[:3] == ["actual,predicted,images", "d*g,cat,3", "'=cow,d*g,2"]


def test_a_store_that_does_not_know_the_run_gets_all_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    Start(run, "mlflow", 1).rows([train_row(1), train_row(2)]).close()
    client = _client(monkeypatch, tmp_path / "shared")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "shared").as_uri())
    said = Start(run, "mlflow", 2, [0, 2, False]).rows([train_row(3)]).close()
    assert ["does not know the run" in line for line in said] == [True]
    assert _values(client, (run / "mlflow_id").read_text(), ("train/loss",)) == values(run, "loss")
