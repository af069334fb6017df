"""Access to file servers through fsspec: a file's version, time limits, and errors as one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from tltrain.core import files
from tltrain.core.errors import UserError, first_line

TAGS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
"""Keys that identify a file's version, the best first, as fsspec's file systems name them."""
LMDB = "data.mdb"
"""The file within the folder that LMDB makes."""
NEEDED = "pip install 'tltrain[remote]'"
ACCESS = {
    "s3": "S3 takes AWS's own files and variables (aws configure; AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL for a server other than "
    "Amazon's), and for public files FSSPEC_S3='{\"anon\": true}'",
    "gs": "Google Cloud takes its own files and variables (gcloud auth application-default login; GOOGLE_APPLICATION_CREDENTIALS), and for "
    'public files FSSPEC_GS=\'{"token": "anon"}\'',
    "https": "https takes names and passwords of ~/.netrc, and headers of FSSPEC_HTTPS",
}
"""Where each scheme has what lets it in."""
REFUSED = re.compile(r"(?i)credential|forbidden|access ?denied|unauthori[sz]ed|anonymous caller|\b40[13]\b")


class State(NamedTuple):
    """A file's version at its server. Equal versions are the same file."""

    size: int | None
    """Bytes. None: it does not say."""
    tag: str
    """An ETag, a checksum or a time. Empty: it says none of them."""

    def __str__(self) -> str:
        size = "a size that it does not say" if self.size is None else f"{self.size:,} bytes"
        return f"{size}, {self.tag or 'no tag'}"


class Unanswered(Exception):
    """A server did not say what was asked."""

    def __init__(self, url: str, error: Exception) -> None:
        why = error.__cause__ if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) else error
        self.is_gone = isinstance(why, FileNotFoundError) or getattr(why, "status", None) in (404, 410)  # else a server was not reached
        super().__init__("it is not there" if self.is_gone else said(url, why))


def state_of(url: str) -> State:
    """Asks the server for a file's version. Raises Unanswered, and UserError where a library for it is missing."""
    system, path = system_of(url)
    try:
        info = files.waited(partial(system.info, path))
    except Exception as error:  # of any library and its network
        raise Unanswered(url, error) from None
    if info.get("type") == "directory":
        several = "parquet: and webdataset: take a folder with / at its end"
        raise UserError(f"{url} is a folder; give a file, which of a database of LMDB is the {LMDB} in it; {several}")
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    return State(info.get("size"), tag)


def system_of(url: str) -> tuple[Any, str]:
    """(fsspec's file system of a URL, the path there). Raises UserError where a library for it is missing."""
    scheme = url.partition(":")[0]
    try:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": False, "use_listings_cache": False}
        if is_web(url):
            import aiohttp

            waits = aiohttp.ClientTimeout(total=None, sock_connect=files.ANSWER_S, sock_read=files.ANSWER_S)
            configured = fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
            options["client_kwargs"] = {"trust_env": True, "timeout": waits} | configured  # trust_env: proxies, ~/.netrc
        system = fsspec.filesystem(scheme, **options)
        return system, str(system._strip_protocol(url))
    except ImportError as error:
        raise UserError(f"{url} needs a library that is not here ({error}): {NEEDED}") from error
    except Exception as error:  # an unknown scheme, or credentials that are not there
        raise UserError(f"{url} cannot be opened: {said(url, error)}") from None


@contextlib.contextmanager
def answered(url: str) -> Iterator[None]:
    """Inside, what the libraries raise becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Unanswered, Exception) as error:
        raise UserError(f"{url} cannot be had: {error if isinstance(error, Unanswered) else said(url, error)}; start again") from None


def plainly(system: Any) -> dict[str, Any]:
    """Asks a web server for the bytes as they are: packed ones have another size than it says."""
    is_http = "https" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)
    return {"headers": {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}} if is_http else {}


def is_web(url: str) -> bool:
    return url.startswith(("http:", "https:"))


def said(url: str, error: Exception) -> str:
    """The first line of an error, and where access is had if it was refused.

    Without what may be secret: a server may have answered with an address that is signed.
    """
    access = ACCESS.get({"s3a": "s3", "gcs": "gs", "http": "https"}.get(scheme := url.partition(":")[0], scheme), "")
    line = re.sub(r"(//[^\s?'\")]*)\?[^\s'\")]*", r"\1?…", re.sub(r"//[^/@\s]*@", "//…@", first_line(error)))
    return f"{line}. {access}" if access and REFUSED.search(line) else line
