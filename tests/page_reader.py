"""Reading a page as a browser does."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "br", "wbr"}


class Page(HTMLParser):
    """What a browser makes of a page: its text, its elements, and whether each is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.style = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag == "wbr":
            self.text = self.text.removesuffix("\n")  # a reader sees one word
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += re.sub(r"[\u202f\u00a0]", " ", data) + "\n"

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """The attributes of every such element."""
        return [a for name, a in self.elements if name == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]


def assert_self_contained(page: Page) -> None:
    """Nothing is loaded and nothing is run."""
    assert not re.search(r"url\(|@import", page.style)
    for tag, attrs in page.elements:
        assert tag not in ("script", "iframe", "object", "embed")
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attrs
        if tag == "link":
            assert attrs["href"] == "data:,"
