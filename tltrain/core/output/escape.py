"""Escaping of untrusted text, one function for each output format: terminal, HTML, URL, CSV, Markdown.

Class names come from folder names and recipes may come from anywhere, so neither may act as control codes, markup or formulas.
JSON needs no function here: `json` escapes by itself.
"""

from __future__ import annotations

import html as html_
import re
from urllib.parse import quote

# Control characters, bidirectional overrides, invisible line separators, and lone surrogates.
_INVISIBLE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL, _CONTROL_OR_NEWLINE = re.compile(f"[{_INVISIBLE}]"), re.compile(f"[\t\n{_INVISIBLE}]")
_FORMULA, _ESCAPED_FORMULA = re.compile("'*[=+@\t\r-]"), re.compile("'+[=+@\t\r-]")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?%?")
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&#|~$!@]")


def terminal(text: str) -> str:
    r"""For a terminal or a log: control characters are escaped, ESC as \x1b. Newlines and tabs stay."""
    return _CONTROL.sub(_escape_character, text)


def line(text: str) -> str:
    r"""As `terminal`, for a name inside a line: newlines and tabs are escaped too."""
    return _CONTROL_OR_NEWLINE.sub(_escape_character, text)


def html(text: str) -> str:
    """For HTML, as text or as a quoted attribute."""
    return html_.escape(_CONTROL.sub(_escape_character, text))


def url(path: str) -> str:
    """For a link to a file: percent-encoded. A relative path stays relative, and a colon cannot begin a URL scheme."""
    return quote(path.encode("utf-8", "surrogateescape"), safe="/")


def csv_cell(text: str) -> str:
    """For a CSV cell: text that a spreadsheet would run as a formula gets an apostrophe in front. Numbers stay numbers."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_csv(cell: str) -> str:
    """The inverse of `csv_cell`."""
    return cell[1:] if _ESCAPED_FORMULA.match(cell) else cell


def markdown(text: str) -> str:
    """For Markdown text in one line: markup, HTML, links and newlines are escaped."""
    escaped = _MARKUP.sub(r"\\\g<0>", line(text)).replace("://", "\\://").replace("www.", "www\\.").lstrip()
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", escaped)


def markdown_code(text: str) -> str:
    """For Markdown: inline code."""
    fence = "`" * (1 + _longest_ticks(text))
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line(text)}{pad}{fence}"


def markdown_block(text: str, language: str) -> str:
    """For Markdown: a fenced code block."""
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}{language}\n{terminal(text).rstrip()}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _escape_character(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte of a file name that is not UTF-8
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(match[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
