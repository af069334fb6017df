"""Builds HTML with escaping by default: every str is escaped unless it is an `Html`."""

from __future__ import annotations

from importlib.resources import files

from tltrain.core.output import escape, wrapping

# Content security policy: the page may load nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Escaped markup. Any other string is text that still has to be escaped."""

    __slots__ = ()


def el(name: str, *children: str | None, **attributes: str | float | None) -> Html:
    """An element. Attributes are escaped, and so are children that are not Html. Children and attributes that are None are left out.

    An attribute's trailing underscore is dropped and inner ones become hyphens: `class_` is class, `aria_label` is aria-label.
    """
    attrs = "".join(f' {_attribute(k)}="{escape.html(str(v))}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{attrs}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Concatenate children; those that are not Html are escaped."""
    return Html("".join(c if isinstance(c, Html) else escape.html(c) for c in children if c is not None))


def breakable(name: str) -> Html:
    """A name, all of it in sight: it is broken behind its folders and words before it is broken elsewhere."""
    return Html("<wbr>".join(map(escape.html, wrapping.name_parts(name))))


def page(title: str, *body: str | None) -> str:
    """A whole HTML document with its style sheet inside."""
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
