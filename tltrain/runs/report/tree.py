"""Classes in a tree, named by their paths such as animals/birds/owl: how answers fare at each level, and at each node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tltrain.runs.report.charts import axis
from tltrain.runs.report.formatting import DASH, count, percent, plural, tenths
from tltrain.runs.report.html import Html, el, join
from tltrain.runs.report.stats import ends_of
from tltrain.runs.report.tables import strip, table

SIGN = "/"
"""Between the levels of a class's name."""

Ends = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
"""(which samples (N,), which of them are a hit (N,)) -> `ends` of the share, as a row holds it where samples have groups."""


def figures(classes: Sequence[str], label_N: np.ndarray, predicted_N: np.ndarray, ends: Ends) -> dict[str, Any]:
    """Accuracy at each level and node of the tree of classes, ready for JSON. Class names are paths in the tree.

    levels: for each level from the top, `top1`, the share of answers whose path is that of the true class down to there, and `begin`,
    the number of mistakes that are right at the level above. nodes: for each folder, those above first, `n` images of its classes, of
    which `right` were answered with one of its classes, and `exact` with their own. same_parent: mistakes whose class has the true parent;
    classes at the top have none.
    """
    everything_N, exact_N = np.ones(len(label_N), bool), label_N == predicted_N
    levels, nodes, above_N = list[dict[str, Any]](), list[dict[str, Any]](), everything_N
    for level in range(1, max(name.count(SIGN) for name in classes) + 2):
        paths = [SIGN.join(name.split(SIGN)[:level]) for name in classes]  # a class that lies higher is its own
        known = list(dict.fromkeys(paths))
        of_K = np.array([known.index(path) for path in paths])
        node_N, right_N = of_K[label_N], of_K[label_N] == of_K[predicted_N]
        row = {"level": level, "nodes": len(known), "top1": float(right_N.mean()), "begin": int((above_N & ~right_N).sum())}
        levels.append({**row, **ends(everything_N, right_N)})
        for k, path in enumerate(known):
            if path.count(SIGN) + 1 == level:
                among_N = node_N == k
                counts = {"n": int(among_N.sum()), "right": int(right_N[among_N].sum()), "exact": int(exact_N[among_N].sum())}
                nodes.append({"path": path, "classes": int((of_K == k).sum()), **counts, **ends(among_N, right_N)})
        above_N = right_N
    parents = [name.rpartition(SIGN)[0] for name in classes]
    parent_K = np.array([parents.index(parent) for parent in parents])
    has_parent_K = np.array([parent != "" for parent in parents])
    same = int((~exact_N & has_parent_K[label_N] & (parent_K[label_N] == parent_K[predicted_N])).sum())
    return {"levels": levels, "same_parent": same, "nodes": sorted(nodes, key=lambda node: str(node["path"]).split(SIGN))}


def section(test: Mapping[str, Any]) -> Html | None:
    """The part of a page on the levels and nodes of a tree. None for a test without them."""
    tree = test.get("tree")
    if not tree:
        return None
    n = int(test["n"])
    by_level = el("div", el("h3", "By level"), _levels(tree["levels"], n))
    by_node = el("div", el("h3", "By node"), _nodes(tree["nodes"]))
    return el("section", el("h2", "The tree of classes"), el("p", sentence(tree, n)), el("div", by_node, by_level, class_="pair long"))


def sentence(tree: Mapping[str, Any], n: int) -> str:
    """Where the mistakes are, in words."""
    wrong = _num_wrong(tree, n)
    if not wrong:
        return "No answer is wrong at any level."
    first = f"{percent(float(tree['levels'][0]['top1']))} of the answers are right at the first level"
    return f"{first}. Of {plural(wrong, 'mistake')}, {count(int(tree['same_parent']))} stay inside the same parent."


def _num_wrong(tree: Mapping[str, Any], n: int) -> int:
    return n - round(float(tree["levels"][-1]["top1"]) * n)


def inside(tree: Mapping[str, Any], n: int) -> str:
    """The part of the mistakes that stay inside the same parent."""
    wrong = _num_wrong(tree, n)
    return percent(tree["same_parent"] / wrong, 0) if wrong else DASH


def line(tree: Mapping[str, Any]) -> str:
    """The accuracy at each level, for a terminal."""
    return ", ".join(f"level {row['level']} {100 * row['top1']:.1f} %" for row in tree["levels"])


def _levels(levels: Sequence[Mapping[str, Any]], n: int) -> Html:
    low = max(0.0, axis(min(ends_of(row, row["top1"], n)[0] for row in levels), 1).low)
    rows: list[list[str | None]] = [
        [
            str(row["level"]),
            count(row["nodes"]),
            tenths(row["top1"]),
            strip(row["top1"], *ends_of(row, row["top1"], n), low),
            count(row["begin"]),
        ]
        for row in levels
    ]
    note = "An answer is right at a level if it names the right node there. A mistake begins where it first does not. In\u202f%."
    head = ["Level", "Nodes", "Right", f"{100 * low:.0f} to 100\u202f%", "Mistakes begin"]
    return join(el("p", note, class_="note"), table(head, rows))


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[str | None]] = []
    for node in nodes:
        path, n = str(node["path"]), int(node["n"])
        indent = f"padding-left:{1.2 * path.count(SIGN):.1f}em"
        name = el("span", path.rpartition(SIGN)[2], style=indent, title=path)
        several = node["classes"] > 1
        share = node["right"] / n if n else 0.0
        mark = strip(share, *ends_of(node, share, n), 0.0) if n else ""
        exact = (tenths(node["exact"] / n) if n else DASH) if several else ""
        rows.append([el("b", name) if several else name, count(n), tenths(share) if n else DASH, mark, exact])
    note = (
        "Right: answered with a class of the node. Exact: with their own class, where a node holds several. In\u202f%; the strip shows "
        "right with its 95\u202f% interval."
    )
    return join(el("p", note, class_="note"), table(["Node", "Images", "Right", "0 to 100\u202f%", "Exact"], rows, class_="tall"))


def compared(tests: Sequence[tuple[str, Mapping[str, Any]]]) -> Html | None:
    """The accuracy of runs at each level, side by side. tests: (name, test) of each. None if none has levels."""
    known = [(name, test["tree"], int(test["n"])) for name, test in tests if test.get("tree")]
    if not known:
        return None
    most = max(len(tree["levels"]) for _, tree, _ in known)
    rows: list[list[str | None]] = []
    for name, tree, n in known:
        levels = tree["levels"]
        cells = [_with_ends(row["top1"], *ends_of(row, row["top1"], n)) for row in levels]
        rows.append([name, *cells, *([DASH] * (most - len(levels))), inside(tree, n)])
    head = ["Run", *(f"Level {level}" for level in range(1, most + 1)), "Mistakes inside the parent"]
    note = "Right at a level: the answer names the right node of the tree of classes there."
    return el("section", el("h2", "By level"), el("p", note, class_="note"), table(head, rows, class_="wide"))


def _with_ends(share: float, low: float, high: float) -> Html:
    return join(percent(share), el("small", f"{100 * low:.1f}\u00a0to\u00a0{100 * high:.1f}\u202f%", class_="below"))
