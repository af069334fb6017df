"""manifest.json: checksums of the files in a run folder, which detect a damaged file when it is read.

A checksum is added after the last write of a file. For the weights of a stage, this is when the stage ends. For other files, it is when
the start ends. A start first removes the checksums of the files that it will overwrite. Files without a checksum are read unchecked, as
in runs of tltrain 0.1.0, which have no manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.core.errors import UserError

NAME = "manifest.json"
LEVELS = 3  # RUN/stages/0-head/weights.safetensors is three levels below its run


def cover(run: Path, paths: Iterable[Path], anew: bool = True) -> None:
    """Save the checksums of those of these files that exist. anew: recompute existing checksums too."""
    known = _read(run)
    wanted = {path.relative_to(run).as_posix(): path for path in paths if path.is_file() and not path.is_symlink()}
    checksums = {name: files.sha256(path) for name, path in wanted.items() if anew or name not in known}
    if checksums:
        _write(run, known | checksums)


def uncover(run: Path, paths: Iterable[Path]) -> None:
    """Remove the checksums of files that will be overwritten. A crash in between then leaves no file that looks damaged."""
    known = _read(run)
    names = known.keys() - {path.relative_to(run).as_posix() for path in paths}
    if len(names) < len(known):
        _write(run, {name: known[name] for name in names})


def check(path: Path) -> None:
    """Raise UserError if the content of this file does not match its checksum in the manifest of its run."""
    for run in list(path.parents)[:LEVELS]:
        if (run / NAME).is_file():
            checksum = _read(run).get(path.relative_to(run).as_posix())
            if checksum is not None and path.is_file() and files.sha256(path) != checksum:
                raise UserError(
                    f"{path} is not as its run wrote it: its checksum is not the one in {run / NAME}; it may be damaged. Copy it from a "
                    f"backup, or train again. If you changed it yourself, delete {NAME}, and nothing of this run is checked any more"
                )
            return


def read_json(file: Path, kind: type[dict[str, Any]] | type[list[Any]], keys: Iterable[str] = ()) -> Any:
    """Read a JSON file of a run. None if the file does not exist.

    Raises UserError if it does not match its checksum, or if its value is not of this kind with these keys.
    """
    if not file.is_file():
        return None
    check(file)
    try:
        value: Any = json.loads(files.read_bytes(file))
        if not isinstance(value, kind) or any(key not in value for key in keys):
            raise ValueError("it is no " + " with ".join([f"JSON {kind.__name__}", *keys]))
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it from a backup, or delete it to go on without it") from error


def _read(run: Path) -> dict[str, str]:
    """Checksums by relative path. Raises UserError if the manifest does not match its own checksum."""
    file = run / NAME
    if not file.is_file():
        return {}
    try:
        raw = json.loads(files.read_bytes(file))
        if raw["sha256"] != _digest(raw["files"]):
            raise ValueError("it does not match its own checksum")
        return dict(raw["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it: the files of this run are then read unchecked") from error


def _write(run: Path, checksums: dict[str, str]) -> None:
    ordered = dict(sorted(checksums.items()))
    files.write_json(run / NAME, {"files": ordered, "sha256": _digest(ordered)})


def _digest(checksums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
