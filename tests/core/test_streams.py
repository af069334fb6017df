"""Training does not depend on its output: the reader may go away, and the disk under a log may be full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest
from fake_run import fake_run
from rich.spinner import Spinner

from tltrain.cli import main
from tltrain.core.output.streams import ESCAPED, READABLE, Lasting
from tltrain.runs.report.formatting import DASH, signed

TRAIN = ["train", "digits-resnet", "--cache", "never", "--cache-images", "never", "--workers", "0"]


@contextmanager
def broken_pipe() -> Iterator[TextIO]:
    """The end of `| head` after head has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with open_quietly(writer) as stream:
        yield stream


@contextmanager
def open_quietly(file: int | str) -> Iterator[TextIO]:
    stream = open(file, "w")  # noqa: SIM115  closing it may fail, which is what the tests are about
    try:
        yield stream
    finally:
        with suppress(OSError):
            stream.close()


def full_disk() -> object:
    return open_quietly("/dev/full")


@pytest.mark.parametrize("where", [broken_pipe, full_disk])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_finishes_though_nobody_can_hear_it(where: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with where() as stream:  # type: ignore[operator]
        monkeypatch.setattr(sys, name, stream)
        assert main.main([*TRAIN, "--smoke", "--folder", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_whose_reader_went_away_stops_and_saves_as_any_other(tmp_path: Path) -> None:
    """As with `| tee log` and Ctrl-C, which ends tee as well."""
    words = [sys.executable, "-m", "tltrain", *TRAIN, "--stages.1.epochs", "1000", "--folder", str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while b"epoch" not in (line := process.stdout.readline()) or b"top-1" not in line:
            assert line, "it ended by itself"
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "stopped"


@pytest.mark.parametrize("verb", ["schema", "recipes"])
def test_a_full_disk_under_standard_output_is_named(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open_quietly("/dev/full") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.main([verb]) == 1
    assert capsys.readouterr().err == "tltrain: standard output cannot be written: No space left on device\n"


def test_a_reader_that_has_read_enough_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with broken_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.main(["schema"]) == 1
    assert capsys.readouterr().err == ""


def test_a_disk_that_has_room_again_gets_the_later_lines(tmp_path: Path) -> None:
    """What was refused is gone; it does not stand in the way of what comes next."""
    with (tmp_path / "log").open("w") as stream, Path("/dev/full").open("w") as full:
        kept = os.dup(stream.fileno())
        lasting = Lasting(stream)
        os.dup2(full.fileno(), stream.fileno())
        print("lost", file=lasting, flush=True)
        os.dup2(kept, stream.fileno())
        print("kept", file=lasting, flush=True)
        os.close(kept)
    assert (tmp_path / "log").read_text() == "kept\n"


def test_a_log_in_another_encoding_takes_every_name(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        print("café \udcff", file=Lasting(stream))
    assert (tmp_path / "log").read_text() == "caf\\xe9 \\udcff\n"


def test_our_own_signs_have_others_where_the_encoding_lacks_them() -> None:
    """`tltrain compare` had shown 98.9\\u202f% in a terminal without Unicode, in lines that were too wide, and its spinner \\u280b."""
    text = f"98.9\u202f% (97.2\u00a0to\u00a099.6\u202f%) {signed(-0.01)} {DASH} \u2026 caf\u00e9 \udcff\u2026"
    assert text.encode("ascii", READABLE) == b"98.9 % (97.2 to 99.6 %) -1.0 - ~ caf\\xe9 \xff~"
    assert text.encode("ascii", ESCAPED) == b"98.9 % (97.2 to 99.6 %) -1.0 - ~ caf\\xe9 \\udcff~"
    assert "\u202f\u2026".encode("utf-8", READABLE) == "\u202f\u2026".encode()
    frames = [frame.encode("ascii", READABLE).decode() for frame in Spinner("dots").frames]
    assert set(frames) == set("|/-\\")


def test_compare_is_as_wide_without_unicode(tmp_path: Path) -> None:
    runs = [str(fake_run(tmp_path / name, ["a", "b"], seed=seed)) for seed, name in enumerate(("one", "two"))]
    plain, ascii_only = (
        subprocess.run(
            [sys.executable, "-m", "tltrain", "compare", *runs, "--out", str(tmp_path / "page.html")], capture_output=True, check=True,
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "200"},
        ).stdout.decode()
        for encoding in ("utf-8", "ascii")
    )  # fmt: skip
    assert "\u202f" in plain
    assert "\\u" not in ascii_only
    assert [*map(len, ascii_only.splitlines())] == [*map(len, plain.splitlines())]


def test_a_terminal_without_unicode_gets_every_text(tmp_path: Path) -> None:
    """As under LC_ALL=C: what cannot be encoded had ended `tltrain ls` and `predict` with a stack trace."""
    code = "import sys; from tltrain.cli.main import main; main(['launch']); print('\\u00fc \\udcff'); sys.stdout.flush()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"train RECIPE ~\n" in done.stdout
    assert done.stdout.splitlines()[-1] == b"\\xfc \xff", "file names keep their bytes"
