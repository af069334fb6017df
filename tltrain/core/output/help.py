"""Prints names with their descriptions, as help shows them."""

from __future__ import annotations

from collections.abc import Mapping


def two_columns(rows: dict[str, str]) -> object:
    """A table of names and descriptions, for rich's console."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in rows.items():
        table.add_row(Text(name), Text(text))  # as it is: rich takes [timm] for a style
    return table


def print_help(groups: Mapping[str, Mapping[str, str]]) -> None:
    """Print the help of `tltrain`. groups: the verbs of each group, name to description."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print("tltrain: fine-tune pretrained image networks in stages, and distil them", markup=False)
    for group, verbs in groups.items():
        console.print(f"\n{group}", style="bold")
        width = max(len(name) for verbs in groups.values() for name in verbs)
        console.print(two_columns({f"  {name:{width}}": text.splitlines()[0] for name, text in verbs.items()}))
    console.print("\ntry     tltrain demo", markup=False)
    console.print("then    tltrain train folder-resnet50 PATH", markup=False)
    console.print("more    tltrain VERB --help", markup=False)
