"""Verbs that take something away from a run: predictions, exports, averages. Large imports stand inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tltrain.cli.codes import EXIT_FAILED
from tltrain.cli.doubts import doubt_arguments
from tltrain.core.errors import UserError, parser_of
from tltrain.core.output import escape, wrapping
from tltrain.core.paths import check_run


def predict(argv: Sequence[str]) -> int:
    """Predict the classes of image files, folders, or paths from stdin."""
    parser = parser_of("predict", predict)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, folders of them, or - for paths from standard input, one a line"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="an array of objects, for programs")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="a table for programs")
    parser.add_argument("--top", type=int, default=3, help="classes named for each file, the most probable first (default: 3)")
    parser.add_argument("--probabilities", action="store_true", help="with --csv or --json: the probability of every class")
    parser.add_argument("--batch", type=int, default=64, help="images in one forward pass (default: 64)")
    doubt_arguments(parser)
    arguments = parser.parse_args(argv)
    check_run(arguments.run)
    for name in ("top", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    from tltrain.commands.predict import predict_files
    from tltrain.evaluation.promises.fitted import Wanted

    wanted = Wanted(arguments.coverage, arguments.abstain, arguments.strangers, arguments.views)
    done = predict_files(
        arguments.run, arguments.paths, arguments.form or "table", arguments.top, arguments.batch, wanted, arguments.probabilities
    )  # fmt: skip
    return 0 if done else EXIT_FAILED


def export(argv: Sequence[str]) -> int:
    """Write a network for timm, transformers, torchvision or ONNX.

    Also torch.export. Each is read back with its own library and compared.
    """
    from tltrain.core import registry

    parser = parser_of("export", export)
    parser.add_argument("run", type=Path, help="a run folder")
    exporters = f"{', '.join(registry.names('exporters'))}; onnx needs: pip install 'tltrain[onnx]'"
    parser.add_argument("--to", required=True, metavar="NAME", help=exporters)
    parser.add_argument("--out", type=Path, help="a new folder (default: RUN/export/NAME)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files to compare on (default: the run's own test images)")
    arguments = parser.parse_args(argv)
    registry.check("exporters", arguments.to, f"--to is {arguments.to!r}")
    check_run(arguments.run)
    from tltrain.evaluation.exporters import export as write_export

    done = write_export(arguments.run, arguments.to, arguments.out, arguments.images)
    print(f"logits  differ by {done.difference:.1e} at most, on {done.num_images} images")
    for note in done.notes:
        wrapping.say(f"note    {escape.line(note)}")
    print(escape.line(f"export  {done.folder}"))
    return 0


def soup(argv: Sequence[str]) -> int:
    """Average the weights of finished runs, such as seeds.

    Evaluates the averages on val.
    """
    from tltrain.commands.soup import cook

    return cook(parser_of("soup", soup), argv)
