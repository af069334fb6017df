"""Long lines on a terminal: broken at spaces, with what is copied whole. In a pipe nothing is broken."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import struct
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
    "line", [f"  tltrain train {PATH} --folder {PATH}", f"page    {PATH} 2/a b.html", "ok    gpu 0       a GPU, 80 GB", "a  b   c"]
)
def test_commands_pages_and_what_fits_stay_as_they_are(line: str) -> None:
    assert wrapping.fitted(line, 80) == line


def test_a_mistake_is_broken_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["train", "digits-resnet", "photoz"]) == 2
    said = capsys.readouterr().err
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
