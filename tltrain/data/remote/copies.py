"""Local copies of files that a URL names. A later start asks whether the file there is still the same, and copies nothing anew if so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.core.output import progress
from tltrain.core.output.progress import Pace
from tltrain.core.paths import absolute, cache_root
from tltrain.core.schema.data import is_url, secret_in
from tltrain.data.remote.servers import State, Unanswered, answered, is_web, plainly, state_of, system_of

SECRETS = (
    "a recipe is written into the run folder and may be published. Leave it out, and let the library find it: ~/.netrc for https, AWS's "
    "and Google's own files and variables for s3 and gs, or FSSPEC_HTTPS and the like for other options of fsspec"
)
AT_ONCE = 16
"""Images of a table that are fetched at a time."""

_log = logging.getLogger(__name__)


class Copy(NamedTuple):
    """The record of a local copy."""

    state: State
    """Of the remote file when it was copied."""
    stamp: tuple[int, int]
    """Size and time (ns) of the copy."""
    digest: str
    """SHA-256 of the copy."""
    when: str
    """Local time of the copy."""


def local(argument: str | None) -> Path:
    """The file that an argument names: a path made absolute, or the local copy of a URL. Raises UserError where that cannot be had."""
    return copied(argument) if argument and is_url(argument) else absolute(argument or "")


def copied(url: str) -> Path:
    """The local copy of a remote file: fetched where there is none, where the remote file has changed or may have, or the copy is damaged.

    Raises UserError where it cannot be had whole. Where the server does not answer, a whole copy is used, and the log says so.
    """
    place = place_of(url)
    place.parent.mkdir(parents=True, exist_ok=True)
    note = place.with_name(f".{place.name}.copy.json")
    with files.downloading(note.with_suffix(".lock"), f"downloads {url}"):
        known = _whole(place, note, url)
        try:
            now = state_of(url)
        except Unanswered as error:
            if known is None or error.is_gone:
                kept = f"; its copy of {known.when} is {place}" if known else ""
                raise UserError(f"{url} cannot be had: {error}{kept}") from None
            _log.warning("%s cannot be asked whether it has changed (%s): its copy of %s is used", url, error, known.when)
            return place
        is_same = known is not None and known.state == now
        if is_same and now.tag:
            return place
        if is_same:
            _log.warning("%s: its server sends no tag, so a change of it cannot be told: it is copied anew", url)
        elif known is not None:
            _log.warning("%s has changed since %s (then %s; now %s): it is copied anew", url, known.when, known.state, now)
        _fetch(url, place, note, now)
    return place


def place_of(url: str) -> Path:
    """Where the copy of a URL lies: below remote/ of the cache, as it lies there. Raises UserError for a URL with a password or a token."""
    try:
        what = secret_in(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    if what:
        raise UserError(f"the URL holds a secret ({what}); {SECRETS}")
    parts = urllib.parse.urlsplit(url)
    names = [files.short_name(name) for name in PurePosixPath(urllib.parse.unquote(parts.path)).parts if name not in ("/", ".", "..")]
    if not names:
        raise UserError(f"{url} names no file; give the URL of a file")
    if more := parts.query + (f"#{parts.fragment}" if parts.fragment else ""):  # another file under the same name
        names.insert(-1, hashlib.blake2b(more.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest())
    return cache_root().joinpath("remote", parts.scheme, files.short_name(parts.netloc) or "_", *names)


def listed(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """The URLs that a pattern with * or a folder means, sorted; a URL of a file is itself. Raises UserError where they cannot be listed."""
    name = urllib.parse.urlsplit(pattern).path
    is_folder = name.endswith("/")
    if not is_folder and "*" not in name:
        return [pattern]
    if pattern.startswith(("http:", "https:")):
        raise UserError(f"{pattern}: a web server lists no files; name them by a range, such as train-{{000..146}}{suffixes[0]}")
    with answered(pattern):
        system, path = system_of(pattern)
        found = files.waited(lambda: system.find(path) if is_folder else system.glob(path))
        urls = sorted(str(system.unstrip_protocol(one)) for one in found)
    return [url for url in urls if not is_folder or url.lower().endswith(tuple(suffixes))]


def images_of(table: str, paths: Sequence[str]) -> None:
    """Fetch the images that a remote table names by paths beside it. paths: where their copies belong; others are passed over.

    A copy that is there stays. Images that are not there are left to the scan, which counts them. Raises UserError as `copied`.
    """
    home = place_of(table).parent
    base = table.partition("?")[0].rpartition("/")[0]
    wanted = [path for path in map(Path, paths) if path.is_relative_to(home) and ".." not in path.parts and not path.exists()]
    if not wanted:
        return
    for folder in {path.parent for path in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
    pace = Pace(f"images of {table} fetched", len(wanted))
    system, _ = system_of(table)

    def fetch(path: Path) -> None:
        url = f"{base}/{urllib.parse.quote(path.relative_to(home).as_posix()) if is_web(base) else path.relative_to(home).as_posix()}"
        with contextlib.suppress(FileNotFoundError), files.replacing(path, synced=False) as temporary:
            temporary.write_bytes(system.cat_file(system._strip_protocol(url), **plainly(system)))

    with answered(table):
        for first in range(0, len(wanted), 1000):
            for _ in files.in_parallel(fetch, wanted[first : first + 1000], num_threads=AT_ONCE):
                pace.advance()


def _fetch(url: str, place: Path, note: Path, expected: State) -> None:
    """Copy a file. It takes its place only where it arrived whole, and was the same before and after."""
    from fsspec.callbacks import Callback

    class Heard(Callback):  # type: ignore[misc]  # fsspec ships no types
        def call(self, hook_name: Any = None, **kwargs: Any) -> None:
            of = f" of {expected.size / 1e6:,.1f}" if expected.size else ""
            said[0] = f"{place.name}: {self.value / 1e6:,.1f}{of} MB copied"

    said = [f"{place.name}: asked for"]
    system, path = system_of(url)
    _log.info("copying %s to %s", url, place)
    with files.replacing(place) as temporary:
        with answered(url):
            _told(lambda: system.get_file(path, str(temporary), callback=Heard(), **plainly(system)), said)
        arrived = temporary.stat().st_size
        if expected.size is not None and arrived != expected.size:
            raise UserError(f"{url} did not arrive whole: {arrived:,} of {expected.size:,} bytes; start again")
        with answered(url):
            now = state_of(url)
        if now != expected:
            raise UserError(f"{url} changed while it was copied; start again once nobody writes it")
        digest = files.waited(lambda: files.sha256(temporary))
        if place.is_file() and place.stat().st_size == arrived and files.waited(lambda: files.sha256(place)) == digest:
            os.utime(temporary, ns=(place.stat().st_atime_ns, place.stat().st_mtime_ns))  # the same bytes: who reads them goes on
        note.unlink(missing_ok=True)  # of the copy that is replaced now
    status = place.stat()
    copy = Copy(expected, (status.st_size, status.st_mtime_ns), digest, time.strftime("%Y-%m-%d %H:%M"))
    files.write_json(note, {"url": url, **copy._asdict()})


def _told(work: Callable[[], Any], said: list[str]) -> None:
    """As `files.waited`, with a report of what the work says of itself."""
    for _ in files.in_parallel(lambda call: call(), [work], limit_s=float("inf")):
        progress.report(said[0])


def _whole(place: Path, note: Path, url: str) -> Copy | None:
    """The record of a copy. None if there is none, if it is of another URL, or if the copy is damaged."""
    try:
        value = json.loads(note.read_text(encoding="utf-8"))
        copy = Copy(State(*value["state"]), (value["stamp"][0], value["stamp"][1]), value["digest"], value["when"])
        status = place.stat()
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        _log.warning("%s is damaged; the file is copied anew", note)
        return None
    if value.get("url") != url:
        _log.warning("%s is a copy of %s: it is copied anew, from %s", place, value.get("url"), url)
        return None
    stamp = (status.st_size, status.st_mtime_ns)
    if stamp != copy.stamp:
        if files.waited(lambda: files.sha256(place)) != copy.digest:
            _log.warning("%s is not what was copied of %s: it is copied anew", place, url)
            return None
        copy = copy._replace(stamp=stamp)  # so that the next start need not read it
        files.write_json(note, {"url": url, **copy._asdict()})
    return copy
