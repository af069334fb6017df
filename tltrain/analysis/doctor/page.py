"""The doctor's page: pictures of what was found, with their file names, pairs side by side. One file without scripts."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from tltrain.analysis.doctor.copies import Leak
from tltrain.analysis.doctor.examine import Diagnosis
from tltrain.analysis.doctor.findings import BLANK, BLURRED, MEANING, OUTLIER, SCORES, THIN, TINY, WRONG, Finding
from tltrain.core.files import in_parallel
from tltrain.runs.report import tables
from tltrain.runs.report.formatting import count, percent, plural
from tltrain.runs.report.html import Html, breakable, el, join, page

SHOWN = 48
"""Findings per problem that the page shows with pictures. The table lists all of them."""
SIDE = 160
"""Longest side of a picture, pixels. With two pictures a finding and ten problems the page stays below 8 MB."""
QUALITY = 75


def doctor_page(diagnosis: Diagnosis, table: str) -> str:
    """The HTML page. table: where the table was written, for the reader."""
    kinds = Counter(finding.problem for finding in diagnosis.findings)
    shown = {problem: [f for f in diagnosis.findings if f.problem == problem][:SHOWN] for problem in MEANING}
    pictures = _pictures(diagnosis, [f for each in shown.values() for f in each])
    edited = join("Look, edit the column ", el("code", "suggestion"), f" of {table}, and train without what is wrong, with ")
    used = el("code", f"--data.exclude {table} --data.relabel {table}", class_="whole")
    rows = [[problem, SCORES[problem], count(kinds[problem])] for problem in MEANING if kinds[problem]]
    return page(
        f"Doctor: {diagnosis.source}",
        el("header", el("h1", f"Doctor: {diagnosis.source}"), el("p", headline(diagnosis), class_="verdict")),
        el("p", looked_at(diagnosis)),
        *(el("p", line) for line in leak_lines(diagnosis.leak, diagnosis.several)),
        el("p", edited, used) if kinds else None,
        tables.table(["Problem", "Score", "Images"], rows, texts=2, class_="said") if kinds else None,
        *(_section(problem, kinds[problem], each, diagnosis, pictures) for problem, each in shown.items() if each),
        _notes(diagnosis.notes),
    )


def headline(diagnosis: Diagnosis) -> str:
    """One sentence: how many images have something that should be looked at."""
    concerned = len({finding.path for finding in diagnosis.findings})
    if not concerned:
        return f"Nothing was found in {plural(diagnosis.num, 'image')}."
    verb = "has" if concerned == 1 else "have"
    return f"{count(concerned)} of {plural(diagnosis.num, 'image')} {verb} something to look at."


def looked_at(diagnosis: Diagnosis) -> str:
    """The images of each split, the number of classes, and what the images were compared by: pixels, or a backbone's features too."""
    splits = ", ".join(f"{count(num)} {name}" for name, num in diagnosis.splits.items())
    by = f"pixels and {diagnosis.backbone}" if diagnosis.backbone is not None else "pixels alone"
    return f"{splits}; {count(len(diagnosis.classes))} {'labels' if diagnosis.several else 'classes'}; by {by}."


def leak_lines(found: Leak | None, several: bool) -> list[str]:
    """The test accuracy, or of several labels mAP, with and without images that have a near-duplicate in train."""
    if found is None:
        return []
    share = percent(found.num_leaked / found.num_test)
    have = "has" if found.num_leaked == 1 else "have"
    text = f"{count(found.num_leaked)} of {plural(found.num_test, 'test image')} ({share}) {have} a near-duplicate in train."
    if found.num_leaked == found.num_test:
        return [f"{text} No test image is left without."]
    figures = f"{percent(found.accuracy)} on all of test, {percent(found.accuracy_without)} without them"
    return [text, f"A ridge head solved on train reaches {'mAP ' if several else ''}{figures}."]


def _section(problem: str, num: int, findings: Sequence[Finding], diagnosis: Diagnosis, pictures: dict[int, str]) -> Html:
    paired = any(finding.other_position is not None for finding in findings)
    more = f" The {SHOWN} of them with the most marked score are shown." if num > SHOWN else ""
    figures = (_figure(finding, diagnosis, pictures) for finding in findings)
    grid = el("div", *figures, class_="examples lit named" if paired else "examples named")
    return el(
        "section", el("h2", f"{problem[0].upper()}{problem[1:]} ({count(num)})"), el("p", MEANING[problem] + more, class_="note"), grid
    )


def _figure(finding: Finding, diagnosis: Diagnosis, pictures: dict[int, str]) -> Html:
    positions = [p for p in (finding.position, finding.other_position) if p is not None]
    names = [finding.path] if finding.other_position is None else [finding.path, finding.other]
    images = (el("img", src=pictures[p], alt=name) for p, name in zip(positions, names, strict=True))
    rest = f" and {finding.other}" if finding.other_position is not None else ""
    return el(
        "figure",
        el("div", *images),
        el("figcaption", el("b", finding.suggestion), el("small", _caption(finding, diagnosis)), _file(finding.path),
           _file(finding.other, "like ") if rest else None),
        title=f"{finding.path}{rest}: {finding.problem}",
    )  # fmt: skip


def _file(path: str, before: str = "") -> Html:
    return el("small", before, breakable(path), class_="path")


def _caption(finding: Finding, diagnosis: Diagnosis) -> str:
    """The line under a picture: its class, and the score of the finding in words."""
    labels, score = diagnosis.labels, finding.score
    own = labels[finding.position]
    if finding.other_position is not None:
        return f"{' and '.join(dict.fromkeys((own, labels[finding.other_position])))}, similarity {score:.3f}"
    words = {
        BLANK: f"{own}, grey values spread by {score:.1f}",
        WRONG: f"is {own}, looks like {finding.other} (margin {score:.2f})",
        OUTLIER: f"{own}, {score:.1f} spreads away",
        BLURRED: f"{own}, {score:.1f} spreads below",
        TINY: f"{own}, {score:.0f} pixels",
        THIN: f"{own}, {score:.1f} to 1",
    }
    return words[finding.problem]


def _pictures(diagnosis: Diagnosis, findings: Sequence[Finding]) -> dict[int, str]:
    """Position to a small JPEG as a data URI."""
    wanted = sorted({p for f in findings for p in (f.position, f.other_position) if p is not None})
    return dict(zip(wanted, in_parallel(lambda position: _uri(diagnosis.read(position)), wanted), strict=True))


def _uri(image: Image.Image) -> str:
    small, content = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(content, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _notes(notes: Sequence[str]) -> Html | None:
    return join(el("h2", "Notes"), *(el("p", note, class_="note") for note in notes)) if notes else None
