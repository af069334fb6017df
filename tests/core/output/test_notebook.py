"""In a notebook: plain text, a line that changes in place, and nothing of it left in what is saved."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from tltrain.core.output import notebook
from tltrain.core.output.console import Console, Terminal
from tltrain.core.output.streams import lasting_output


class Shown(list[str]):
    """What a cell shows: `display` of IPython, as far as it is used."""

    def display(self, content: dict[str, str], raw: bool, display_id: bool) -> SimpleNamespace:
        assert raw
        assert display_id
        self.append(content["text/plain"])
        return SimpleNamespace(update=lambda content, raw: self.append(content["text/plain"]))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    cell = Shown()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=cell.display))
    monkeypatch.setattr(notebook, "UPDATE_S", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # kernels set it
    return cell


def test_a_cell_has_plain_text_and_a_line_that_is_empty_in_the_end(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(enabled=True)
    with console.doing("reading the images"):
        assert shown == ["reading the images"]
    assert shown[-1] == ""
    table = Table("block", "lr")
    table.add_row("head", "0.01")
    console.show(table)
    console.say("bold", style="bold")
    console.open_stage("head", 0, 4)
    console.figures(0.5, 100.0)
    console.step()
    assert shown[-1].startswith("head  step 1/4  loss 0.500 100 img/s")
    console.evaluation({"stage": "head", "epoch": 1.0, "top1": 0.5}, 2.0)
    console.close_stage()
    assert shown[-1] == ""
    text = out.getvalue()
    assert "\x1b" not in text
    assert text.count("block") == 1
    assert "top-1 50.0 %" in text
    kept = io.StringIO()
    Terminal(file=kept, width=40).print(table)
    assert "head" in kept.getvalue(), "plan.txt is written so"


def test_without_a_notebook_there_is_no_such_line() -> None:
    assert not notebook.in_notebook()
    assert Console(enabled=True).notebook is None


def test_a_stream_with_the_descriptor_of_another_is_written_to_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel's stream names the descriptor of its server's terminal."""
    with (tmp_path / "server").open("w") as server:

        class Cell(io.StringIO):
            def fileno(self) -> int:
                return server.fileno()

        cell = Cell()
        monkeypatch.setattr(sys, "stdout", cell)
        with lasting_output():
            print("in the cell", flush=True)
    assert cell.getvalue() == "in the cell\n"
    assert (tmp_path / "server").read_text() == ""


@pytest.mark.slow
def test_a_notebook_trains_and_is_saved_without_control_characters(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [
        "import tltrain, threading",
        f"run = tltrain.train('digits-resnet', smoke=True, folder={str(tmp_path / 'run')!r}, workers=0)",
        f"def again(): tltrain.train('digits-resnet', smoke=True, folder={str(tmp_path / 'second')!r}, workers=0)\n"
        "thread = threading.Thread(target=again); thread.start(); thread.join()",
        "run",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=200).execute()
    outputs: list[Any] = [output for cell in book.cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data", "execute_result"}
    assert all(not output.data["text/plain"] and not output.data["text/html"] for output in outputs if output.output_type == "display_data")
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "\x1b" not in text
    assert "\r" not in text
    assert "IProgress" not in text
    assert text.count("in a thread no signal is heard") == 1
    assert text.count("report  ") == 2
    assert outputs[-1].data["text/plain"].endswith("finished)")
    assert "layer4.0" in (tmp_path / "run" / "plan.txt").read_text()
