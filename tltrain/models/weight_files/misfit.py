"""Checks that a state dict fits a net, by names and shapes, before loading, and says what differs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tltrain.core.errors import UserError
from tltrain.models.weight_files.names import listed

Shapes = Mapping[str, tuple[int, ...]]


def check_fit(net: nn.Module, state: Mapping[str, Tensor], origin: str, name: str, *, without: tuple[str, ...] | None) -> None:
    """Check that a state dict has exactly the net's tensors, with the same shapes.

    origin, name: of the weights and of the network, for messages.
    without: prefixes of the head's tensors where the state has no head.
    Raises UserError with all differences.
    """
    want = {n: tuple(t.shape) for n, t in net.state_dict().items() if without is None or not n.startswith(without)}
    if (wrong := differences(state, want)) is not None:
        raise UserError(f"weights {origin} do not fit {name}: {wrong}")


def differences(state: Mapping[str, Tensor], want: Shapes) -> str | None:
    """Missing, unexpected and differently shaped tensors of a state dict. None if there are none."""
    have = {n: tuple(t.shape) for n, t in state.items()}
    shapes = {n: f"{n} is {have[n]}, not {want[n]}" for n in want.keys() & have.keys() if have[n] != want[n]}
    wrong = [
        listed("missing", want.keys() - have.keys()),
        listed("unexpected", have.keys() - want.keys()),
        listed("of another shape", shapes.values()),
    ]
    return "; ".join(filter(None, wrong)) or None


def width(state: Mapping[str, Tensor], want: Shapes, name: str) -> str | None:
    """A line on the width where the names agree and most shapes do not: the network is of the same kind, and wider or narrower."""
    both = [n for n in want if n in state and len(want[n]) == 1]
    differ = [n for n in both if tuple(state[n].shape) != want[n]]
    if len(both) < len(want) / 4 or len(differ) < len(both) / 2:
        return None
    return f"they are of another width: {differ[0]} has {len(state[differ[0]])} values, and {want[differ[0]][0]} in {name}"
