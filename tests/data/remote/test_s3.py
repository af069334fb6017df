"""Sources behind s3://, on an S3 of this machine (moto) behind a server that can hinder it. Skips without moto and s3fs."""

from __future__ import annotations

import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from container_files import digit_rows, expected, looks, opened, tar_file, zip_bytes

from tltrain.core.errors import UserError
from tltrain.data.remote import copies

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class _Gate(ThreadingHTTPServer):
    """Hands all requests on to the S3. It can refuse them, and break answers off."""

    daemon_threads = True
    to, refuses, cuts = "", False, 0
    """Address of the S3; whether all is forbidden; how many answers from now on break off in their middle."""
    gets: list[str]
    """The ranges of the objects that were asked for; empty: whole."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Gate

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        heads = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length", "connection")}
        is_object = self.command == "GET" and "list-type" not in self.path
        if is_object:
            self.server.gets.append(self.headers.get("Range", ""))
        if self.server.refuses:
            self._answer(403, {"Content-Type": "application/xml"}, ACCESS_DENIED, len(ACCESS_DENIED))
            return
        try:
            request = urllib.request.Request(f"{self.server.to}{self.path}", data=body or None, method=self.command, headers=heads)
            found: Any = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            found = error
        content = found.read()
        size = int(found.headers.get("Content-Length") or len(content))
        passed = {name: value for name, value in found.headers.items() if name.lower() in ("etag", "last-modified", "content-range",
                                                                                         "content-type", "accept-ranges")}  # fmt: skip
        if is_object and self.server.cuts:
            self.server.cuts -= 1
            content, self.close_connection = content[: len(content) // 2], True
        self._answer(found.status, passed, content, size)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status: int, heads: dict[str, str], content: bytes, size: int) -> None:
        self.send_response(status)
        for name, value in heads.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 with the bucket `photos`."""
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def gate(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    running = _Gate(("127.0.0.1", 0), _Handler)
    running.to, running.gets = s3, []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    given = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "word", "DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}
    for name, value in {**given, "ENDPOINT_URL": f"http://127.0.0.1:{running.server_port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield running
    running.shutdown()
    running.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3: str, gate: _Gate) -> Any:
    """The S3 without the gate, and an empty bucket `photos` in it."""
    system = s3fs.S3FileSystem(endpoint_url=s3)
    if system.exists("photos"):
        system.rm("photos", recursive=True)
    system.mkdir("photos")
    return system


def test_an_object_is_copied_once_and_anew_where_it_has_changed(bucket: Any, gate: _Gate, caplog: pytest.LogCaptureFixture) -> None:
    bucket.pipe_file("photos/set/digits.zip", zip_bytes())
    url = "s3://photos/set/digits.zip"
    first = opened(f"zip:{url}")
    assert (looks(first.train), looks(first.test)) == (expected("train"), expected("test"))
    assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert gate.gets == [""], "the second time it is asked for alone"
    bucket.pipe_file("photos/set/digits.zip", zip_bytes(2))
    with caplog.at_level(logging.WARNING):
        assert opened(f"zip:{url}").classes == ("digit 0", "digit 1")
    assert f"{url} has changed since" in caplog.text
    bucket.rm("photos/set/digits.zip")
    with pytest.raises(UserError, match=r"digits.zip cannot be had: it is not there; its copy of .* is .*remote/s3/photos/set/digits.zip"):
        opened(f"zip:{url}")


def test_objects_are_listed_by_a_pattern_and_a_folder_and_a_table_has_its_images_beside_it(bucket: Any, tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for i, row in enumerate(digit_rows()):
        bucket.pipe_file(f"photos/table/images/{i} é+#.png", row.content)
        lines.append(f"images/{i} é+#.png,{row.label},{row.split}")
    bucket.pipe_file("photos/table/labels.csv", "\n".join(lines).encode())
    assert looks(opened("csv:s3://photos/table/labels.csv").test) == expected("test")
    for split in ("train", "val", "test"):
        rows = [row for row in digit_rows() if row.split == split]
        members = [pair for i, row in enumerate(rows) for pair in ((f"{i}.png", row.content), (f"{i}.cls", str(row.label).encode()))]
        bucket.pipe_file(f"photos/shards/{split}-0.tar", tar_file(tmp_path / "shard.tar", members).read_bytes())
    images = opened("webdataset:s3://photos/shards/*.tar")
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))
    assert opened("webdataset:s3://photos/shards/").fingerprint == images.fingerprint


def test_what_is_not_there_and_who_may_not_is_one_message(bucket: Any, gate: _Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^s3://photos/none.zip cannot be had: it is not there$"):
        opened("zip:s3://photos/none.zip")
    with pytest.raises(UserError, match=r"^s3://elsewhere/none.zip cannot be had: .*bucket does not exist"):
        opened("zip:s3://elsewhere/none.zip")
    with pytest.raises(UserError, match=r"webdataset:s3://photos/none-\*.tar, and no file is there"):
        opened("webdataset:s3://photos/none-*.tar")
    gate.refuses = True
    with pytest.raises(UserError, match=r"cannot be had: Forbidden. S3 takes AWS's own files and variables"):
        opened("zip:s3://photos/digits.zip")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        UserError, match=r"cannot be had: Unable to locate credentials. S3 takes AWS's own files and variables .*\"anon\": true"
    ):
        opened("zip:s3://photos/digits.zip")


def test_a_transfer_that_breaks_goes_on_where_it_was_and_one_that_always_breaks_is_not_taken(bucket: Any, gate: _Gate) -> None:
    content = os.urandom(1_000_000)
    bucket.pipe_file("photos/a.bin", content)
    gate.cuts = 1
    assert copies.copied("s3://photos/a.bin").read_bytes() == content
    assert gate.gets == ["", "bytes=500000-"]
    bucket.pipe_file("photos/b.bin", content)
    gate.cuts = 100
    with pytest.raises(UserError, match=r"^s3://photos/b.bin cannot be had: .*; start again$"):
        copies.copied("s3://photos/b.bin")
    folder = copies.place_of("s3://photos/b.bin").parent
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["a.bin"]
    gate.cuts = 0
    assert copies.copied("s3://photos/b.bin").read_bytes() == content


def test_a_copy_is_used_where_the_server_does_not_let_in_any_more(bucket: Any, gate: _Gate, caplog: pytest.LogCaptureFixture) -> None:
    bucket.pipe_file("photos/a.bin", b"content")
    copies.copied("s3://photos/a.bin")
    gate.refuses = True
    with caplog.at_level(logging.WARNING):
        assert copies.copied("s3://photos/a.bin").read_bytes() == b"content"
    assert "s3://photos/a.bin cannot be asked whether it has changed (Forbidden" in caplog.text
