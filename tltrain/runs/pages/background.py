"""The end of a report: images, plan, methods paragraph, citations, environment, recipe."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence

from tltrain.core.errors import UserError
from tltrain.core.recipe import parse
from tltrain.runs.pages import methods
from tltrain.runs.record import RunRecord
from tltrain.runs.report import tables as parts
from tltrain.runs.report.formatting import count, plural
from tltrain.runs.report.html import Html, el, join

_IN_CLASS_ORDER = 12  # classes up to which the table of images keeps the class list's order


def images(run: RunRecord) -> Html | None:
    """The number of images of each class and split. None for a run of tltrain 0.1, which did not count them."""
    data = run.env.get("data") or {}
    names, by_class = data.get("names"), data.get("by_class")
    if not names or not by_class or "train" not in by_class:
        return None
    order = list(range(len(names)))
    if len(names) > _IN_CLASS_ORDER:
        order.sort(key=lambda c: by_class["train"][c])
    most = max(by_class["train"])
    rows = [[str(names[c]), _bar(by_class["train"][c] / most), *(count(numbers[c]) for numbers in by_class.values())] for c in order]
    word = "label" if run.recipe.data.multilabel else "class"
    table = parts.table([word.capitalize(), "", *by_class], rows, class_="tall balance")
    return el("section", el("h2", "What it learned from"), el("p", _balance(names, by_class, data, word)), table)


def _balance(names: Sequence[str], by_class: Mapping[str, Sequence[int]], sizes: Mapping[str, int], word: str) -> str:
    """sizes: the images of each split; with several labels an image they are fewer, or more, than those of the labels together."""
    train = by_class["train"]
    others = " and ".join(f"{count(sizes.get(split, sum(numbers)))} {split}" for split, numbers in by_class.items() if split != "train")
    text = f"{plural(sizes.get('train', sum(train)), 'training image')} of {plural(len(names), word)}"
    text += f", beside {others} images." if others else "."
    least, largest = min(range(len(train)), key=train.__getitem__), max(range(len(train)), key=train.__getitem__)
    if train[largest] == train[least]:
        return f"{text} Each {word} has {count(train[least])} of them."
    times = train[largest] / max(1, train[least])
    return f"{text} There are {times:.1f} times as many of {names[largest]} as of {names[least]}."


def _bar(share: float) -> Html:
    return el("span", el("i", style=f"left:0;width:{100 * share:.1f}%"), class_="strip bar s0")


def seen(run: RunRecord) -> Html | None:
    """The preview."""
    if run.preview is None:
        return None
    note = "Training images before normalisation: first the evaluation view, then the first augmented views of each stage."
    source = f"data:image/png;base64,{b64encode(run.preview).decode()}"
    width = int.from_bytes(run.preview[16:20], "big")  # the IHDR chunk of a PNG begins there
    image = el("img", src=source, alt="Training images as the network sees them", width=width)
    return el("section", el("h2", "What it sees"), el("p", note, class_="note"), el("div", image, class_="scroll seen"))


def _entries(notes: str) -> Sequence[str]:
    """The entries below the plan's table. Lines that begin with spaces belong to the entry above them."""
    entries: list[str] = []
    for line in notes.splitlines():
        if line[:1].isspace() and entries:
            entries[-1] += f" {line.strip()}"
        elif line:
            entries.append(line)
    return entries


def details(run: RunRecord) -> Html:
    """The plan, and what is looked up: methods, references, environment, recipe."""
    table, _, notes = run.plan.partition("\n\n")
    shown = (el("pre", table, class_="plan"), el("pre", *(el("span", line) for line in _entries(notes)), class_="notes") if notes else None)
    plan = join(el("h2", "The plan"), *shown) if run.plan else None
    rest = {k: v for k, v in (run.outcome or {}).items() if k != "error"}
    data = {name: value for name, value in (run.env.get("data") or {}).items() if name not in ("names", "by_class")}
    facts = [("Environment", {**run.env, **({"data": data} if data else {})}), ("Outcome", rest)]
    return el(
        "section",
        plan or el("h2", "What was run"),
        el("p"),
        el("details", el("summary", "Methods, to copy into a paper"), el("p", methods.paragraph(run))),
        el("details", el("summary", "What to cite"), el("pre", methods.bibtex(run), class_="wrap")),
        *(el("details", el("summary", name), parts.facts(value)) for name, value in facts if value),
        _recipe(run),
    )


def _recipe(run: RunRecord) -> Html:
    """The recipe; of `tltrain fit` and `tltrain distil` as they wrote it, beside the run, with a reason for each line."""
    try:
        text = (run.path.parent / "recipe.yaml").read_text(encoding="utf-8") if run.path.name == "run" else ""
        reasoned = bool(text) and not parse(text, "recipe.yaml", kept=True).differences(run.recipe)
    except (OSError, UnicodeDecodeError, UserError):
        reasoned = False
    if reasoned:
        return el("details", el("summary", "Recipe, with a reason for each line"), el("pre", text), open="open")
    return el("details", el("summary", "Recipe"), el("pre", run.recipe.to_yaml()))
