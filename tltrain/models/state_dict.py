"""Checks that a state dict fits a net, by names and shapes, before loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from tltrain.core.errors import UserError

_SHOWN = 6


def listed(what: str, names: Iterable[str]) -> str:
    """Format names as `missing (2): a, b`. A long list is shortened. Empty for no names."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} ({len(names)}): {', '.join(names[:_SHOWN])}{more}" if names else ""


def check_fit(net: nn.Module, state: Mapping[str, Tensor], origin: str, name: str, *, without: str | None) -> None:
    """Check that a state dict has exactly the net's tensors, with the same shapes.

    origin, name: of the weights and of the network, for messages.
    without: prefix of the head's tensors where the state has no head.
    Raises UserError with all differences.
    """
    want = {n: tuple(t.shape) for n, t in net.state_dict().items() if without is None or not n.startswith(without)}
    have = {n: tuple(t.shape) for n, t in state.items()}
    shapes = [f"{n} is {have[n]}, not {want[n]}" for n in want.keys() & have.keys() if have[n] != want[n]]
    wrong = [
        listed("missing", want.keys() - have.keys()),
        listed("unexpected", have.keys() - want.keys()),
        listed("of another shape", shapes),
    ]
    if any(wrong):
        raise UserError(f"weights {origin} do not fit {name}: {'; '.join(filter(None, wrong))}")
