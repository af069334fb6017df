"""Reads and waits that end: regular files alone, threads that nobody waits for, locks and downloads with a limit."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tltrain.core import files
from tltrain.core.errors import MachineError, UserError
from tltrain.core.output import progress

Read = Callable[[Path], Any]


@pytest.mark.parametrize("read", [files.read_bytes, files.read_text, files.sha256, files.open_regular])
def test_only_regular_files_are_read(read: Read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        where = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is short
        try:
            opened.bind("socket")
        finally:
            os.chdir(where)
    kinds = {"pipe": "a named pipe", "link": "a named pipe", "socket": "a socket", "": "a folder", "/dev/zero": "a device"}
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=f"{kind}, not a file"):
            read(tmp_path / name)


def test_a_long_call_that_says_nothing_gives_signs_of_life_and_its_error() -> None:
    """A process that is not heard of for --timeout-minutes ends the start of all."""
    heard = threading.Event()
    with progress.heard_by(lambda how_far: heard.set()):
        assert files.waited(lambda: heard.wait(60))
    with pytest.raises(ZeroDivisionError):
        files.waited(lambda: 1 // 0)


def test_results_come_in_order_and_errors_in_their_place() -> None:
    def work(i: int) -> int:
        time.sleep(0.02 * (5 - i))
        if i == 3:
            raise ValueError("three")
        return 10 * i

    found = files.in_parallel(work, range(5))
    assert [next(found) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(ValueError, match="three"):
        next(found)


def test_a_file_that_does_not_answer_is_named() -> None:
    with pytest.raises(MachineError, match="two does not answer"):
        list(files.in_parallel(lambda name: threading.Event().wait() if name == "two" else name, ["one", "two"], limit_s=0.3))


def test_a_time_out_of_the_work_itself_is_its_own() -> None:
    def work(i: int) -> None:
        raise TimeoutError("of the work")

    with pytest.raises(TimeoutError, match="of the work"):
        list(files.in_parallel(work, [1], limit_s=5.0))


def test_a_process_ends_though_a_read_does_not() -> None:
    code = "import threading; from tltrain.core import files; next(files.in_parallel(lambda i: i or threading.Event().wait(), [1, 0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_lock_is_waited_for_with_a_word_and_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(MachineError, match="reads the images of x, and has held"),
            files.locked(tmp_path / "lock", "reads the images of x", 0.3),
        ):
            pass
    assert "waiting for another process, which reads the images of x" in capsys.readouterr().err
    with files.locked(tmp_path / "lock", "reads"):
        pass
    assert capsys.readouterr().err == ""


def test_a_server_that_sends_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    monkeypatch.setattr(files, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights"
        with pytest.raises(OSError, match="timed out"), files.downloading(tmp_path / "lock", "downloads"):
            urllib.request.urlopen(url)
    assert socket.getdefaulttimeout() is None, "outside it is as before"


def test_a_failure_of_the_machine_is_said_as_a_mistake_and_has_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tltrain.cli import main

    for error, code in ((MachineError("the disk does not answer"), 1), (UserError("batch is 0"), 2)):

        def fails(words: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setitem(main.VERBS, "schema", fails)
        assert main.main(["schema"]) == code
        assert capsys.readouterr().err == f"tltrain: {error}\n"
