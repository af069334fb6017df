"""Site defaults for Slurm jobs, read from slurm.yaml in the user's configuration folder."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from launcher.slurm.job import Job
from tltrain.core import files, untrusted
from tltrain.core.errors import UserError


def path() -> Path:
    """Path of slurm.yaml in $XDG_CONFIG_HOME/tltrain or ~/.config/tltrain. The file need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "tltrain" / "slurm.yaml"


def defaults() -> Job:
    """A job with the site's values, or with the built-in ones where there is no file. Raises UserError for an invalid file."""
    file = path()
    try:
        text = files.read_text(file)
    except FileNotFoundError:
        return Job()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return read(untrusted.parse_yaml(text, str(file)), str(file))


def read(raw: Any, source: str) -> Job:
    """A job from the parsed contents of such a file. `source` names the file in messages. Raises UserError."""
    if raw is None:
        return Job()
    if not isinstance(raw, dict):
        raise UserError(f"{source} must hold settings such as `partition: gpu`, one a line")
    known = {field.name: field for field in fields(Job)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UserError(f"{source} sets {key!r}; " + (f"did you mean {near[0]}?" if near else f"it may set: {', '.join(known)}"))
        values[name] = _value(name, known[name].type, value, source)
    return replace(Job(), **values)


def _value(name: str, kind: Any, value: Any, source: str) -> Any:
    if name == "setup":
        lines = value.splitlines() if isinstance(value, str) else value
        if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
            return tuple(lines)
        raise UserError(f"{source}: setup must be lines of bash, as a list or as a block")
    if "int" in str(kind):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise UserError(f"{source}: {name} is {value!r}; it must be a whole number")
    if not isinstance(value, str):
        raise UserError(f"{source}: {name} is {value!r}; it must be text, put it in quotes")
    return value
