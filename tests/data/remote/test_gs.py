"""Sources behind gs://, on an emulator of this machine (gcp-storage-emulator), whose objects gcsfs puts there. Skips without the two."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from container_files import digit_rows, expected, looks, opened, tar_file, zip_bytes

from tltrain.core.errors import UserError
from tltrain.data.remote import copies

with mock.patch.dict(os.environ, GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false"):  # else it asks for a minute by gRPC, which no emulator speaks
    gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new emulator with the empty bucket `photos`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    gcsfs.GCSFileSystem.clear_instance_cache()
    with emulator.create_server(host, port, in_memory=True, default_bucket="photos") as running:
        yield running
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: Any) -> Any:
    """gcsfs on the emulator."""
    return gcsfs.GCSFileSystem(token="anon", use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that are copied from now on."""
    urls: list[str] = []
    fetch = copies._fetch

    def noted(url: str, *rest: Any) -> None:
        urls.append(url)
        fetch(url, *rest)

    monkeypatch.setattr(copies, "_fetch", noted)
    return urls


def test_an_object_is_copied_once_and_anew_where_it_has_changed(
    bucket: Any, server: Any, fetched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    bucket.pipe_file("photos/set/digits.zip", zip_bytes())
    url = "gs://photos/set/digits.zip"
    first = opened(f"zip:{url}")
    assert (looks(first.train), looks(first.test)) == (expected("train"), expected("test"))
    assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert fetched == [url], "the second time it is asked for alone"
    bucket.pipe_file("photos/set/digits.zip", zip_bytes(2))
    with caplog.at_level(logging.WARNING):
        assert opened(f"zip:{url}").classes == ("digit 0", "digit 1")
    assert f"{url} has changed since" in caplog.text
    server.wipe(keep_buckets=True)  # gcsfs deletes by batches, which the emulator does not take
    with pytest.raises(UserError, match=r"digits.zip cannot be had: it is not there; its copy of .* is .*remote/gs/photos/set/digits.zip"):
        opened(f"zip:{url}")


def test_shards_are_listed_by_a_pattern_and_a_table_has_its_images_beside_it(bucket: Any, tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for i, row in enumerate(digit_rows()):
        bucket.pipe_file(f"photos/table/images/{i} é.png", row.content)
        lines.append(f"images/{i} é.png,{row.label},{row.split}")
    bucket.pipe_file("photos/table/labels.csv", "\n".join(lines).encode())
    assert looks(opened("csv:gs://photos/table/labels.csv").test) == expected("test")
    for split in ("train", "val", "test"):
        rows = [row for row in digit_rows() if row.split == split]
        members = [pair for i, row in enumerate(rows) for pair in ((f"{i}.png", row.content), (f"{i}.cls", str(row.label).encode()))]
        bucket.pipe_file(f"photos/shards/{split}-0.tar", tar_file(tmp_path / "shard.tar", members).read_bytes())
    images = opened("webdataset:gs://photos/shards/*.tar")
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))
    with pytest.raises(UserError, match=r"webdataset:gs://photos/none-\*.tar, and no file is there"):
        opened("webdataset:gs://photos/none-*.tar")


def test_what_is_not_there_is_one_message_and_a_copy_is_used_without_the_server(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for absent in ("photos/none.zip", "elsewhere/none.zip"):
        with pytest.raises(UserError, match=rf"^gs://{absent} cannot be had: it is not there$"):
            opened(f"zip:gs://{absent}")
    bucket.pipe_file("photos/digits.zip", zip_bytes())
    first = opened("zip:gs://photos/digits.zip")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free.getsockname()[1]}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    with caplog.at_level(logging.WARNING):
        assert opened("zip:gs://photos/digits.zip").fingerprint == first.fingerprint
    assert "gs://photos/digits.zip cannot be asked whether it has changed" in caplog.text
