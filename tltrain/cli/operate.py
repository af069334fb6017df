"""Verbs for the machine, its caches, and what can be named in a recipe. Large imports stand inside them, so that help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tltrain.core.errors import UserError, parser_of
from tltrain.core.output.help import two_columns

OF_DATA = {"--backbone", "--weights", "--exclude", "--relabel", "--csv", "--json", "--out"}
"""Flags that only the doctor of images has."""


def doctor(argv: Sequence[str]) -> int:
    """Check this machine, or the images of a SOURCE."""
    if any(not word.startswith("-") for word in argv[:1]) or {word.partition("=")[0] for word in argv} & OF_DATA:
        from tltrain.analysis.doctor.command import data_doctor

        return data_doctor(argv)
    from tltrain.commands.doctor import doctor as examine

    return examine(argv)


def cache(argv: Sequence[str]) -> int:
    """List, verify or clear cached features, logits and images."""
    parser = parser_of("cache", cache)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|verify|clear")
    ls = verbs.add_parser("ls", help="one line for each cache, the one unused for longest first")
    ls.add_argument("--json", action="store_true", help="for programs")
    verify = verbs.add_parser("verify", help="every shard's checksum, and random rows computed again")
    verify.add_argument("names", nargs="*", metavar="NAME", help="caches, as ls names them, or the beginning of a name (default: all)")
    verify.add_argument("--rows", type=int, default=64, help="rows of each that are computed again; 0: checksums alone (default: 64)")
    verify.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    clear = verbs.add_parser("clear", help="delete caches that nobody uses")
    clear.add_argument("names", nargs="*", metavar="NAME", help="caches, as ls names them, or the beginning of a name")
    clear.add_argument("--all", action="store_true", dest="everything", help="all of them")
    arguments = parser.parse_args(argv)
    if arguments.verb == "verify" and arguments.rows < 0:
        raise UserError(f"--rows is {arguments.rows}; it must be at least 0")
    if arguments.verb == "clear" and arguments.everything == bool(arguments.names):
        raise UserError("tltrain cache clear takes names of caches (`tltrain cache ls`), or --all for every one, and not both")
    from tltrain.commands import cache as caches

    if arguments.verb == "ls":
        return caches.show(arguments.json)
    if arguments.verb == "verify":
        return caches.verify(arguments.names, arguments.rows, arguments.seed)
    return caches.clear(arguments.names)


def recipes(argv: Sequence[str]) -> int:
    """List the shipped recipes, print one, or list the networks."""
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
