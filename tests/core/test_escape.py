"""Names of others in every output: a list of hard strings through each, read back by what reads it."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import pytest
from fake_run import fake_run
from hard_strings import HARD
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from tltrain.cli import main
from tltrain.commands.predict import Columns, table, write_csv
from tltrain.core import files
from tltrain.core.output import escape
from tltrain.core.output.console import Terminal
from tltrain.evaluation.predict import Prediction
from tltrain.runs.pages.write import write_comparison
from tltrain.runs.report.html import el

STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", HARD)
def test_a_terminal_is_not_steered_and_a_name_begins_no_line(text: str) -> None:
    assert STEERING.search(escape.terminal(text).replace("\t", "")) is None
    assert STEERING.search(escape.line(text)) is None
    assert "\n" not in escape.line(text)
    assert escape.line(escape.line(text)) == escape.line(text)
    assert escape.line("naïve 猫 👩‍🚀") == "naïve 猫 👩‍🚀"


@pytest.mark.parametrize("text", HARD)
def test_whatever_is_drawn_on_a_console_arrives_as_text(text: str) -> None:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, width=200, highlight=False)
    cells = Table()
    cells.add_column(Text(text))
    cells.add_row(Text(text, style="red"))
    console.print(Text(text), cells)
    console.print(text, markup=False)
    assert STEERING.search(re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).replace("\t", "")) is None, "rich's own colours alone are codes"
    rows = io.StringIO()
    for line in table([Prediction(text, ((text, 0.9), (text, 0.1))), Prediction(text, (), text)], None):
        Terminal(file=rows, width=400, highlight=False).print(line, soft_wrap=True)
    assert len(rows.getvalue().splitlines()) == 3, "a name is one line"


@pytest.mark.parametrize("text", HARD)
def test_a_spreadsheet_computes_nothing_and_a_program_reads_the_name_again(text: str) -> None:
    cell = escape.csv_cell(text)
    assert not re.match(r"[=+@\t\r-](?![0-9.]+$)", cell)
    assert escape.from_csv(cell) == text
    out = io.StringIO()
    write_csv([Prediction(text, ((text, 1.0),))], out, Columns(1))
    (row,) = csv.DictReader(io.StringIO(out.getvalue(), newline=""))
    assert (row["path"], row["label"]) == (cell, cell)


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("frame", ["{}, and more", "- class: {}.", "# {}", "{}"])
def test_markdown_shows_the_name_and_nothing_else(text: str, frame: str) -> None:
    page = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    kinds = [token.type for token in page.parse(frame.format("x"))]
    parsed = page.parse(frame.format(escape.markdown(text)))
    if text:
        assert [token.type for token in parsed] == kinds
    said = [child for token in parsed for child in token.children or ()]
    assert {child.type for child in said} <= {"text", "text_special"}
    assert "".join(child.content for child in said) == re.sub("^(- |# )", "", frame).format(escape.line(text).strip()).strip()


@pytest.mark.parametrize("text", HARD)
def test_code_in_markdown_does_not_end_early(text: str) -> None:
    page = MarkdownIt("commonmark")
    inline = [child for token in page.parse(f"- source: {escape.markdown_code(text)}") for child in token.children or ()]
    assert [child.type for child in inline] == ["text", "code_inline"]
    assert inline[1].content.strip() == escape.line(text).strip()
    assert [token.type for token in page.parse(f"{escape.markdown_block(text, 'yaml')}\n\n---")] == ["fence", "hr"]


@pytest.mark.parametrize("text", HARD)
def test_html_has_one_element_with_the_name_as_text_and_attribute(text: str) -> None:
    found: list[tuple[str, list[tuple[str, str | None]]]] = []
    said: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, attrs))

        def handle_data(self, data: str) -> None:
            said.append(data)

    Reader().feed(el("b", text, title=text))
    assert found == [("b", [("title", escape.terminal(text))])]
    assert "".join(said) == escape.terminal(text)


@pytest.mark.parametrize("text", HARD)
def test_a_link_leads_to_the_file_of_that_name(text: str) -> None:
    link = urlsplit(escape.url(f"{text}/report.html"))
    assert (link.scheme, link.netloc, link.query, link.fragment) == ("", "", "", "")
    assert unquote_to_bytes(link.path) == f"{text}/report.html".encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("text", HARD)
def test_json_files_hold_every_name(text: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {text: text})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {text: text}


def test_the_links_of_a_comparison_lead_to_the_reports(tmp_path: Path) -> None:
    for name in ("a%20b#c?d", "javascript:alert(1)"):
        fake_run(tmp_path / name, ["cat", "dog"], n=20).joinpath("report.html").write_text("")
    page = write_comparison([tmp_path / "a%20b#c?d", tmp_path / "javascript:alert(1)"], tmp_path / "out.html", "t").read_text()
    links = re.findall(r'href="([^"]*report[^"]*)"', page)
    assert links == ["a%2520b%23c%3Fd/report.html", "javascript%3Aalert%281%29/report.html"]


def test_a_message_of_a_command_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["report", str(tmp_path / "\x1b[31mrun")]) == 2
    assert "\\x1b[31mrun" in capsys.readouterr().err
