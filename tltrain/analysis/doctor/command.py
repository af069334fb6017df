"""`tltrain doctor SOURCE`: examines the images, prints a summary, and writes the page and the table."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tltrain.analysis.at_hand import SHIPPED, at_hand, named
from tltrain.analysis.doctor.examine import Diagnosis, examine
from tltrain.analysis.doctor.findings import MEANING, table
from tltrain.analysis.doctor.page import doctor_page, headline, leak_lines, looked_at
from tltrain.analysis.probe.command import words
from tltrain.core import files
from tltrain.core.arguments.words import source_of
from tltrain.core.errors import Parser, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output import escape
from tltrain.core.output.console import Console
from tltrain.core.recipe import Backbone, Recipe, validate

PIXELS = "none"
"""What --backbone is called where only pixels are looked at."""
NAMED = 2
"""Files that the summary names for a problem."""


def data_doctor(argv: Sequence[str]) -> int:
    """Look at every image: copies, wrong labels, outliers, blank, blurred and tiny ones. Writes a page and a table."""
    arguments = _parser().parse_args(argv)
    source = source_of(arguments.source)
    if source is None:
        raise UserError(f"{arguments.source} is no folder, no CSV file and no source, such as folder:photos or csv:photos.csv")
    _check_free(arguments.csv)
    console = Console(enabled=not arguments.json)
    backbone = _backbone(arguments, console)
    columns = words(arguments.label_columns or "") or None
    labels = {"label_separator": arguments.label_separator, "label_columns": columns}
    recipe = recipe_of(source, backbone, arguments.exclude, arguments.relabel, labels)
    diagnosis = examine(recipe, RunFlags(), console, backbone is not None)
    _write(arguments.csv, "--csv", table(diagnosis.findings))
    _write(arguments.out, "--out", doctor_page(diagnosis, str(arguments.csv)))
    if arguments.json:
        print(json.dumps(plain(diagnosis), indent=1))
    else:
        _show(diagnosis, arguments, console)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="tltrain doctor", description=data_doctor.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a folder, a CSV file, or a source such as folder:photos")
    parser.add_argument(
        "--backbone", metavar="NAME", help="a network whose features are looked at; none: pixels alone (default: what is here)"
    )
    parser.add_argument("--weights", metavar="FILE", help="its weights (default: those its family recommends)")
    parser.add_argument("--label-separator", metavar="MARK", help="several labels an image: what parts them in a cell, such as '|'")
    parser.add_argument("--label-columns", metavar="A,B", help="several labels an image: columns of 1 and 0, one for each")
    parser.add_argument("--exclude", metavar="FILE", help="as data.exclude of a recipe: leave these out")
    parser.add_argument("--relabel", metavar="FILE", help="as data.relabel of a recipe: give these another class")
    parser.add_argument("--out", type=Path, default=Path("doctor.html"), help="the page (default: doctor.html)")
    parser.add_argument("--csv", type=Path, default=Path("doctor.csv"), help="the table; a new file (default: doctor.csv)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    return parser


def _check_free(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists, and may hold what you decided about each image; give another --csv, or remove it")


def _backbone(arguments: Namespace, console: Console) -> Backbone | None:
    """The network to ask: the one that was named, else a usual one that is here. None: pixels alone. Says which, and why."""
    name, weights = arguments.backbone, arguments.weights
    if name == PIXELS:
        if weights is not None:
            raise UserError(f"--weights is {weights}, and --backbone none looks at pixels alone; drop one")
        return None
    if name is not None and weights is not None:
        return named(f"{name}={weights}").spec
    if name is not None or weights is not None:
        return named(name or weights).spec
    found = next((candidate for candidate in at_hand().found if candidate.name not in SHIPPED), None)
    if found is None:
        console.say(
            "network no pretrained one is here: pixels alone. --backbone NAME also\n        finds wrong labels and outliers", "yellow"
        )
        return None
    console.say(f"network {found.name}, which is here; another: --backbone NAME")
    return found.spec


def recipe_of(
    source: str, backbone: Backbone | None, exclude: str | None = None, relabel: str | None = None, labels: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe with the default splits of these images, which training with its defaults draws too. backbone: None for pixels alone.

    labels: data.label_separator and data.label_columns, of images with several labels.
    """
    data = {"source": source, "exclude": exclude, "relabel": relabel, **(labels or {})}
    network = (backbone or Backbone(name="resnet-tiny")).model_dump()
    stage = {"name": "head", "unfreeze": "head", "steps": 1, "lr": 1e-3}
    return validate({"name": "doctor", "batch": 32, "data": data, "backbone": network, "stages": [stage]}, f"doctor of {source}")


def _write(path: Path, flag: str, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another place with {flag}") from error


def _show(diagnosis: Diagnosis, arguments: Namespace, console: Console) -> None:
    """The summary at 80 columns: a line for each problem, with the first files."""
    for note in diagnosis.notes:
        console.say(f"data    {note}", "yellow")
    console.say(f"data    {looked_at(diagnosis)}")
    console.say(f"\n{headline(diagnosis)}")
    if diagnosis.findings:
        console.show(_summary(diagnosis))
    for line in leak_lines(diagnosis.leak, diagnosis.several):
        console.say(f"\n{line}")
    console.say(f"\npage    {arguments.out}\ntable   {arguments.csv}")
    if diagnosis.findings:
        console.say(
            f"next    look at the page, edit the column suggestion of the table, and train with\n"
            f"        --data.exclude {arguments.csv} --data.relabel {arguments.csv}"
        )


def _summary(diagnosis: Diagnosis) -> Table:
    kinds = Counter(finding.problem for finding in diagnosis.findings)
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("problem", "images", "first"):
        out.add_column(head, justify="right" if head == "images" else "left", overflow="fold")
    for problem in MEANING:
        if kinds[problem]:
            first = [f for f in diagnosis.findings if f.problem == problem][:NAMED]
            out.add_row(problem, f"{kinds[problem]:,}", Text("\n".join(escape.line(f.path) for f in first)))
    return out


def plain(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything that was found, for JSON."""
    findings = [
        {key: value for key, value in asdict(f).items() if not key.endswith("position")} | {"label": diagnosis.labels[f.position]}
        for f in diagnosis.findings
    ]
    leak = None
    if diagnosis.leak is not None:
        leak = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(diagnosis.leak).items()}
    return {
        "source": diagnosis.source, "backbone": diagnosis.backbone, "num_images": diagnosis.num, "splits": diagnosis.splits,
        "leak": leak, "notes": list(diagnosis.notes), "findings": findings,
    }  # fmt: skip
