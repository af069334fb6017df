"""Names of tensors in messages."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 6


def listed(what: str, names: Iterable[str]) -> str:
    """Format names as `missing (2): a, b`. A long list is shortened. Empty for no names."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} ({len(names)}): {', '.join(names[:_SHOWN])}{more}" if names else ""
