"""Long lines on a terminal: broken at spaces, with what is copied whole. In a pipe nothing is broken."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from tltrain.cli.main import main
from tltrain.core.output import wrapping
from tltrain.core.output.console import Console, Terminal

PATH = "/data/" + "p" * 90 + "/photos"
LONG = f"note    the folder {PATH} holds nine classes, and `tltrain train folder-small photos` with --folder auto takes it"


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[io.TextIOWrapper, Callable[[], list[str]]]]:
    """A pseudo terminal: (the end that a program writes to, what reads the lines that were written, without colours)."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read() -> list[str]:
        os.write(writer, b"the end")
        text = b""
        while not text.endswith(b"the end"):  # what was written comes in pieces
            text += os.read(reader, 1 << 16)
        return re.sub(r"\x1b\[\d+m", "", text.decode().removesuffix("the end")).splitlines()

    with open(writer, "w", closefd=False) as stream:
        yield stream, read
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_lines_are_broken_at_spaces_and_what_is_copied_is_whole(width: int) -> None:
    lines = wrapping.fitted(LONG, width).split("\n")
    assert " ".join(line.strip() for line in lines) == LONG.strip()
    assert all(len(line) <= width for line in lines if PATH not in line and "`" not in line)
    for whole in (PATH, "`tltrain train folder-small photos`", "--folder auto"):
        assert any(whole in line for line in lines)
    assert all(line.startswith(" " * 8) for line in lines[1:]), "they go on behind the word at the beginning"


@pytest.mark.parametrize(
    "line",
    [
        f"  tltrain train {PATH} --folder {PATH}",
        f"page    {PATH} 2/a b.html",
        f"absent  resnet18: curl -o {PATH} http://a",
        "ok    gpu 0       a GPU, 80 GB",
        "a  b   c",
    ],
)
def test_commands_pages_and_what_fits_stay_as_they_are(line: str) -> None:
    assert wrapping.fitted(line, 80) == line


@pytest.mark.parametrize("label", ["weights", "classes", "data   ", "cache  ", "abstain", "answers", "against", "student", "network"])
def test_lines_go_on_below_the_text_of_a_label(label: str) -> None:
    first, *others = wrapping.fitted(f"{label} " + "word " * 30, 60).split("\n")
    assert first.startswith(f"{label} word")
    assert others
    assert all(line.startswith("        word") for line in others)


@pytest.mark.parametrize("piece", ["246 KB", "36.3 %", "(1,234 img/s)", "3 min 04 s", "2 h 05 min,"])
def test_a_number_and_its_unit_stand_in_one_line(piece: str) -> None:
    for before in range(20):
        text = f"data    {'x' * (before + 1)} {'words ' * 6}is {piece} of the text that goes on and on"
        assert any(piece in line for line in wrapping.fitted(text, 60).split("\n")), before


def test_a_warning_is_said_as_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    wrapping.say_warnings()
    wrapping.say_warnings()
    with terminal(80) as (stream, read), monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        logging.getLogger("tltrain.data.remote.copies").warning("%s cannot be asked: %s", "http://photos", "word " * 20)
        lines = read()
    assert lines[0].startswith("note    http://photos cannot be asked: word")
    assert len(lines) > 1, "once, in several lines"
    assert all(line.startswith("        word") and len(line) <= 80 for line in lines[1:])


def test_a_mistake_in_a_flag_is_plain_where_the_terminal_has_colours() -> None:
    for wrong, said in {
        "--data.depth 0": "tltrain: data.depth: 0: input should be greater than or equal to 1; see",
        "--data.val_fraction 7": "tltrain: data.val_fraction: 7.0: input should be less than 1; see",
        "--seed 0..1": "tltrain: --seed is '0..1'; it must be a whole number; see",
    }.items():
        with terminal(80) as (stream, read):
            subprocess.run(
                [sys.executable, "-m", "tltrain", "train", "digits-resnet", *wrong.split()],
                stdin=stream, stdout=stream, stderr=stream, check=False,
                env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm-256color"},
            )  # fmt: skip
            assert read() == [said, "         `tltrain train digits-resnet --help`"]


def test_a_mistake_is_broken_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # as shells export it, also to a pipe
    assert main(["train", "digits-resnet", "photoz"]) == 2
    said = capsys.readouterr().err
    monkeypatch.delenv("COLUMNS")
    assert said.count("\n") == 1
    assert len(said) > 160
    with terminal(80) as (stream, read), monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert main(["train", "digits-resnet", "photoz"]) == 2
        lines = read()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines) == said.strip(), "no word is broken"


def test_a_run_says_long_notes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with terminal(60) as (stream, read):
        monkeypatch.setattr(sys, "stdout", stream)
        Console(enabled=True).say(LONG, style="yellow")
        Terminal(highlight=False).print(LONG, markup=False)
        lines = read()
    assert lines == wrapping.fitted(LONG, 60).split("\n") * 2
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    Console(enabled=True).say(LONG)
    assert text.getvalue() == LONG + "\n"
