"""Verbs that say what a run has learned. Large imports stand inside them, so that help is quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tltrain.cli.corruptions import corruption_arguments, under_corruptions
from tltrain.cli.doubts import doubt_arguments
from tltrain.core.arguments.words import source_of
from tltrain.core.errors import UserError, parser_of
from tltrain.core.output import escape, wrapping
from tltrain.core.paths import check_run, check_runs


def ls(argv: Sequence[str]) -> int:
    """List runs: state, accuracies, time; newest first.

    Looks into folders of runs too, such as those of a sweep.
    """
    from tltrain.runs.listing.lines import SORTS

    parser = parser_of("ls", ls)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--sort", choices=SORTS, default="when", help="numbers descending, names ascending (default: when)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs, with everything in full")
    form.add_argument("--out", type=Path, metavar="FILE.html", help="write a page whose rows can be filtered")
    arguments = parser.parse_args(argv)
    from tltrain.commands.ls import show

    return show(arguments.folder, arguments.sort, arguments.json, arguments.out)


def evaluate(argv: Sequence[str]) -> int:
    """Measure a finished run again, or on other images."""
    parser = parser_of("evaluate", evaluate)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data", metavar="SOURCE", help="another source with classes of the run, all or some, such as a folder")
    parser.add_argument("--split", choices=("train", "val", "test", "all"), default=None, help="default: test, or all of another source")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, per class and confusion matrix included")
    parser.add_argument("--batch", type=int, default=128, help="images a device holds (default: 128)")
    corruption_arguments(parser)
    doubt_arguments(parser)
    arguments = parser.parse_args(argv)
    check_run(arguments.run)
    if arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}; it must be at least 1")
    arguments.data = arguments.data and (source_of(arguments.data) or arguments.data)  # photos is folder:photos, as for train
    split = arguments.split or ("test" if arguments.data is None else "all")
    if (code := under_corruptions(parser, arguments, split)) is not None:
        return code
    from tltrain.evaluation.promises.command import figures_of
    from tltrain.evaluation.promises.fitted import Wanted
    from tltrain.evaluation.promises.terminal import lines_of

    wanted = Wanted(arguments.coverage, arguments.abstain, arguments.strangers, arguments.views)
    figures = figures_of(arguments.run, arguments.data, split, arguments.batch, wanted)
    for note in figures["notes"]:
        wrapping.note(note)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for line in lines_of(figures):
            wrapping.say(line)
    return 0


def report(argv: Sequence[str]) -> int:
    """Write a run's report.html, or the folds.html of its folds, again."""
    parser = parser_of("report", report)
    parser.add_argument("run", type=Path, help="a run folder, or a folder of folds")
    parser.add_argument("--out", type=Path, help="the page of a run (default: RUN/report.html)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write curves, confusion and calibration as SVG, PDF and CSV")
    arguments = parser.parse_args(argv)
    check_runs([arguments.run])
    from tltrain.runs.folds.folder import is_folds

    if is_folds(arguments.run):
        if arguments.figures is not None:
            raise UserError(
                f"{arguments.run} is a folder of folds, and --figures draws a single run; give one, such as {arguments.run}/r0-f0"
            )
        return _report_folds(arguments.run, arguments.out)
    from tltrain.runs.pages.write import write_report

    print(escape.line(str(write_report(arguments.run, arguments.out))))
    if arguments.figures is not None:
        from tltrain.runs.pages.figures import write_figures
        from tltrain.runs.record import read_run

        files = write_figures(read_run(arguments.run), arguments.figures)
        print(f"{len(files)} files in {escape.line(str(arguments.figures))}")
    return 0


def _report_folds(path: Path, out: Path | None) -> int:
    if out is not None:
        raise UserError(f"{path} is a folder of folds, whose page links to their own; leave --out out, and find it there")
    from tltrain.many.folds import show

    if show(path) is None:
        raise UserError(f"{path} has no fold that is finished yet; the `tltrain folds` that began it goes on")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Compare runs: intervals, paired tests, seeds, cost, recipes."""
    parser = parser_of("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page (default: comparison.html)")
    parser.add_argument("--title", default="Comparison", help="its title")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 1:  # one alone is refused below, whether it is there or not
        check_runs(arguments.runs)
    from tltrain.commands.compare import compare as compare_runs

    print(escape.line(f"page    {compare_runs(arguments.runs, arguments.out, arguments.title)}"))
    return 0
