"""Charts as inline SVG that stretches with the page. Text is HTML on top of it, so its size does not depend on the width.

Line widths do not scale with the drawing (`vector-effect`). A dot is a line of length zero with round ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tltrain.runs.report.formatting import compact
from tltrain.runs.report.html import Html, el, join

Point = tuple[float, float]
COLOURS = 8
"""Of curves, s0 to s7 in the style sheet."""
_SHORT = 16
"""Percent of the width that the name of a stage gets at least, if it is the last."""


@dataclass(frozen=True)
class Line:
    """One curve. A point whose y is not finite leaves a gap."""

    label: str
    """The legend's text; empty for no legend entry."""
    points: Sequence[Point]
    style: str
    """CSS class of its colour: s0 to s7."""
    dots: bool = False
    """Whether each point is marked, for curves of few points."""


@dataclass(frozen=True)
class Span:
    """A range of the x axis with a name above it: a stage."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Axis:
    """Maps values to drawing coordinates from 0 to 1000."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(value)
        else:
            low, high = self.low, self.high
        return round(1000 * (value - low) / (high - low), 1)


def axis(low: float, high: float, about: float = 5, step_least: float = 0.0) -> Axis:
    """An axis that covers [low, high] and ends on ticks. It has `about` round ticks, at least `step_least` apart."""
    if high - low <= max(1e-12, 1e-6 * max(abs(low), abs(high))):  # practically one value
        high = low + (abs(low) if abs(low) > 1e-12 else 1)
    rough = max((high - low) / about, step_least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)])


def uneven(values: Sequence[float]) -> bool:
    """Whether positive values lie so far apart that a linear axis would press most of them onto its foot."""
    return min(values) > 0 and max(values) > 30 * min(values)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis between the powers of ten that enclose [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    return Axis(10.0**first, 10.0**last, [10.0**i for i in range(first, last + 1)], log=True)


def line_chart(
    title: str,
    lines: Sequence[Line],
    y: Axis,
    y_text: Callable[[float], str],
    *,
    x_label: str,
    x_top: float,
    spans: Sequence[Span] = (),
    best: tuple[Point, str] | None = None,
) -> Html:
    """Curves over an x axis from 0 to x_top, with a legend. best: a point to mark with a ring, and its legend text."""
    top = max(x_top, 1)
    about = top if top <= 6 else 4  # every one of few steps, such as severities from 0 to 5
    x = Axis(0, top, [t for t in axis(0, top, about=about, step_least=1).ticks if t <= top])
    drawn = [*_grid(x, y), *_edges(spans, x)]
    keys = [_key(line.style, line.label) for line in lines if line.label and (len(lines) > 1 or best)]
    if best:
        (bx, by), text = best
        drawn += [_stroke(f"M{x(bx)} {1000 - y(by):.1f}h0", style) for style in ("ring", "hole")]
        keys.append(el("span", el("i", class_="ring"), text))
    drawn += [_curve(line, x, y) for line in lines]
    legend = el("span", *keys, class_="legend") if keys else None
    texts = [*_tick_texts(x, y, compact, y_text), *_names(spans, x)]
    plot = el("div", _svg(title, drawn), *texts, class_="plot named" if spans else "plot")
    return el("figure", el("figcaption", el("b", title), legend), plot, el("p", x_label, class_="axis"), class_="chart")


@dataclass(frozen=True)
class Mark:
    """A point with an interval of its y, and a short text beside it."""

    text: str
    x: float
    y: float
    low: float
    high: float
    style: str
    """CSS class of its colour: s0 to s7."""


def mark_chart(
    title: str,
    marks: Sequence[Mark],
    x: Axis,
    y: Axis,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    *,
    x_label: str,
    keys: Sequence[tuple[str, str]],
    edge: tuple[Sequence[Point], str],
) -> Html:
    """Single points with intervals. keys: (style, text) of the legend. edge: a dashed line over some of them, and its legend text."""
    line, meaning = edge
    drawn = [*_grid(x, y), _stroke("M" + "L".join(f"{x(px)} {1000 - y(py):.1f}" for px, py in line), "ideal")]
    for m in marks:
        drawn += [
            _stroke(f"M{x(m.x)} {1000 - y(m.low):.1f}V{1000 - y(m.high):.1f}", f"{m.style} whisker"),
            _stroke(f"M{x(m.x)} {1000 - y(m.y):.1f}h0", f"{m.style} dot"),
        ]
    names = [el("span", m.text, class_="mark", style=f"left:{x(m.x) / 10:.2f}%;bottom:{y(m.y) / 10:.2f}%") for m in marks]
    legend = el("span", *(_key(style, text) for style, text in keys), _key("ideal", meaning), class_="legend")
    plot = el("div", _svg(title, drawn), *_tick_texts(x, y, x_text, y_text), *names, class_="plot")
    return el("figure", el("figcaption", el("b", title), legend), plot, el("p", x_label, class_="axis"), class_="chart")


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Means over runs of equal length, so that at most `most` points remain. A run with a value that is not finite stays a gap."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def reliability_chart(bins: Sequence[tuple[float, float, float, float, float]], which: str = "") -> Html:
    """The reliability diagram: accuracy over confidence. which: appended to the title.

    bins: (confidence, accuracy, low and high end of the accuracy's 95 % interval, share of the images) of each bin that is not empty.
    """
    unit = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1])
    drawn = [*_grid(unit, unit), _stroke("M0 1000L1000 0", "ideal")]
    for confidence, accuracy, low, high, share in bins:
        at = unit(confidence)
        dot = _stroke(f"M{at} {1000 - unit(accuracy)}h0", "s0 dot", width=4 + 9 * math.sqrt(share))
        drawn += [_stroke(f"M{at} {1000 - unit(low)}V{1000 - unit(high)}", "s0 whisker"), dot]
    texts = _tick_texts(unit, unit, _whole_percent, _whole_percent)
    plot = el("div", _svg("Accuracy over confidence", drawn), *texts, class_="plot square")
    keys = el("span", el("span", el("i", class_="key ideal"), "perfect calibration"), class_="legend")
    head = el("figcaption", el("b", f"Accuracy over confidence{which}, %"), keys)
    return el("figure", head, plot, el("p", "confidence, %", class_="axis"), class_="chart narrow")


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f}"


def heat_map(matrix: Sequence[Sequence[int]], label: str) -> Html:
    """The confusion matrix of many classes as an image. Eight shades show a cell's share of its row; right and wrong differ in colour."""
    shades: dict[str, list[str]] = {}
    for t, row in enumerate(matrix):
        for p, n in enumerate(row):
            if n:
                shade = math.ceil(8 * math.sqrt(n / sum(row)))
                shades.setdefault(f"{'right' if t == p else 'wrong'} shade{shade}", []).append(f"M{p} {t}h1v1h-1z")
    paths = [el("path", d="".join(cells), class_=name) for name, cells in sorted(shades.items())]
    size = len(matrix)
    return el("svg", *paths, viewBox=f"0 0 {size} {size}", class_="heat", role="img", aria_label=label)


def _svg(label: str, drawn: Sequence[Html]) -> Html:
    return el("svg", *drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", role="img", aria_label=label)


def _stroke(d: str, style: str, width: float | None = None) -> Html:
    return el("path", d=d, class_=style, style=None if width is None else f"stroke-width:{width:.1f}px")


def _grid(x: Axis, y: Axis) -> list[Html]:
    lines = "".join(f"M0 {1000 - y(t)}H1000" for t in y.ticks)
    marks = "".join(f"M{x(t)} 1000v12" for t in x.ticks)
    return [_stroke(lines, "grid"), _stroke(marks, "grid")]


def _edges(spans: Sequence[Span], x: Axis) -> list[Html]:
    return [_stroke(f"M{x(s.start)} 0V1000", "edge") for s in spans[1:]]


def _names(spans: Sequence[Span], x: Axis) -> list[Html]:
    return [el("span", s.label, class_="name", title=s.label, style=_place(s, x, i, len(spans))) for i, s in enumerate(spans)]


def _place(span: Span, x: Axis, index: int, num: int) -> str:
    """Where the name of a span stands: above it. That of a short last one ends at the right edge, so that it can be read."""
    start, width = x(span.start) / 10, (x(span.stop) - x(span.start)) / 10
    if 0 < index == num - 1 and width < _SHORT:
        return f"right:0;max-width:{_SHORT}%"
    before_last = index == num - 2 and start + width > 100 - _SHORT
    return f"left:{start:.2f}%;width:{max(0.0, 100 - _SHORT - start) if before_last else width:.2f}%"


def _tick_texts(x: Axis, y: Axis, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[Html]:
    xs = [el("span", x_text(t), class_="xt", style=f"left:{x(t) / 10:.2f}%") for t in x.ticks]
    return [*xs, *(el("span", y_text(t), class_="yt", style=f"bottom:{y(t) / 10:.2f}%") for t in y.ticks)]


def _curve(line: Line, x: Axis, y: Axis) -> Html:
    path, pen = [], "M"
    dots = []
    for px, py in line.points:
        if not math.isfinite(py):
            pen = "M"
            continue
        at = f"{x(px)} {1000 - y(py):.1f}"
        path.append(f"{pen}{at}h0")  # h0 draws a point that stands between two gaps
        dots.append(f"M{at}h0")
        pen = "L"
    drawn = _stroke("".join(path), f"{line.style} line")
    return join(drawn, _stroke("".join(dots), f"{line.style} dot")) if line.dots else drawn


def _key(style: str, label: str) -> Html:
    return el("span", el("i", class_=f"key {style}"), label)
