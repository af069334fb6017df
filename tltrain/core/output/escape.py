"""Names and words of others in our outputs. A class is called what somebody called a folder, and a recipe may come from anywhere: each
output has one function here, that lets such text say what it says and do nothing.

JSON needs none of them: `json` escapes what it must.
"""

from __future__ import annotations

import html as html_
import re
from urllib.parse import quote

# What steers a terminal, turns the order of a line's characters round, ends a line unseen, or is no character at all.
_UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_STEERING, _STEERING_LINE = re.compile(f"[{_UNSEEN}]"), re.compile(f"[\t\n{_UNSEEN}]")
_FORMULA, _KEPT_FORMULA = re.compile("'*[=+@\t\r-]"), re.compile("'+[=+@\t\r-]")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?%?")
_MARKUP = re.compile(r"[\\`*_{}\[\]<>&#|~$!@]")


def terminal(text: str) -> str:
    r"""For a person's terminal or a log: what would steer it is written out, ESC as \x1b; lines stay lines."""
    return _STEERING.sub(_written_out, text)


def line(text: str) -> str:
    r"""As `terminal`, of a name, which must not begin a line of its own: a newline is written out as \n."""
    return _STEERING_LINE.sub(_written_out, text)


def html(text: str) -> str:
    """For HTML, as text or in the quotes of an attribute."""
    return html_.escape(_STEERING.sub(_written_out, text))


def url(path: str) -> str:
    """For a link to a file: relative ones stay relative, whatever their names hold, and none is another scheme's."""
    return quote(path.encode("utf-8", "surrogateescape"), safe="/")


def csv_cell(text: str) -> str:
    """For a table that a person may open in a spreadsheet: what that would compute gets an apostrophe in front. Numbers stay numbers."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_csv(cell: str) -> str:
    """What `csv_cell` was given."""
    return cell[1:] if _KEPT_FORMULA.match(cell) else cell


def markdown(text: str) -> str:
    """For Markdown, inside a line or at its start: no markup, no HTML, no link, no line of its own."""
    shown = _MARKUP.sub(r"\\\g<0>", line(text)).replace("://", "\\://").replace("www.", "www\\.").lstrip()
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", shown)


def markdown_code(text: str) -> str:
    """For Markdown, a word of code inside a line."""
    fence = "`" * (1 + _longest_ticks(text))
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line(text)}{pad}{fence}"


def markdown_block(text: str, language: str) -> str:
    """For Markdown, lines of code."""
    fence = "`" * max(3, 1 + _longest_ticks(text))
    return f"{fence}{language}\n{terminal(text).rstrip()}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte of a file's name that is no UTF-8
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
