"""The command `tltrain`. Verbs import torch and other large packages themselves, so that help, recipes and schema start quickly."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from tltrain import __version__
from tltrain.core.errors import MachineError, Parser, UserError, parser_of
from tltrain.core.output import escape, streams
from tltrain.core.output.help import print_help, two_columns
from tltrain.distributed.signals import last_resort

RENAMED = {"store": "cache"}
"""Verbs by the names they had in 0.1, which 0.2 still understands."""
EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
"""75: stopped and saved, the same command goes on (EX_TEMPFAIL). 130: a second Ctrl-C (128 + SIGINT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed, 2 the user's mistake, 75 stopped and saved."""
    if argv is None:
        with last_resort():
            code = main(sys.argv[1:])
        if code == EXIT_INTERRUPTED:
            sys.stderr.flush()
            os._exit(code)  # Python would wait for threads, which a disk that does not answer may hold
        return code
    streams.open_missing()
    try:
        code = _run(list(argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        return streams.complain(str(error), EXIT_FAILED if isinstance(error, MachineError) else EXIT_USER)
    except KeyboardInterrupt:
        return streams.complain("interrupted; nothing was lost that a checkpoint holds", EXIT_INTERRUPTED)
    except OSError as error:
        if isinstance(error, PermissionError) and error.filename is not None:  # a folder on the way to a path that the user gave
            return streams.complain(f"{error.filename}: permission denied; ask its owner, or name another", EXIT_USER)
        return streams.lost(error, EXIT_FAILED)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help({name: str(verb.__doc__) for name, verb in VERBS.items()})
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] in RENAMED:
        from tltrain.core.flags import say_renamed

        say_renamed(f"tltrain {argv[0]}", f"tltrain {RENAMED[argv[0]]}")
    verb = VERBS.get(RENAMED.get(argv[0], argv[0]))
    if verb is None:
        near = get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(VERBS)}"
        raise UserError(f"tltrain has no verb {argv[0]!r}; {hint}")
    return verb(argv[1:])


def train(argv: Sequence[str]) -> int:
    """Fine-tune a backbone by a recipe, in stages. The same command resumes a stopped run."""
    from tltrain.core import flags

    recipe, start = flags.parse("train", argv)
    from tltrain.training import run

    return _exit_code(run.train(recipe, start)["outcome"])


def plan(argv: Sequence[str]) -> int:
    """Print what a recipe would train: blocks of each stage, steps, memory. Reads no weights."""
    from tltrain.core import flags

    recipe, start = flags.parse("plan", argv)
    from tltrain.cli.plan import show_plan
    from tltrain.core.output.console import Console

    show_plan(recipe, start, Console(enabled=True))
    return 0


def recipes(argv: Sequence[str]) -> int:
    """List the shipped recipes; with a name, print that recipe; with --backbones, list the networks."""
    parser = parser_of("recipes", recipes)
    parser.add_argument("name", nargs="?", help="print this recipe's file, to copy and change")
    parser.add_argument("--backbones", nargs="?", const="", metavar="QUERY", help="list the networks a recipe can name, or search them all")
    arguments = parser.parse_args(argv)
    from rich.console import Console

    from tltrain.core import recipe

    console = Console(highlight=False)
    if arguments.backbones is not None:
        from tltrain.models import family

        console.print(two_columns(family.search(arguments.backbones) if arguments.backbones else family.names()))
    elif arguments.name is not None:
        recipe.load(arguments.name)
        path = recipe.shipped().get(arguments.name, Path(arguments.name))
        sys.stdout.write(path.read_text(encoding="utf-8"))
    else:
        console.print(two_columns({name: recipe.load(name).purpose for name in recipe.shipped()}))
    return 0


def schema(argv: Sequence[str]) -> int:
    """Print the JSON schema of recipes, for editors."""
    parser_of("schema", schema).parse_args(argv)
    from tltrain.core.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a finished run again, from its folder alone, or on other images."""
    parser = parser_of("evaluate", evaluate)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--data", metavar="SOURCE", help="another source with the same classes, such as folder:PATH")
    parser.add_argument("--split", choices=("train", "val", "test", "all"), default=None, help="default: test, or all of another source")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, per class and confusion matrix included")
    parser.add_argument("--batch", type=int, default=128, help="images a device holds (default: 128)")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1:
        raise UserError(f"--batch is {arguments.batch}; it must be at least 1")
    from tltrain.evaluation.evaluate import evaluate as figures_of

    split = arguments.split or ("test" if arguments.data is None else "all")
    figures = figures_of(arguments.run, arguments.data, split, arguments.batch)
    for note in figures["notes"]:
        print(f"note    {escape.line(note)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            if isinstance(value, int | float | str):
                print(f"{name:18} {value:.6f}" if isinstance(value, float) else f"{name:18} {escape.line(str(value))}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Write report.html of a run folder again."""
    parser = parser_of("report", report)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    arguments = parser.parse_args(argv)
    from tltrain.runs.report.write import write_report

    print(write_report(arguments.run, arguments.out))
    return 0


def predict(argv: Sequence[str]) -> int:
    """Predict the classes of image files, of folders, or of paths from standard input (-)."""
    parser = parser_of("predict", predict)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, folders of them, or - for paths from standard input, one a line"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="an array of objects, for programs")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="a table for programs")
    parser.add_argument("--top", type=int, default=3, help="classes named for each file, the most probable first (default: 3)")
    parser.add_argument("--batch", type=int, default=64, help="images in one forward pass (default: 64)")
    arguments = parser.parse_args(argv)
    from tltrain.cli.predict import predict_files

    return 0 if predict_files(arguments.run, arguments.paths, arguments.form or "table", arguments.top, arguments.batch) else EXIT_FAILED


def export(argv: Sequence[str]) -> int:
    """Write a run's network for transformers, torchvision, ONNX or torch.export, checked with their own tools."""
    from tltrain.core import registry

    parser = parser_of("export", export)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--to", required=True, metavar="NAME", help=", ".join(registry.names("exporters")))
    parser.add_argument("--out", type=Path, help="a new folder (default: RUN/export/NAME)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files to compare on (default: the run's own test images)")
    arguments = parser.parse_args(argv)
    from tltrain.evaluation.exporters import export as write_export

    done = write_export(arguments.run, arguments.to, arguments.out, arguments.images)
    print(f"logits  differ by {done.difference:.1e} at most, on {done.num_images} images")
    for note in done.notes:
        print(f"note    {escape.line(note)}")
    print(f"export  {done.folder}")
    return 0


def preview(argv: Sequence[str]) -> int:
    """Draw one picture of what a recipe's network will see: samples by views of each stage."""
    parser = Parser(prog="tltrain preview", add_help=False)
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the picture's file (default: preview.png)")
    parser.add_argument("--rows", type=int, default=8, help="samples of each stage (default: 8)")
    arguments, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        parser.print_help()  # of its own flags; those of the recipe follow
    from tltrain.core import flags

    recipe, _ = flags.parse("preview", rest)
    from tltrain.cli.plan import preview as draw

    print(draw(recipe, arguments.out, arguments.rows))
    return 0


def compare(argv: Sequence[str]) -> int:
    """Compare runs: figures with intervals, paired tests, seeds, cost, recipes; a table here and a page."""
    parser = parser_of("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page (default: comparison.html)")
    parser.add_argument("--title", default="Comparison", help="its title")
    arguments = parser.parse_args(argv)
    from tltrain.cli.compare import compare as compare_runs

    print(f"page    {compare_runs(arguments.runs, arguments.out, arguments.title)}")
    return 0


def soup(argv: Sequence[str]) -> int:
    """Average the weights of finished runs, such as seeds, and evaluate the averages on val."""
    from tltrain.cli.soup import cook

    return cook(parser_of("soup", soup), argv)


def demo(argv: Sequence[str]) -> int:
    """Transfer learning in four minutes, without data or network: printed characters to handwritten digits."""
    parser = parser_of("demo", demo)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the runs and the page (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="draws the labelled images and new weights (default: 0)")
    arguments = parser.parse_args(argv)
    from tltrain.cli.demo import run_demo

    return _exit_code(run_demo(arguments.out, arguments.seed))


def cache(argv: Sequence[str]) -> int:
    """List, verify or clear cached features, teachers' logits and base images."""
    parser = parser_of("cache", cache)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|verify|clear")
    ls = verbs.add_parser("ls", help="one line for each cache, the one unused for longest first")
    ls.add_argument("--json", action="store_true", help="for programs")
    verify = verbs.add_parser("verify", help="every shard's checksum, and random rows computed again")
    verify.add_argument("names", nargs="*", metavar="NAME", help="caches, as ls names them (default: all)")
    verify.add_argument("--rows", type=int, default=64, help="rows of each that are computed again; 0: checksums alone (default: 64)")
    verify.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    clear = verbs.add_parser("clear", help="delete caches that nobody uses")
    clear.add_argument("names", nargs="*", metavar="NAME", help="caches, as ls names them")
    clear.add_argument("--all", action="store_true", dest="everything", help="all of them")
    arguments = parser.parse_args(argv)
    if arguments.verb == "verify" and arguments.rows < 0:
        raise UserError(f"--rows is {arguments.rows}; it must be at least 0")
    if arguments.verb == "clear" and arguments.everything == bool(arguments.names):
        raise UserError("tltrain cache clear takes names of caches (`tltrain cache ls`), or --all for every one, and not both")
    from tltrain.cli import cache as caches

    if arguments.verb == "ls":
        return caches.show(arguments.json)
    if arguments.verb == "verify":
        return caches.verify(arguments.names, arguments.rows, arguments.seed)
    return caches.clear(arguments.names)


def launch(argv: Sequence[str]) -> int:
    """Start a run on all GPUs of this machine or on a Slurm cluster, show its state, or cancel it."""
    from launcher.cli import main as launcher_main

    return launcher_main(argv)


def doctor(argv: Sequence[str]) -> int:
    """Check this machine for training, and print a remedy for each problem."""
    from tltrain.cli.doctor import doctor as examine

    return examine(argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "plan": plan, "preview": preview, "evaluate": evaluate, "report": report, "compare": compare, "soup": soup,
    "predict": predict, "export": export, "cache": cache, "launch": launch, "doctor": doctor, "recipes": recipes, "schema": schema,
    "demo": demo,
}  # fmt: skip


def _exit_code(outcome: str) -> int:
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(outcome, EXIT_FAILED)
