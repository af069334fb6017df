"""`tltrain probe`, and the same from Python."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tltrain.analysis.at_hand import AtHand, Candidate, at_hand, named
from tltrain.analysis.probe import judge, terminal
from tltrain.analysis.probe.judge import Ask, Probed
from tltrain.analysis.probe.page import probe_page
from tltrain.core import files
from tltrain.core.arguments.words import source_of
from tltrain.core.errors import StoppedAtOnce, UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console

PAGE = Path("probe.html")


@dataclass(frozen=True)
class Outputs:
    """Where the answer goes."""

    json: bool = False
    page: Path | None = None


def asked_source(text: str, console: Console) -> str:
    """The data source that a person means, said where it is not what was typed. Raises UserError."""
    source = source_of(text)
    if source is None:
        raise UserError(f"the data is {text!r}, which is no folder, no CSV file and no source here; give a folder of class folders")
    if source != text:
        console.say(f"data    {source}")
    return source


def candidates_of(names: Sequence[str], console: Console) -> tuple[list[Candidate], dict[str, str], AtHand | None]:
    """(the backbones to look at, what is wrong with others by name, the search that was made where none is named)."""
    if not names:
        console.busy("looking for backbones that are here")
        here = at_hand()
        console.busy(None)
        return list(here.found), {}, here
    found, problems = [], {}
    for name in dict.fromkeys(names):
        try:
            found.append(named(name))
        except UserError as error:
            problems[name] = str(error)
            console.say(f"left    {name}: {error}", style="yellow")
    if not found:
        raise UserError("no backbone could be probed:\n" + "\n".join(f"  {name}: {why}" for name, why in problems.items()))
    return found, problems, None


def run(ask: Ask, names: Sequence[str], flags: RunFlags, outputs: Outputs) -> Probed:
    """Probe, and print. names: the words of --backbones; none for those at hand. Raises UserError."""
    console = Console(enabled=not outputs.json)
    candidates, problems, here = candidates_of(names, console)
    probed = judge.probe(ask, candidates, flags, console, problems)
    if outputs.page is not None:
        _write(outputs.page, probe_page(probed, here))
    if outputs.json:
        sys.stdout.write(json.dumps(terminal.as_json(probed, here), indent=1) + "\n")
        return probed
    terminal.say(probed, here, console)
    if outputs.page is not None:
        console.say(f"page    {outputs.page}")
    return probed


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, page.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another place with --out") from error


def verb(arguments: Namespace) -> str:
    """`tltrain probe` with its parsed arguments. Returns finished, where any backbone could be judged, or stopped. Raises UserError."""
    outputs = Outputs(arguments.json, arguments.out or (None if arguments.json else PAGE))
    flags = RunFlags(cache=arguments.cache, workers=arguments.workers)
    source = asked_source(arguments.source, Console(enabled=not outputs.json))
    cuts = words(arguments.cuts)
    if not cuts:
        raise UserError(f"--cuts is {arguments.cuts!r} and names no block; such as head,layer4")
    columns = words(arguments.label_columns or "") or None
    ask = Ask(
        source, cuts, arguments.k, arguments.head, arguments.size, seed=arguments.seed, everything=arguments.everything,
        label_separator=arguments.label_separator, label_columns=columns,
    )  # fmt: skip
    try:
        run(ask, words(arguments.backbones or ""), flags, outputs)
    except StoppedAtOnce as stopped:
        sys.stderr.write(f"tltrain: stopped by {stopped}; the features that were stored stay, and the same command goes on\n")
        return "stopped"
    return "finished"


def words(text: str) -> tuple[str, ...]:
    """The words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
