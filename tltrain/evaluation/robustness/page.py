"""corruptions.html: accuracy under each corruption, how it falls with the severity, and what an image looks like under it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from tltrain.data.corruptions import KINDS
from tltrain.data.corruptions.views import CELLS, CLEAN, Cell, CorruptedViews
from tltrain.evaluation.robustness.figures import Difference, Figures, Row, head_of_shares, title
from tltrain.runs.report import tables
from tltrain.runs.report.charts import Axis, Line, axis, line_chart
from tltrain.runs.report.formatting import percent, plural, signed, tenths
from tltrain.runs.report.html import Html, el, join, page
from tltrain.runs.report.stats import RESAMPLES, Interval

SEEN_PX = 224
"""Side of the example images at most."""


def corruptions_page(name: str, about: str, figures: Figures, examples: Html) -> str:
    """The page of one run. examples: of `examples_of`."""
    return page(
        f"{name} under corruptions",
        el(
            "header",
            el("h1", f"{name} under corruptions"),
            el("div", about, class_="soft"),
            el("p", verdict(figures), class_="verdict"),
        ),
        el("section", el("h2", "Accuracy"), el("div", _heat(figures), _means(figures), class_="pair")),
        _curves(figures),
        examples,
        _method(figures),
    )


def verdict(figures: Figures) -> str:
    """The result in one sentence or two."""
    mean, clean = figures.overall.mean, figures.clean
    right = "have all labels right" if figures.several else "are right"
    head = f"{percent(mean.value)} {right} on average over the corruptions, against {percent(clean.value)} of the clean images"
    head += f" (95\u202f% intervals {_ends(mean)} and {_ends(clean)})."
    if len(figures.rows) < 2:
        return head
    worst, best = (choose(figures.rows, key=lambda row: row.mean.value) for choose in (min, max))
    return (
        f"{head} {title(worst.name)} costs the most ({percent(worst.mean.value)}), {_inside(best)} the least ({percent(best.mean.value)})."
    )


def _inside(row: Row) -> str:
    """Its title within a sentence."""
    text = title(row.name)
    return text if text == "JPEG" or text.startswith("Gaussian") else text.lower()


def _ends(interval: Interval) -> str:
    return f"{100 * interval.low:.1f}\u00a0to\u00a0{100 * interval.high:.1f}\u202f%"


def _heat(figures: Figures) -> Html:
    """A row for each corruption, a column for each severity; the deeper the colour, the more is right."""
    severities = sorted(figures.overall.by_severity)
    rows = [*figures.rows, *([figures.overall] if len(figures.rows) > 1 else [])]
    head = el("tr", el("td"), *(el("th", el("span", str(s)), scope="col") for s in severities))
    body = (
        el("tr", el("th", "All, mean" if row.name == "all" else title(row.name), scope="row"), *(_cell(row, s) for s in severities))
        for row in rows
    )
    grid = el("table", el("thead", head), el("tbody", *body), class_="confusion flat shares")
    what = "Images with all labels right" if figures.several else "Right answers"
    text = f"{what} in\u202f%, by severity. Clean: {percent(figures.clean.value)}. The deeper the colour, the more is right."
    return el("div", el("p", text, class_="note"), el("div", grid, class_="scroll"))


def _cell(row: Row, severity: int) -> Html:
    share = row.by_severity[severity].value
    said = f"{title(row.name)} {severity}: {percent(share)}, {_ends(row.by_severity[severity])}"
    return el("td", tenths(share), class_=tables.deep("right", share), style=f"--share:{100 * share:.0f}%", title=said)


def _means(figures: Figures) -> Html:
    rows = [Row("clean", {}, figures.clean), *figures.rows, *([figures.overall] if len(figures.rows) > 1 else [])]
    scale = axis(min(row.mean.low for row in rows), max(row.mean.high for row in rows))
    low, high = max(0.0, scale.low), min(1.0, scale.high)
    shown = [
        [
            {"all": "All, mean", "clean": "Clean"}.get(row.name, title(row.name)),
            tables.strip(*row.mean, low, high),
            join(tenths(row.mean.value), el("small", f"{100 * row.mean.low:.1f} to {100 * row.mean.high:.1f}", class_="below")),
            "" if row.name == "clean" else signed(row.mean.value - figures.clean.value),
        ]
        for row in rows
    ]
    head = ["Corruption", f"{100 * low:.0f} to {100 * high:.0f}\u202f%", figures.right, "Points"]
    note = el("p", "The mean of the severities with its 95\u202f% interval, and how it differs from the clean images.", class_="note")
    return el("div", note, tables.table(head, shown))


def _curves(figures: Figures) -> Html:
    """A chart for each kind of corruption, all with one axis."""
    values = [interval.value for row in figures.rows for interval in row.by_severity.values()] + [figures.clean.value]
    y = axis(min(values), max(values))
    y = Axis(max(0.0, y.low), min(1.0, y.high), [t for t in y.ticks if -1e-9 <= t <= 1 + 1e-9])
    charts = []
    for kind, names in KINDS.items():
        rows = [row for row in figures.rows if row.name in names]
        lines = [Line(title(row.name), _points(figures, row), f"s{i}", dots=True) for i, row in enumerate(rows)]
        if lines:
            charts.append(line_chart(kind.capitalize(), lines, y, lambda v: f"{100 * v:.4g}", x_label="severity", x_top=5))
    note = el(
        "p",
        f"{head_of_shares(figures.several).removesuffix(', %')}, in\u202f%. All charts have one axis; 0 is the clean image.",
        class_="note",
    )
    return el("section", el("h2", "How it falls with the severity"), note, el("div", *charts, class_="pair"))


def _points(figures: Figures, row: Row) -> list[tuple[float, float]]:
    return [(0.0, figures.clean.value), *((float(s), row.by_severity[s].value) for s in sorted(row.by_severity))]


def examples_of(views: CorruptedViews, position: int, cells: Sequence[Cell]) -> Html:
    """One image of the split, clean and under each of the cells."""
    names = list(dict.fromkeys(cell.name for cell in cells if cell != CLEAN))
    severities = sorted({cell.severity for cell in cells if cell != CLEAN})
    clean = _image(views, position, CLEAN)
    rows = [
        el(
            "tr",
            el("th", title(name), scope="row"),
            el("td", clean),
            *(el("td", _image(views, position, Cell(name, s))) for s in severities),
        )
        for name in names
    ]
    head = el("tr", el("td"), *(el("th", text, scope="col") for text in ("clean", *map(str, severities))))
    grid = el("div", el("table", el("thead", head), el("tbody", *rows), class_="looks"), class_="scroll")
    note = el("p", f"{views.split.ids[position]}, as the network sees it, by severity.", class_="note")
    return el("section", el("h2", "What they look like"), note, grid)


def _image(views: CorruptedViews, position: int, cell: Cell) -> Html:
    image, file = Image.fromarray(views.view(position, CELLS.index(cell)).permute(1, 2, 0).numpy()), io.BytesIO()
    small = image.width <= 96
    if image.width > SEEN_PX:
        image = image.resize((SEEN_PX, SEEN_PX), Image.Resampling.BOX)
    image.save(file, "PNG" if small else "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    said = "clean" if cell == CLEAN else f"{title(cell.name)} {cell.severity}"
    return el("img", src=f"data:image/{'png' if small else 'jpeg'};base64,{data}", alt=said, title=said, class_="coarse" if small else None)


def _method(figures: Figures) -> Html:
    lines = (
        f"Each of {plural(figures.num_images, 'image')} is corrupted after it was resized and cropped, and before it is normalised. The "
        "random numbers of a corruption follow from data.seed, the image's name, the corruption and the severity: every run of one data "
        "set meets the same ones. Kinds and strengths follow ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261); the code and "
        "the snow are our own, and lengths grow with the image. So the figures compare runs with each other, not with published ones.",
        f"95\u202f% intervals: Wilson's for one severity; for means the bootstrap with {RESAMPLES:,} resamples of the images, each with "
        "all of its answers."
        if figures.num_groups is None
        else f"The images lie in {plural(figures.num_groups, 'group')} of images that are alike. 95\u202f% intervals: Wilson's for as many "
        "images as the groups are worth.",
    )
    return el("section", el("h2", "How it was measured"), *(el("p", line, class_="note") for line in lines))


def against_page(names: tuple[str, str], rows: Sequence[Difference], num_images: int, unlike: str, several: bool) -> str:
    """The page of two runs on the same images under corruptions. unlike: as `figures.unlike`. several: as of `head_of_shares`."""
    first, second = names
    scale = max(abs(end) for row in rows for end in (row.gain.low, row.gain.high)) or 0.01
    shown = [
        [
            {"all": "All, mean", "clean": "Clean"}.get(row.name, title(row.name)), tenths(row.first), tenths(row.second),
            signed(row.gain.value), tables.strip(*row.gain, -scale, scale),
            f"{signed(row.gain.low)} to {signed(row.gain.high)}", "< .001" if row.p < 0.001 else f"{row.p:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = [
        head_of_shares(several),
        first,
        second,
        "Difference",
        f"\u2212{100 * scale:.0f} to +{100 * scale:.0f}",
        "95\u202f% interval",
        "p",
    ]
    tests = len([row for row in rows if row.name not in ("clean", "all")])
    same = f"corruptions of the same kinds, whose pixels are not the same ({unlike})" if unlike else "the same corruptions"
    chance = f"Of {tests} such tests, about one in twenty has p < .05 by chance alone. " if tests > 1 else ""
    note = (
        f"On the same {plural(num_images, 'image')} under {same}, in points of accuracy, {first} minus {second}. Intervals: the "
        f"bootstrap over images or groups of them, with all of their answers; p: the sign-flip test over the same. "
        f"{chance}They cover the choice of images, not of the seed."
    )
    return page(
        f"{first} and {second} under corruptions",
        el("header", el("h1", f"{first} and {second} under corruptions"), el("p", against_verdict(names, rows, several), class_="verdict")),
        tables.table(head, shown, class_="wide"),
        el("p", note, class_="note under"),
    )


def against_verdict(names: tuple[str, str], rows: Sequence[Difference], several: bool) -> str:
    """The difference over all corruptions in one sentence."""
    overall = rows[-1]
    better, worse = names if overall.gain.value >= 0 else names[::-1]
    high, low = sorted((overall.first, overall.second), reverse=True)
    of, right = ("all labels right on ", "") if several else ("", " right")
    if high == low:
        return f"Under corruptions {better} and {worse} get {of}the same share{right}, {percent(high)}."
    judged = "the difference may be luck" if overall.p >= 0.05 else "more than the luck of these images explains"
    low_end, high_end = sorted(
        (overall.gain.low, overall.gain.high) if overall.gain.value >= 0 else (-overall.gain.low, -overall.gain.high)
    )
    ends = f"{signed(low_end)} to {signed(high_end)} points"
    return (
        f"Under corruptions {better} gets {of}{percent(high)}{right} on average, against {percent(low)} for {worse}; {judged} "
        f"(95\u202f% interval of the difference {ends})."
    )
