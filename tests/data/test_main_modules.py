"""Which data workers run the caller's main module: those that need it and can find it. No process is started."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tltrain.core.errors import UserError
from tltrain.data import workers
from tltrain.data.workers import _check_main, _EndedError, _how, _lost, refuse_in_worker


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_runs_main", None)


@pytest.mark.parametrize("path", [None, "<stdin>", "/nowhere/script.py"])
def test_a_main_module_without_a_file_is_refused(path: str | None) -> None:
    with pytest.raises(UserError, match=r"notebook, at the prompt or in `python -c`.*workers=0"):
        _check_main({} if path is None else {"init_main_from_path": path})


def test_a_script_is_named_in_the_hint_where_a_worker_ends(tmp_path: Path) -> None:
    (tmp_path / "script.py").touch()
    assert "__main__" not in str(_lost(_EndedError("process 7 ended with code 1"), 2))
    _check_main({"init_main_from_path": str(tmp_path / "script.py")})
    assert 'if __name__ == "__main__":' in str(_lost(_EndedError("process 7 ended with code 1"), 2))
    assert "__main__" not in str(_lost(_EndedError("process 7 was killed by SIGKILL"), 2)), "that has another cause"
    _check_main({"init_main_from_name": "package.module"})


def test_a_training_in_a_worker_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_in_worker()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="__main__"):
        refuse_in_worker()


@pytest.mark.parametrize(("code", "text"), [(-9, "was killed by SIGKILL"), (-99, "was killed by signal 99"), (1, "ended with code 1")])
def test_how_a_worker_ended(code: int, text: str) -> None:
    assert _how(code) == text
