"""Which corruptions and severities a person asks for."""

from __future__ import annotations

from collections.abc import Sequence

from tltrain.core.errors import UserError
from tltrain.data.corruptions import KINDS, OPERATIONS, SEVERITIES
from tltrain.data.corruptions.views import CELLS, CLEAN, Cell

ALL = "all"


def cells_of(corruptions: str, severities: str) -> list[Cell]:
    """The passes to make, the clean one first, in the order of CELLS.

    corruptions: names and kinds with commas between them, or `all`. severities: numbers from 1 to 5, likewise. Raises UserError.
    """
    names: set[str] = set()
    for word in _words(corruptions):
        found = [name for name in OPERATIONS if word in (ALL, name) or name in KINDS.get(word, ())]
        if not found:
            raise UserError(
                f"--corruptions: {word!r} is no corruption; there are {', '.join(OPERATIONS)}, the kinds {', '.join(KINDS)}, and {ALL} "
                "(the run folder stands before --corruptions)"
            )
        names.update(found)
    levels = [word for word in _words(severities) if word != ALL]
    if wrong := [word for word in levels if word not in map(str, SEVERITIES)]:
        raise UserError(f"--severities: {wrong[0]!r} is none; they go from 1 to 5, such as 1,3,5")
    chosen = {int(word) for word in levels} or set(SEVERITIES)
    if not names:
        raise UserError(f"--corruptions names none; give some, or {ALL}")
    return [cell for cell in CELLS if cell == CLEAN or (cell.name in names and cell.severity in chosen)]


def _words(text: str) -> Sequence[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
