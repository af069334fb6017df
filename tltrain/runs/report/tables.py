"""Report elements other than charts: tables, the confusion matrix, the mistakes."""

from __future__ import annotations

import math
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tltrain.runs.report.charts import axis, heat_map
from tltrain.runs.report.formatting import DASH, confusions, count, decimal, percent, tenths
from tltrain.runs.report.html import Html, el, join
from tltrain.runs.report.stats import ends_of

_MOST_CELLS = 30  # classes up to which the confusion matrix is a table with names and counts
_IN_CLASS_ORDER = 12  # classes up to which the per-class table keeps the class list's order
_DEEP = {"right": 0.79, "wrong": 0.89}  # depths from which white is easier to read on the colour than black, by their contrast


def figures(items: Sequence[tuple[str, str, str]]) -> Html:
    """A row of key figures. items: (name, value, note) of each."""
    cells = (el("div", el("dt", name), el("dd", value), el("dd", note, class_="note") if note else None) for name, value, note in items)
    return el("dl", *cells, class_="figures")


def table(head: Sequence[str], rows: Sequence[Sequence[str | None]], texts: int = 1, class_: str = "") -> Html:
    """A table. The first `texts` columns hold text, the others numbers."""
    kinds = ["t" if i < texts else "n" for i in range(len(head))]
    top = el("tr", *(el("th", h, scope="col", class_=k) for h, k in zip(head, kinds, strict=True)))
    body = (el("tr", *(el("td", c, class_=k) for c, k in zip(row, kinds, strict=True))) for row in rows)
    return el("div", el("table", el("thead", top), el("tbody", *body)), class_=f"scroll {class_}".rstrip())


def strip(share: float, low: float, high: float, start: float, stop: float = 1.0, style: str = "s0") -> Html:
    """A share and its interval [low, high] as a mark and a band on a small scale from start to stop, with a line at 0 within it."""

    def at(value: float) -> float:
        return 100 * min(1.0, max(0.0, (value - start) / (stop - start)))

    band = el("i", style=f"left:{at(low):.1f}%;width:{at(high) - at(low):.1f}%")
    zero = el("u", style=f"left:{at(0):.1f}%") if start < 0 < stop else None
    return el("span", band, zero, el("b", style=f"left:{at(share):.1f}%"), class_=f"strip {style}")


def short(classes: Sequence[str], tree: bool) -> list[str]:
    """Names of classes as a narrow column shows them: the last parts of a path in a tree, as many as no other class shares.

    tree: whether the names are paths in a tree of classes (data.depth). Others stay whole, as km/h does.
    """
    if not tree:
        return list(classes)
    split = [name.split("/") for name in classes]
    if any(part.strip() in ("", ".", "..") for parts in split for part in parts):  # no paths in a tree
        return list(classes)
    ends = [["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)] for parts in split]
    times = Counter(end for each in ends for end in each)
    return [next((end for end in each if times[end] == 1), name) for each, name in zip(ends, classes, strict=True)]


def deep(kind: str, depth: float) -> str:
    """The class of a coloured cell: right or wrong, and whether its colour asks for white figures."""
    return f"{kind} deep" if depth > _DEEP[kind] else kind


def per_class(rows: Sequence[Mapping[str, Any]], tree: bool = False) -> Html:
    """Precision, recall and F1 of each class. Many classes are sorted, the worst first. tree: as in `short`."""
    names = dict(zip((str(r["name"]) for r in rows), short([str(r["name"]) for r in rows], tree), strict=True))
    many = len(rows) > _IN_CLASS_ORDER
    shown = sorted(rows, key=lambda r: r["f1"]) if many else rows
    low = max(0.0, axis(min((_ends(r)[0] for r in rows if r["support"]), default=0.0), 1).low)
    cells = []
    for r in shown:
        n = int(r["support"])
        mark = strip(r["recall"], *_ends(r), low) if n else ""
        name = el("span", names[str(r["name"])], title=str(r["name"]))
        cells.append([name, count(n), tenths(r["recall"]) if n else DASH, mark, tenths(r["precision"]), tenths(r["f1"])])
    note = el("p", f"{'Worst first. ' if many else ''}In\u202f%. The strip shows recall with its 95\u202f% interval.", class_="note")
    head = ["Class", "Images", "Recall", f"{100 * low:.0f} to 100\u202f%", "Precision", "F1"]
    return join(note, table(head, cells, class_="tall"))


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a class's recall."""
    return ends_of(row, row["recall"], int(row["support"]))


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], tree: bool = False) -> Html:
    """The confusion matrix: a table of counts, or an image if there are many classes. tree: as in `short`."""
    note = el(
        "p",
        "Rows are the true class, columns the predicted one. The deeper the colour, the larger the share of the row: ",
        el("span", "right", class_="right word"),
        " or ",
        el("span", "wrong", class_="wrong word"),
        ".",
        class_="note",
    )
    if len(classes) > _MOST_CELLS:
        where = "Both run through the class list in its order, from the top left."
        return join(note, el("figure", heat_map(matrix, "Confusion matrix"), el("figcaption", where, class_="note")))
    narrow = max(map(len, classes)) <= 3 or (len(classes) <= 3 and max(map(len, classes)) <= 10)
    cell_px, shown = _cell_px(matrix), short(classes, tree)
    names = (el("th", el("span", text), scope="col", title=name) for text, name in zip(shown, classes, strict=True))
    head = el("tr", el("td"), *names)
    body = (el("tr", el("th", shown[t], scope="row", title=classes[t]), *_cells(row, t, classes)) for t, row in enumerate(matrix))
    kind = f"confusion {'flat' if narrow else 'steep'}"
    grid = el("table", el("thead", head), el("tbody", *body), class_=kind, style=f"--cell:{cell_px}px")
    return join(note, el("div", grid, class_="scroll"))


def confusion_is_wide(matrix: Sequence[Sequence[int]], classes: Sequence[str], tree: bool = False) -> bool:
    """Whether the table of counts asks for more than half of the page."""
    names_px = min(125, 7 * max(map(len, short(classes, tree))) + 15)
    return len(classes) <= _MOST_CELLS and names_px + len(classes) * (_cell_px(matrix) + 2) > 440


def _cell_px(matrix: Sequence[Sequence[int]]) -> int:
    digits = len(str(max(map(max, matrix))))
    return max(26, 8 * digits + 8, min(56, 320 // len(matrix)))


def _cells(row: Sequence[int], true: int, classes: Sequence[str]) -> list[Html]:
    total = sum(row)
    cells = []
    for p, n in enumerate(row):
        if n == 0:
            cells.append(el("td"))
            continue
        depth = math.sqrt(n / total)  # square root, so that rare mistakes are visible
        kind = deep("right" if p == true else "wrong", depth)
        text = f"{classes[true]} taken for {classes[p]}: {n} of {total}"
        cells.append(el("td", str(n), class_=kind, style=f"--share:{100 * depth:.0f}%", title=text))
    return cells


def frequent_mistakes(matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int = 10) -> Html | None:
    """A table of the most frequent pairs of true and predicted class; None if there are no mistakes."""
    rows = [[classes[t], classes[p], count(n), percent(n / sum(matrix[t]), 0)] for n, t, p in confusions(matrix)[:most]]
    return table(["True", "Taken for", "Times", "of class"], rows, texts=2) if rows else None


def examples(items: Sequence[Mapping[str, Any]]) -> Html:
    """Answers as images with captions. Each shows what the network saw, and beside it, where it looked."""
    more = [name for name, key in (("lit", "lit"), ("named", "missed")) if any(key in item for item in items)]
    return el("div", *(_example(item) for item in items), class_=" ".join(["examples", *more]))


def _example(item: Mapping[str, Any]) -> Html:
    label, predicted, name = str(item["label"]), str(item["predicted"]), str(item["id"])
    wrong, several = label != predicted, "missed" in item
    said = f"{label} taken for {predicted}" if wrong else predicted
    if several:
        said = f"{label or 'no label'}, answered {predicted or 'no label'}"
    png = str(item["png"])
    width = int.from_bytes(b64decode(png)[16:20], "big")  # the IHDR chunk of a PNG begins there
    kind = "coarse" if width <= 96 else None
    seen = el("img", src=f"data:image/png;base64,{png}", alt=said, class_=kind)
    if "lit" in item:
        lit = el("img", src=f"data:image/jpeg;base64,{item['lit']}", alt=f"{said}, where it looked", class_=kind)
        seen = el("div", seen, lit)
    lines = [el("b", predicted, class_="class"), el("small", "is ", label, class_="class") if wrong else None]
    lines += [el("small", percent(float(item["confidence"])), " sure")]
    caption = el(
        "figcaption", *(_labels(item) if several else lines), el("small", el("bdi", _file(name)), class_="path" if several else "file")
    )
    return el("figure", seen, caption, title=f"{name}: {said}")


def _labels(item: Mapping[str, Any]) -> list[Html]:
    """The labels that were wrongly said and those that were missed, each with its probability."""
    said = {"said ": item["wrong"], "missed ": item["missed"]}
    return [
        el("small", before, el("b", str(label)), " ", percent(float(share)), class_="class")
        for before, pairs in said.items() for label, share in pairs
    ]  # fmt: skip


def _file(name: str) -> str:
    """The end of a sample's name: a file without its folders. What has no name of its own is a number."""
    end = name.rsplit("/", 1)[-1]
    return f"image {end}" if end.isdecimal() else end


def facts(value: Mapping[str, Any]) -> Html:
    """Nested plain values as a flat list of names and values."""
    return el("dl", *(join(el("dt", k), el("dd", v)) for k, v in _flat(value, "")), class_="facts")


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{name} {k}".strip())]
    if isinstance(value, list):
        return [(name, " ".join(map(str, value)))]
    return [(name, DASH if value is None else str(value))]


def calibration(rows: Sequence[Mapping[str, Any]], ece: float) -> str:
    """The reliability table in one sentence."""
    n = sum(int(r["n"]) for r in rows)
    confidence = sum(r["n"] * r["confidence"] for r in rows if r["n"]) / n
    accuracy = sum(r["n"] * r["accuracy"] for r in rows if r["n"]) / n
    judgement = "overconfident" if confidence > accuracy else "underconfident"
    if abs(confidence - accuracy) < 0.01:
        judgement = "about as confident as it is accurate"
    means = f"Its mean confidence is {percent(confidence)} and its accuracy {percent(accuracy)}"
    return f"{means}: it is {judgement}. The expected calibration error (ECE) is {decimal(ece)}."
