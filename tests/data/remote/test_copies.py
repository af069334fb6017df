"""Sources behind a URL: fsspec's memory:// and a web server of this machine."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from container_files import digit_rows, expected, looks, opened, tar_file, zip_bytes

from tltrain.core import recipe as recipes
from tltrain.core.arguments.parsing import parse
from tltrain.core.arguments.words import source_of
from tltrain.core.errors import UserError
from tltrain.data.remote import copies, servers
from tltrain.data.remote.servers import State
from tltrain.data.splits import foreign

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    yield
    fsspec.filesystem("memory").store.clear()


def _put(name: str, content: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/{name}", content)
    return f"memory://{name}"


def _shard(root: Path, split: str, half: int) -> bytes:
    rows = [row for row in digit_rows() if row.split == split][half::2]
    members = [pair for i, row in enumerate(rows) for pair in ((f"{i}.png", row.content), (f"{i}.cls", str(row.label).encode()))]
    return tar_file(root / "shard.tar", members).read_bytes()


def _copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that are copied from now on."""
    fetched: list[str] = []
    fetch = copies._fetch

    def noted(url: str, place: Path, note: Path, expected: State) -> None:
        fetched.append(url)
        fetch(url, place, note, expected)

    monkeypatch.setattr(copies, "_fetch", noted)
    return fetched


def test_an_archive_behind_a_url_is_copied_once_and_anew_where_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetched = _copies(monkeypatch)
    url = _put("data/digits.zip", zip_bytes())
    first = opened(f"zip:{url}")
    for split, name in ((first.train, "train"), (first.val, "val"), (first.test, "test")):
        assert looks(split) == expected(name)
    assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert fetched == [url], "the second time it is asked for alone"
    _put("data/digits.zip", zip_bytes(2))
    with caplog.at_level(logging.WARNING):
        assert opened(f"zip:{url}").classes == ("digit 0", "digit 1")
    assert f"{url} has changed since" in caplog.text
    assert fetched == [url, url]


def test_a_copy_that_was_damaged_here_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = _put("set/digits.zip", zip_bytes())
    first = opened(f"zip:{url}")
    copy = copies.place_of(url)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-100] + bytes(100))
    with caplog.at_level(logging.WARNING):
        assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert "is not what was copied of" in caplog.text
    copy.touch()
    caplog.clear()
    assert copies.copied(url).read_bytes() == whole
    assert "copied" not in caplog.text, "another time and the same bytes: it is whole"
    noted = json.loads((copy.parent / ".digits.zip.copy.json").read_text())
    assert noted["stamp"] == [len(whole), copy.stat().st_mtime_ns], "the next start need not read it"


def test_a_file_that_is_gone_is_said_with_the_place_of_its_copy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^memory://set/nowhere.zip cannot be had: it is not there$"):
        opened("zip:memory://set/nowhere.zip")
    url = _put("set/digits.zip", zip_bytes())
    opened(f"zip:{url}")
    fsspec.filesystem("memory").rm("/set/digits.zip")
    with pytest.raises(UserError, match=r"digits.zip cannot be had: it is not there; its copy of .* is .*remote/memory/set/digits.zip"):
        opened(f"zip:{url}")


def test_patterns_ranges_and_folders_of_urls(tmp_path: Path) -> None:
    for split, half in (("train", 0), ("train", 1), ("val", 0), ("val", 1), ("test", 0), ("test", 1)):
        _put(f"shards/{split}-{half}.tar", _shard(tmp_path, split, half))
    images = opened("webdataset:memory://shards/*.tar")
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))
    assert images.train.ids[0] == "train-0.tar/0.png"
    assert opened("webdataset:memory://shards/").fingerprint == images.fingerprint
    train = opened("webdataset:memory://shards/train-{0..1}.tar", val_fraction=0, test_fraction=0)
    assert looks(train.train) == expected("train")
    with pytest.raises(UserError, match=r"train-2.tar cannot be had: it is not there"):
        opened("webdataset:memory://shards/train-{0..2}.tar")
    with pytest.raises(UserError, match=r"a web server lists no files; name them by a range"):
        opened("webdataset:https://localhost/train-*.tar")


def test_tables_of_parquet_and_csv(tmp_path: Path) -> None:
    lines = ["path,label,split"]
    for i, row in enumerate(digit_rows()):
        _put(f"set/images/{i} a.png", row.content)
        lines.append(f"images/{i} a.png,{row.label},{row.split}")
    images = opened(f"csv:{_put('set/labels.csv', chr(10).join(lines).encode())}")
    assert (looks(images.train), looks(images.test)) == (expected("train"), expected("test"))
    fsspec.filesystem("memory").rm("/set/images", recursive=True)
    assert opened("csv:memory://set/labels.csv").fingerprint == images.fingerprint, "images that are here are not asked for"
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {name: [getattr(row, name) for row in digit_rows()] for name in ("split", "label", "content")}
    file = io.BytesIO()
    pq.write_table(pa.table({"image": columns["content"], "label": columns["label"], "split": columns["split"]}), file)
    table = opened(f"parquet:{_put('set/digits.parquet', file.getvalue())}")
    assert looks(table.test) == expected("test")


@pytest.mark.parametrize("path", ["https://host/1.png", "../images/1.png", "a/../../1.png"])
def test_a_remote_table_names_images_beside_it(path: str) -> None:
    url = _put("set/labels.csv", f"path,label\n0.png,cat\n{path},dog\n".encode())
    with pytest.raises(UserError) as caught:
        opened(f"csv:{url}")
    assert str(caught.value) == f"{url}, line 3: path is {path}; a remote table names images beside it, such as cat/1.jpg"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://me:word@host/x.zip", "what stands before @"),
        ("https://host/x.zip?X-Amz-Signature=word&id=3", "X-Amz-Signature=…"),
        ("s3://host/x.zip?access_token=word", "access_token=…"),
    ],
)
def test_a_url_with_a_secret_is_refused_and_the_secret_is_not_repeated(url: str, what: str) -> None:
    with pytest.raises(UserError) as of_recipe:
        recipes.parse(f"data: {{source: 'zip:{url}'}}\nbackbone: {{name: resnet18}}\n", "a recipe")
    with pytest.raises(UserError) as of_word:
        source_of(f"zip:{url}")
    with pytest.raises(UserError) as of_copy:
        copies.copied(url)
    with pytest.raises(UserError) as of_flag:
        parse("plan", ["folder-resnet50", "--data.source", f"zip:{url}"])
    with pytest.raises(UserError) as bare:
        source_of(url)
    with pytest.raises(UserError) as bare_in_recipe:
        recipes.parse(f"data: {{source: '{url}'}}\nbackbone: {{name: resnet18}}\n", "a recipe")
    with pytest.raises(UserError) as for_evaluate:
        foreign(url)
    for caught in (of_recipe, of_word, of_copy, of_flag, bare, bare_in_recipe, for_evaluate):
        assert f"the URL holds a secret ({what})" in str(caught.value)
        assert "word" not in str(caught.value)


def test_a_bare_url_is_told_its_kind_and_one_without_a_host_is_one_message() -> None:
    with pytest.raises(UserError, match=r"http://host/x.zip is a URL, and no data source; did you mean zip:http://host/x.zip\?"):
        source_of("http://host/x.zip")
    with pytest.raises(UserError, match=r"say what it is, such as zip:https://host/x.zip"):
        source_of("s3://bucket/pictures")
    for ask in (source_of, copies.copied, lambda text: parse("plan", ["folder-resnet50", "--data.source", text])):
        with pytest.raises(UserError, match="the URL has a host that cannot be read"):
            ask("http://[x/p.zip" if ask is copies.copied else "zip:http://[x/p.zip")


def test_what_a_server_answers_is_shown_without_its_signature() -> None:
    said = servers.said("memory://a.zip", ValueError("403, url=URL('https://me:word@host/a.zip?X-Amz-Signature=abc')\nmore"))
    assert said == "403, url=URL('https://…@host/a.zip?…')"


def test_other_schemes_and_missing_libraries_are_one_message() -> None:
    with pytest.raises(UserError, match=r"nonsense://x/y.zip cannot be opened: .*nonsense"):
        opened("zip:nonsense://x/y.zip")
    with pytest.raises(UserError, match=r"folder:https://x/y; a folder is read on this machine alone: pack it, and give zip:URL"):
        opened("folder:https://x/y")


class _Server(ThreadingHTTPServer):
    """A web server of one file, whose answers can be spoilt."""

    content, tag, cut, heads, gets = b"", "1", 0, 0, 0


@pytest.fixture
def server() -> Iterator[_Server]:
    class Handler(BaseHTTPRequestHandler):
        server: _Server

        def _head(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.content)))
            if self.server.tag:
                self.send_header("ETag", f'"{self.server.tag}"')
            self.end_headers()

        def do_HEAD(self) -> None:
            self.server.heads += 1
            self._head()

        def do_GET(self) -> None:
            self.server.gets += 1
            self._head()
            self.wfile.write(self.server.content[: len(self.server.content) - self.server.cut])

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_web_server_is_asked_for_the_tag_and_a_download_that_stops_is_not_taken(
    server: _Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/digits.zip"
    server.content, server.cut = zip_bytes(), 1000
    with pytest.raises(UserError, match=rf"^{url} (cannot be had|did not arrive whole): "):
        opened(f"zip:{url}")
    place = copies.place_of(url)
    assert not place.exists()
    server.cut = 0
    first = opened(f"zip:{url}")
    assert looks(first.test) == expected("test")
    assert json.loads((place.parent / ".digits.zip.copy.json").read_text())["state"] == [len(server.content), '"1"']
    gets = server.gets
    assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert server.gets == gets, "asked for its head alone"
    server.tag = "2"
    opened(f"zip:{url}")
    assert server.gets == gets + 1
    server.tag, server.cut = "3", 1000
    with pytest.raises(UserError, match=r"cannot be had|did not arrive whole"):
        opened(f"zip:{url}")
    assert place.read_bytes() == server.content, "the copy from before stays"


def test_without_a_tag_a_change_of_the_same_size_is_copied_and_what_is_the_same_keeps_its_time(
    server: _Server, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/some.bin"
    server.content, server.tag = b"one", ""
    place = copies.copied(url)
    before = place.stat().st_mtime_ns
    with caplog.at_level(logging.WARNING):
        assert copies.copied(url) == place
    assert f"{url}: its server sends no tag, so a change of it cannot be told: it is copied anew" in caplog.text
    assert place.stat().st_mtime_ns == before, "else a process that reads it would take it for another"
    server.content = b"two"
    assert copies.copied(url).read_bytes() == b"two"


def test_names_with_a_hash_sign_have_places_of_their_own_and_a_copy_of_another_url_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    one, two = (copies.copied(_put(f"b/f#{i}.tar", str(i).encode())) for i in (1, 2))
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")
    url = "memory://b/f#1.tar"
    note = one.with_name(f".{one.name}.copy.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "url": "memory://other.tar"}))
    with caplog.at_level(logging.WARNING):
        assert copies.copied(url).read_bytes() == b"1"
    assert f"is a copy of memory://other.tar: it is copied anew, from {url}" in caplog.text


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [f"{'ä' * 125}{i}.zip" for i in (1, 2)]
    places = [copies.copied(_put(f"{'d' * 300}/{name}", name.encode())) for name in names]
    assert [place.read_bytes().decode() for place in places] == names
    assert all(place.suffix == ".zip" for place in places)


def test_a_folder_of_lmdb_behind_a_url_is_told_its_file() -> None:
    _put("all/set/data.mdb", b"x")
    for url in ("memory://all/set", "memory://all/set/"):
        with pytest.raises(UserError, match=rf"{url} is a folder; give a file, which of a database of LMDB is the data.mdb in it"):
            copies.copied(url)


def test_without_a_server_the_copy_is_used_and_the_log_says_so(server: _Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/digits.zip"
    server.content = zip_bytes()
    first = opened(f"zip:{url}")
    server.shutdown()
    server.server_close()
    with caplog.at_level(logging.WARNING):
        assert opened(f"zip:{url}").fingerprint == first.fingerprint
    assert f"{url} cannot be asked whether it has changed" in caplog.text
