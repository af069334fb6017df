"""Markup that escapes by default: text is plain until `el` makes an element of it."""

from __future__ import annotations

from importlib.resources import files

from tltrain.core.output import escape

# A page loads nothing: the browser itself is told so.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup, already escaped. Every other string is text."""

    __slots__ = ()


def el(name: str, *children: str | None, **attributes: str | float | None) -> Html:
    """An element. Children that are None are left out, those that are no Html are escaped, and so is every attribute.

    `class_` means class, `aria_label` means aria-label; an attribute of None is left out.
    """
    attrs = "".join(f' {_attribute(k)}="{escape.html(str(v))}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{attrs}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Children one after the other, text escaped."""
    return Html("".join(c if isinstance(c, Html) else escape.html(c) for c in children if c is not None))


def page(title: str, *body: str | None) -> str:
    """A whole document with its style inside."""
    style = (files("tltrain.runs.report") / "page.css").read_text(encoding="utf-8")
    head = join(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        el("title", title),
        el("style", Html(style)),
    )
    return "<!doctype html>\n" + el("html", el("head", head), el("body", el("main", *body)), lang="en") + "\n"


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")
