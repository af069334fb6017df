"""YAML and JSON that anybody may have written, read within bounds: a hostile file costs a message, and neither time nor memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tltrain.core import files
from tltrain.core.errors import UserError

MOST_BYTES = 256 * 1024
"""Of a recipe or of a settings file: the longest that comes with tltrain has 2 KiB. Pure Python reads about this much a second."""
MOST_DEPTH = 32
MOST_VALUES = 20_000
"""With every alias counted as often as it is used."""
JSON_BYTES = 64 * 1024 * 1024
_ODD = (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises for tags such as `!!timestamp x` and for numbers of 5,000 digits besides its own errors."""


def parse_yaml(text: str, origin: str) -> Any:
    """Plain values. `origin` is what the message calls it. Raises UserError."""
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if num_bytes > MOST_BYTES:
        raise UserError(f"{origin} has {num_bytes:,} bytes, and at most {MOST_BYTES:,} are read; is it the right file?")
    try:
        depth = 0
        for num_events, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise UserError(f"{origin} is nested deeper than {MOST_DEPTH} levels; write it flatter")
            if num_events > 2 * MOST_VALUES:
                raise UserError(f"{origin} holds more than {MOST_VALUES:,} values; is it the right file?")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _size(root, {}) > MOST_VALUES:
            raise UserError(
                f"{origin} holds more than {MOST_VALUES:,} values once its aliases (*name) are written out; write it without them"
            )
        return yaml.safe_load(text)
    except UserError:
        raise
    except _ODD as error:
        raise UserError(f"{origin} is not YAML: {_describe(error)}") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The nodes below one, itself included, each as often as it is used. Raises RecursionError for one that holds itself."""
    key = id(node)
    if key not in known:
        known[key] = -1
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[key] = 1 + sum(_size(part, known) for part in parts)
    if known[key] < 0:
        raise RecursionError("a value holds itself by an alias")
    return known[key]


def read_json(path: Path) -> Any:
    """The value in a file. Raises UserError where there is none that can be read."""
    try:
        if (num_bytes := path.stat().st_size) > JSON_BYTES:
            raise UserError(f"{path} has {num_bytes:,} bytes, and at most {JSON_BYTES:,} are read")
        text = files.read_bytes(path).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: str, origin: str) -> Any:
    """Plain values. Raises UserError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is no JSON: {_describe(error)}") from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested plain values by its dotted path, such as stages.1.lr. A list of other than mappings is one value."""
    items: Iterable[tuple[str, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, sub in items for k, v in flatten(sub, f"{prefix}.{key}" if prefix else key).items()}


def cut(value: object, most: int = 80) -> str:
    """A value for a message, in one line of bounded length."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def _describe(error: BaseException) -> str:
    if isinstance(error, yaml.YAMLError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 300 else text[:299] + "…"
