"""Verbs that start a run, or show what would be started. Large imports stand inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tltrain.cli.codes import exit_code
from tltrain.core.errors import Parser, UserError, parser_of
from tltrain.core.output import wrapping
from tltrain.core.paths import near


def train(argv: Sequence[str]) -> int:
    """Fine-tune a backbone by a recipe; the same command resumes it."""
    from tltrain.core.arguments import parsing, words

    if argv and words.is_data(argv[0]):
        words.check_for_fit("train", argv)
        wrapping.note(f"{argv[0]} is data, and no recipe stands before it: tltrain fit chooses one")
        return fit(argv)
    recipe, start = parsing.parse("train", argv)
    from tltrain.training import run

    return exit_code(run.train(recipe, start)["outcome"])


def plan(argv: Sequence[str]) -> int:
    """Show blocks, steps and memory of each stage; trains nothing.

    Reads no weights.
    """
    from tltrain.core.arguments import parsing

    recipe, start = parsing.parse("plan", argv)
    from tltrain.commands.plan import show_plan
    from tltrain.core.output.console import Console

    show_plan(recipe, start, Console(enabled=True))
    return 0


def preview(argv: Sequence[str]) -> int:
    """Draw what a recipe's network will see, stage by stage.

    One picture: samples by views of each stage.
    """
    parser = Parser(prog="tltrain preview", add_help=False)
    parser.add_argument("--out", type=Path, default=Path("preview.png"), help="the picture's file (default: preview.png)")
    parser.add_argument("--rows", type=int, default=8, help="samples of each stage (default: 8)")
    arguments, rest = parser.parse_known_args(argv)
    from tltrain.core.arguments import parsing

    recipe, _ = parsing.parse("preview", rest)
    from tltrain.commands.plan import preview as draw

    print(draw(recipe, arguments.out, arguments.rows))
    return 0


def probe(argv: Sequence[str]) -> int:
    """Compare backbones on your pictures in minutes; trains nothing.

    A head is solved on the features of each, and judged by folds. The features are kept where training looks for them.
    """
    parser = parser_of("probe", probe)
    parser.add_argument("source", metavar="SOURCE", help="a folder of class folders, or a data.source such as csv:labels.csv")
    parser.add_argument("--backbones", metavar="A,B", help="NAME, NAME=WEIGHTS or weights (default: those that are here without a network)")
    parser.add_argument("--cuts", default="head", metavar="A,B", help="blocks whose input is judged, such as head,layer4 (default: head)")
    parser.add_argument("--k", type=int, help="folds (default: 10, and 5 from 2,000 images on)")
    parser.add_argument("--head", choices=("ridge", "logistic", "nearest_mean"), default="ridge", help="what is solved (default: ridge)")
    _label_arguments(parser)
    parser.add_argument("--size", type=int, help="side of the images, pixels (default: that of the weights)")
    parser.add_argument("--seed", type=int, default=0, help="deals the folds (default: 0)")
    parser.add_argument("--all", action="store_true", dest="everything", help="every image, the test split too")
    parser.add_argument("--cache", choices=("auto", "never"), default="auto", help="never: keep no features (default: auto)")
    parser.add_argument("--workers", type=int, help="data workers (default: as for training)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")
    parser.add_argument("--out", type=Path, help="the page (default: probe.html; with --json none)")
    arguments = parser.parse_args(argv)
    from tltrain.analysis.probe import command

    return exit_code(command.verb(arguments))


def _label_arguments(parser: Parser) -> None:
    parser.add_argument("--label-separator", metavar="MARK", help="several labels an image: what parts them in a cell, such as '|'")
    parser.add_argument("--label-columns", metavar="A,B", help="several labels an image: columns of 1 and 0, one for each")


def fit(argv: Sequence[str]) -> int:
    """Choose a recipe for your pictures, say why, and train it.

    Probes the backbones that are here, races depths on folds, and writes the recipe with a reason for each line. The same command goes on.
    """
    parser = parser_of("fit", fit)
    parser.add_argument("source", metavar="SOURCE", help="a folder of pictures in class folders, or any data.source of a recipe")
    parser.add_argument("--minutes", type=float, default=10, help="time that it may take, about (default: 10)")
    parser.add_argument("--backbones", default="", metavar="A,B", help="NAME or NAME=WEIGHTS (default: those here without a network)")
    _label_arguments(parser)
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: runs/NAME-fit)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, order and new weights (default: 0)")
    parser.add_argument("--workers", type=int, help="data workers (default: by the processor cores)")
    parser.add_argument("--dry-run", action="store_true", help="stop at the recipe: nothing trains")
    arguments = parser.parse_args(argv)
    from tltrain.core.arguments.words import source_of
    from tltrain.core.files import short_name
    from tltrain.core.flags import RunFlags
    from tltrain.core.output.console import Console

    source = source_of(arguments.source)
    if source is None:
        hint = near(arguments.source) or "; give a folder of pictures, such as folder:photos"
        raise UserError(f"{arguments.source} is no folder and no data source{hint}")
    from tltrain.analysis.probe.command import words
    from tltrain.fitting.fit import Wanted
    from tltrain.fitting.fit import fit as choose_and_train

    names, columns = (words(text or "") for text in (arguments.backbones, arguments.label_columns))
    folder = arguments.folder or Path("runs") / f"{short_name(Path(source.partition(':')[2] or source).stem) or 'pictures'}-fit"
    labels = arguments.label_separator, columns or None
    wanted = Wanted(source, folder, arguments.minutes, names, arguments.seed, arguments.dry_run, *labels)
    return exit_code(choose_and_train(wanted, RunFlags(workers=arguments.workers), Console(enabled=True)))


def distil(argv: Sequence[str]) -> int:
    """Teach a smaller network what finished runs know.

    Writes the student's recipe with a reason for each line, says what it costs, trains it, and sets it against its teacher. The same
    command goes on.
    """
    parser = parser_of("distil", distil)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs, whose mean teaches, or a folder of folds")
    parser.add_argument("--to", required=True, metavar="BACKBONE", help="the student: NAME, NAME=WEIGHTS, or a file of weights")
    parser.add_argument("--minutes", type=float, help="time that it may take, about (default: as long as patience pays)")
    parser.add_argument("--folder", type=Path, help="where everything is kept (default: runs/RUN-to-BACKBONE)")
    parser.add_argument("--workers", type=int, help="data workers (default: by the processor cores)")
    parser.add_argument("--dry-run", action="store_true", help="stop at the recipe and its costs: nothing trains")
    arguments = parser.parse_args(argv)
    from tltrain.core.flags import RunFlags
    from tltrain.core.output.console import Console
    from tltrain.distilling.distil import Wanted, folder_of
    from tltrain.distilling.distil import distil as choose_and_train

    folder = arguments.folder or folder_of(arguments.runs, arguments.to)
    wanted = Wanted(tuple(arguments.runs), arguments.to, folder, arguments.minutes, arguments.dry_run)
    return exit_code(choose_and_train(wanted, RunFlags(workers=arguments.workers), Console(enabled=True)))


def lr(argv: Sequence[str]) -> int:
    """Look for a learning rate: one short run in which it rises.

    The stages before it are trained as they stand. Writes lr.svg and lr.csv beside the run, and prints where the loss falls fastest.
    """
    parser = Parser(prog="tltrain lr", add_help=False)
    parser.add_argument("--stage", help="the stage to look at, by name (default: the last)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the rise (default: 100)")
    parser.add_argument("--highest", type=float, default=1.0, help="learning rate of the last step (default: 1)")
    arguments, rest = parser.parse_known_args(argv)
    from tltrain.core.arguments import parsing

    recipe, start = parsing.parse("lr", rest)
    from tltrain.fitting.lr_range import look

    return exit_code(look(recipe, start, arguments.stage, arguments.steps, arguments.highest))


def folds(argv: Sequence[str]) -> int:
    """Cross-validate: every image judged by a network that never saw it.

    Each fold is a run in its own folder; the same command resumes them. Behind --slurm stand options of tltrain launch slurm.
    """
    argv, slurm = _before_and_behind(argv, "--slurm")
    parser = Parser(prog="tltrain folds", add_help=False)
    parser.add_argument("--k", type=int, default=5, help="parts of the images, each tested once (default: 5)")
    parser.add_argument("--repeats", type=int, default=1, help="how often the images are parted anew (default: 1)")
    parser.add_argument("--jobs", type=int, help="folds at a time (default: one a GPU, else one)")
    arguments, rest = parser.parse_known_args(argv)
    from tltrain.core.arguments import parsing
    from tltrain.runs.folds.folder import changes, wanted_folder

    parsed = parsing.parse_with("folds", rest, changes(arguments.k, arguments.repeats))
    wanted = wanted_folder(parsed, arguments.k, arguments.repeats)
    if slurm is not None:
        from launcher.slurm.array import submit_folds

        return submit_folds(wanted, parsed, slurm, ["tltrain", "folds", *argv, "--slurm", *slurm])
    from tltrain.many.folds import run_folds

    return exit_code(run_folds(wanted, parsed, arguments.jobs))


def sweep(argv: Sequence[str]) -> int:
    """Train every combination of some values of a recipe.

    Each is a run in its own folder; the same command resumes them. Behind --slurm stand options of tltrain launch slurm.
    """
    argv, slurm = _before_and_behind(argv, "--slurm")
    parser = Parser(prog="tltrain sweep", add_help=False)
    parser.add_argument("--over", action="append", default=[], metavar="KEY=VALUES", help="what to vary, such as seed=0..4")
    parser.add_argument("--halving", type=int, metavar="N", help="rounds on shortened recipes; one in N goes on")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU, else one)")
    parser.add_argument("--dry-run", action="store_true", help="show the runs and start nothing")
    arguments, rest = parser.parse_known_args(argv)
    from tltrain.core.arguments import parsing
    from tltrain.many import grid

    grid.check_over_typed(rest)
    recipe, start = parsing.parse("sweep", rest)
    axes = [grid.axis(text) for text in arguments.over]
    grid.check_typed_once(axes, rest)
    members = grid.members(recipe, start, axes)
    if arguments.dry_run:
        return grid.show(members, arguments.halving)
    from tltrain.many.sweep import run_sweep, submit_sweep

    if slurm is not None:
        return submit_sweep(members, arguments.halving, slurm, ["tltrain", "sweep", *argv, "--slurm", *slurm])
    return exit_code(run_sweep(members, arguments.halving, arguments.jobs))


def launch(argv: Sequence[str]) -> int:
    """Start a run on all GPUs of this machine, or on Slurm.

    Also shows a run's state, and cancels it.
    """
    from launcher.cli import main as launcher_main

    return launcher_main(argv)


def demo(argv: Sequence[str]) -> int:
    """Transfer learning in a minute or two, without data or network.

    From printed characters to handwritten digits.
    """
    parser = parser_of("demo", demo)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the runs and the page (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="draws the labelled images and new weights (default: 0)")
    arguments = parser.parse_args(argv)
    from tltrain.commands.demo import run_demo

    return exit_code(run_demo(arguments.out, arguments.seed))


def _before_and_behind(argv: Sequence[str], word: str) -> tuple[list[str], list[str] | None]:
    """The arguments before a word and those behind it; None where the word does not stand there."""
    if word not in argv:
        return list(argv), None
    at = list(argv).index(word)
    return list(argv[:at]), list(argv[at + 1 :])
