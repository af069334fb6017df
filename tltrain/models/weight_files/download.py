"""Downloads of weights, with messages about source, size and progress."""

from __future__ import annotations

import hashlib
import http.client
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tltrain.core import files
from tltrain.core.output import escape, progress
from tltrain.core.output.console import brief, size

LARGE = 1_000_000
"""Smallest download that is announced, bytes. Configurations are smaller."""
CHUNK = 1 << 17
"""Bytes that are read at a time."""


class Transfer:
    """One download, or several that count as one. Says once that it begins, and reports how far it is. Threads may share it."""

    def __init__(self, what: str, origin: str) -> None:
        """what: a file or a repository. origin: the address that it comes from; its host is named."""
        self.what, self.host = what, urllib.parse.urlsplit(origin).netloc or origin
        self.done, self.began, self.said = 0, time.monotonic(), False
        self.lock = threading.Lock()

    def advance(self, num_bytes: int, total: int | None) -> None:
        """Count bytes that have arrived. total: of all, where it is known."""
        with self.lock:
            self.done += num_bytes
            first, self.said = not self.said and max(total or 0, self.done) >= LARGE, self.said or (total or self.done) >= LARGE
        if first:
            much = f"{size(total)} " if total else ""
            sys.stderr.write(f"tltrain: downloading {much}from {escape.line(self.host)}: {escape.line(self.what)}\n")
            sys.stderr.flush()
        if self.said:
            progress.report(self.text(total))

    def text(self, total: int | None) -> str:
        """Such as `downloading model.safetensors, 120 MB of 346 MB, 12 MB a second, 18 s left`."""
        per_s = self.done / max(time.monotonic() - self.began, 1e-9)
        of, left = (f" of {size(total)}", f", {brief(max(0, total - self.done) / max(per_s, 1e-9))} left") if total else ("", "")
        return f"downloading {self.what}, {size(self.done)}{of}, {size(per_s)} a second{left}"


def hub_bar(what: str, endpoint: str) -> type[Any]:
    """A class in place of the hub's progress bar, for its argument `tqdm_class`: it prints no bar, and reports bytes as `Transfer` does."""
    from huggingface_hub.utils.tqdm import tqdm

    transfer = Transfer(what, endpoint)

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"  # the others count files
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts_bytes and n:
                transfer.advance(int(n), int(self.total) if self.total else None)

    return Bar


def fetch(url: str, path: Path, hash_prefix: str = "") -> None:
    """Download a file. hash_prefix: what its SHA-256 begins with. Raises OSError for what does not arrive whole."""
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})  # the name that the servers of weights know
    transfer, digest = Transfer(path.name, url), hashlib.sha256()
    with urllib.request.urlopen(request) as answer, files.replacing(path) as temporary, temporary.open("wb") as file:
        length = answer.headers.get("Content-Length")
        total = int(length) if length is not None and length.isdigit() else None
        while part := _read(answer):
            file.write(part)
            digest.update(part)
            transfer.advance(len(part), total)
        if total is not None and transfer.done != total:
            raise OSError(f"the connection ended after {transfer.done:,} of {total:,} bytes")
        if not digest.hexdigest().startswith(hash_prefix):
            raise OSError(f"what {transfer.host} sent is not that file: its SHA-256 does not begin with {hash_prefix}")


def _read(answer: Any) -> bytes:
    try:
        part: bytes = answer.read(CHUNK)
    except http.client.HTTPException as error:
        raise OSError(f"the connection ended too early: {type(error).__name__}") from error
    return part
