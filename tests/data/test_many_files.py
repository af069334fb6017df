"""What lets a million files be read: names in one buffer, a record that grows, a stop that is heard, checks that read less."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tltrain.core.errors import UserError
from tltrain.core.output import progress
from tltrain.core.recipe import Data
from tltrain.data import DataSplits, open_images
from tltrain.data.scans import record, stats
from tltrain.data.scans.found import Found, Scanned
from tltrain.data.scans.record import Record
from tltrain.data.sources import scan as scanning
from tltrain.data.splits import cut, split_names
from tltrain.data.tables.texts import Texts, same_as


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _folder(root: Path, num: int = 20, side: int = 6, suffix: str = "png") -> Path:
    for k, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for i in range(num):
            pixels = np.random.default_rng(1000 * k + i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.{suffix}")
    return root


def _open(root: Path, **options: Any) -> DataSplits:
    return open_images(Data(source=f"folder:{root}", **options))


def _records(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "scans").glob("*.scan"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that a scan reads and decodes, as it goes."""
    names: list[str] = []
    real = scanning._read
    monkeypatch.setattr(scanning, "_read", lambda path, white: names.append(f"{path.parent.name}/{path.name}") or real(path, white))  # type: ignore[func-returns-value]
    return names


# --- names in one buffer

NAMES = ("a/0.png", "é/ü.png", "", "a/0.png", "\udcff.png", "b")


def test_texts_are_what_a_tuple_of_them_is() -> None:
    texts = Texts.of(iter(NAMES))
    assert texts == NAMES
    assert (NAMES == texts) is True  # noqa: SIM300  # the tuple asks first
    assert hash(texts) == hash(NAMES)
    assert list(texts) == list(NAMES)
    assert (texts[1], texts[-1], len(texts)) == ("é/ü.png", "b", 6)
    assert texts[::-1] == NAMES[::-1]
    assert texts.take(np.array([4, 0, 0])) == ("\udcff.png", "a/0.png", "a/0.png")
    assert texts.with_prefix("/data/")[1] == "/data/é/ü.png"
    assert list(texts.with_prefix("/d/")) == [f"/d/{name}" for name in NAMES]
    assert texts != (*NAMES[:-1], "c")
    with pytest.raises(IndexError):
        texts[6]


def test_texts_beyond_one_part_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {i % 7}/{i}{'ü' * (i % 5 == 0)}" for i in range(1000)]
    monkeypatch.setattr("tltrain.data.tables.texts.PART", 64)
    texts, order = Texts.of(names), np.random.default_rng(0).permutation(1000)
    assert list(texts) == names
    assert list(texts.take(order)) == [names[i] for i in order]


def test_a_pickle_of_names_holds_no_object_for_each() -> None:
    names = Texts.of(f"{i:07}" for i in range(20_000))
    assert len(pickle.dumps(names)) < 20_000 * (7 + 8) + 1000
    assert pickle.loads(pickle.dumps(names)) == names


@pytest.mark.parametrize("texts", [NAMES, ("0" * 32, "1" * 32, "0" * 32), ("x",), ()])
def test_the_first_of_equal_texts(texts: tuple[str, ...]) -> None:
    expected = [texts.index(text) for text in texts]
    assert same_as(texts).tolist() == same_as(Texts.of(texts)).tolist() == expected


def test_single_images_are_cut_as_groups_of_one_are() -> None:
    """The quick way for images without groups, against the walk over groups."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        label_N, group_N = random.integers(0, 5, 200), random.permutation(200)
        alone, walked = cut(label_N, group_N, 0.3, seed), cut(np.append(label_N, [5, 5]), np.append(group_N, [500, 500]), 0.3, seed)
        assert walked[-2:].tolist() == [False, False], "a pair, which is all of its class, makes it walk"
        assert np.bincount(label_N[alone], minlength=5).tolist() == np.bincount(label_N[walked[:200]], minlength=5).tolist()


def test_names_of_splits_in_the_order_of_the_source(tmp_path: Path) -> None:
    images = _open(_folder(tmp_path / "d"))
    assert images.source is not None
    assert images.val is not None
    assert images.test is not None
    names = dict(zip(images.source.ids, split_names(images), strict=True))
    for part in (images.train, images.val, images.test):
        assert {names[name] for name in part.ids} == {part.name}


# --- the record


def test_a_record_is_read_back_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    found = Found.of([Scanned("ab" * 16, None, "all black", 7), Scanned("", "the file is empty"), Scanned("01" * 16, None, decoded=False)])
    now = Record(Texts.of(["x", "y", "z"], "/d/"), np.array([1, 2, 3]), np.array([4, 5, 6]), found)
    file = tmp_path / "x.scan"
    record.replace(file, now)
    for num_more in range(2):
        known = record.load(file)
        assert known is not None
        assert list(known.paths) == ["/d/x", "/d/y", "/d/z", "/d/x"][: 3 + num_more]
        assert known.rows(now.paths, now.size_N, np.array([4, 5, 7])).tolist() == [3 * num_more, 1, -1]
        assert known.rows(Texts.of(["/d/z", "/d/w"]), np.array([3, 1]), np.array([6, 4])).tolist() == [2, -1]
        assert [known.found.words[k] for k in known.found.problem_N[:3]] == ["", "the file is empty", ""]
        assert known.found.digests()[0] == "ab" * 16
        assert known.found.highest_N[:3].tolist() == [7, -1, -1]
        record.append(file, now.part(np.array([0]), found.take(np.array([0]))))  # a second block changes nothing
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)
    assert record.load(file) is None, "the first block is damaged, and those behind it are left out"


def test_a_scan_that_is_killed_goes_on_where_it_was(tmp_path: Path, read: list[str]) -> None:
    """By SIGKILL, in a process of its own: nothing of it runs any more."""
    root = _folder(tmp_path / "d")
    code = f"""
import os, signal
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.sources import scan
scan.KEPT, append, blocks = 5, scan.records.append, []
def append_and_die(file, record):
    append(file, record)
    blocks.append(file)
    if len(blocks) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
scan.records.append = append_and_die
open_images(Data(source={f"folder:{root}"!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == -signal.SIGKILL
    (file,) = _records(tmp_path)
    with file.open("ab") as out:
        out.write(b"tltrain scan 1\n\0 half a block")  # what a kill within a write leaves
    before = record.load(file)
    assert before is not None
    assert len(before.paths) == 15
    images = _open(root)
    assert sorted(read) == sorted(
        {f"{c}/{i:03}.png" for c in "ab" for i in range(20)} - {"/".join(Path(p).parts[-2:]) for p in before.paths}
    )
    shutil.rmtree(tmp_path / "cache")
    assert _open(root).fingerprint == images.fingerprint


def test_a_stop_is_heard_while_the_disk_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener ends the scan, as a signal to another process does; what was read before is kept."""
    root, real, began = _folder(tmp_path / "d"), scanning._read, time.monotonic()

    def stuck(path: Path, white: int | None) -> Any:
        if path.parent.name == "b":
            threading.Event().wait()
        return real(path, white)

    def stop(how_far: str) -> None:
        if _records(tmp_path):
            raise KeyboardInterrupt
        assert time.monotonic() - began < 60, "nothing is kept, and the disk will never answer"

    monkeypatch.setattr(scanning, "KEPT", 10)
    monkeypatch.setattr(scanning, "_read", stuck)
    with progress.heard_by(stop), pytest.raises(KeyboardInterrupt):
        _open(root)
    kept = record.load(_records(tmp_path)[0])
    assert kept is not None
    assert 10 <= len(kept.paths) <= 20


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path, read: list[str]) -> None:
    root = _folder(tmp_path / "d")
    first = _open(root).fingerprint
    (file,) = _records(tmp_path)
    known = record.load(file)
    assert known is not None
    rows = zip(known.paths, known.size_N.tolist(), known.time_N.tolist(), known.found.digests(), strict=True)
    old = {f"{path}|{size}|{time}": astuple(Scanned(digest, None))[:4] for path, size, time, digest in rows}
    file.unlink()
    file.with_suffix(".json").write_text(json.dumps(old))
    read.clear()
    assert _open(root).fingerprint == first
    assert read == []
    assert _records(tmp_path) == [file]
    assert not file.with_suffix(".json").exists()


@pytest.mark.parametrize("damage", ["torn", "earlier version"])
def test_what_a_stopped_scan_adds_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Behind half a block, which a kill within a write leaves, and beside the record of an earlier version."""
    root = _folder(tmp_path / "d")
    _open(root)
    (file,) = _records(tmp_path)
    known = record.load(file)
    assert known is not None
    if damage == "torn":
        with file.open("ab") as out:
            out.write(record.MARK + b"half a block")
    else:
        rows = zip(known.paths, known.size_N.tolist(), known.time_N.tolist(), known.found.digests(), strict=True)
        old = {f"{path}|{size}|{time}": astuple(Scanned(digest, None))[:4] for path, size, time, digest in rows}
        file.unlink()
        file.with_suffix(".json").write_text(json.dumps(old))
    for i in range(10):
        shutil.copy(root / "a" / f"{i:03}.png", root / "a" / f"more {i}.png")

    def append_and_stop(file: Path, new: Record) -> None:
        append(file, new)
        raise KeyboardInterrupt

    append = record.append
    monkeypatch.setattr(record, "append", append_and_stop)
    with pytest.raises(KeyboardInterrupt):
        _open(root)
    kept = record.load(file)
    assert kept is not None
    assert len(kept.paths) == 50


def test_what_a_lesser_check_decodes_does_not_depend_on_when_files_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tltrain.data.scans.sketch.DECODED", {"sample": (0.2, 4)})
    root, later = _large(tmp_path / "d"), tmp_path / "later"
    later.mkdir()
    for i in range(10):
        (root / "a" / f"{i:03}.png").rename(later / f"{i:03}.png")
    _open(root, check="sample")
    for path in later.iterdir():
        path.rename(root / "a" / path.name)
    notes = _open(root, check="sample").notes
    shutil.rmtree(tmp_path / "cache")
    assert notes == _open(root, check="sample").notes


def test_what_is_known_is_taken_without_the_lock(tmp_path: Path) -> None:
    root = _folder(tmp_path / "d")
    first = _open(root).fingerprint
    with next((tmp_path / "cache" / "scans").glob("*.lock")).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert _open(root).fingerprint == first


@pytest.mark.parametrize("slow_s", [0.0, 1.0], ids=["many threads", "one"])
def test_sizes_and_times_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_s: float) -> None:
    monkeypatch.setattr(stats, "PART", 8)
    monkeypatch.setattr(stats, "SLOW_S", slow_s)
    for i in range(50):
        (tmp_path / f"{i}").write_bytes(bytes(i))
        os.utime(tmp_path / f"{i}", ns=(i, 1000 + i))
    size_N, time_N = stats.sizes_and_times([str(tmp_path / f"{i}") for i in range(60)])
    assert size_N.tolist() == [*range(50), *[stats.ABSENT] * 10]
    assert time_N.tolist() == [*range(1000, 1050), *[stats.ABSENT] * 10]


# --- checks that read less


def _large(root: Path) -> Path:
    return _folder(root, num=60, side=110)  # some 36 KB each: more than beginning and end


@pytest.mark.parametrize("check", ["sample", "headers"])
def test_a_lesser_check_decodes_some_and_says_what_it_cannot_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], check: str
) -> None:
    monkeypatch.setattr("tltrain.data.scans.sketch.DECODED", {"sample": (0.2, 0), "headers": (0.0, 4)})
    root = _large(tmp_path / "d")
    images = _open(root, check=check)
    assert 0 < len(read) < 60
    (note,) = images.notes
    assert note.startswith(f"data.check is {check}: {len(read)} of 120 images were decoded, and of the others the first 16 and last 4 KiB")
    again = _open(root, check=check)
    assert (again.fingerprint, again.notes) == (images.fingerprint, images.notes)
    assert len(images.train) + len(images.val or ()) + len(images.test or ()) == 120
    full = _open(root)
    assert full.notes == ()
    assert full.fingerprint != images.fingerprint, "its hashes are of the whole files"


def test_headers_see_what_is_cut_off_and_what_is_no_image_but_not_damage_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tltrain.data.scans.sketch.DECODED", {"headers": (0.0, 0)})
    root = _large(tmp_path / "d")
    whole = (root / "a" / "000.png").read_bytes()
    (root / "a" / "000.png").write_bytes(whole[:-100])
    (root / "a" / "001.png").write_bytes(b"<html></html>" + bytes(30_000))
    flipped = bytearray((root / "a" / "002.png").read_bytes())
    flipped[20_000] ^= 255
    (root / "a" / "002.png").write_bytes(flipped)
    bad, _ = _open(root, check="headers", max_unreadable=0.05).notes
    assert bad.startswith("2 of 120 images cannot be read and are left out")
    assert "000.png (" in bad
    assert "001.png (a web page" in bad
    assert _open(root, max_unreadable=0.05).notes[0].startswith("3 of 120 images cannot be read")
    images = _open(root, check="headers", max_unreadable=0.05, val_fraction=0, test_fraction=0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(
        UserError, match=r"002\.png .*data\.check is headers, so that not every image was decoded before: data\.check: full"
    ):
        images.train.read(list(images.train.ids).index("a/002.png"))


def test_a_change_at_the_end_of_a_file_is_other_data_to_every_check(tmp_path: Path) -> None:
    root = _folder(tmp_path / "d", num=10, side=110, suffix="bmp")
    first = {check: _open(root, check=check).fingerprint for check in ("full", "sample", "headers")}
    content = (root / "a" / "000.bmp").read_bytes()
    (root / "a" / "000.bmp").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    os.utime(root / "a" / "000.bmp", ns=(1, 1))
    assert all(_open(root, check=check).fingerprint != first[check] for check in first)


def test_unreadable_images_of_a_sample_are_held_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tltrain.data.scans.sketch.chosen", lambda ids, num, check: np.arange(num) < 10)
    monkeypatch.setattr(scanning, "chosen", lambda ids, num, check: np.arange(num) < 10)
    root = _large(tmp_path / "d")
    for i in range(2):
        flipped = bytearray((root / "a" / f"{i:03}.png").read_bytes())
        flipped[20_000] ^= 255
        (root / "a" / f"{i:03}.png").write_bytes(flipped)
    with pytest.raises(UserError, match=r"2 of 10 decoded images cannot be read, and max_unreadable = 0\.02 allows 1"):
        _open(root, check="sample", max_unreadable=0.02)


def test_a_source_that_is_read_in_full_says_so(tmp_path: Path) -> None:
    _folder(tmp_path / "d")
    archive = shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "d")
    (note,) = open_images(Data(source=f"zip:{archive}", check="headers")).notes
    assert note.startswith("data.check is headers, and zip:")
    assert note.endswith("is read in full: the check is of images that are files of their own")


# --- progress


def test_a_log_hears_of_a_scan_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last", {"report": 0.0, "line": 0.0})
    pace = progress.Pace("images read", 3000)
    for _ in range(1500):
        now[0] += 0.1
        pace.advance()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("of 3,000 images read, 10 a second, 0:0" in line for line in said)


@pytest.mark.slow
def test_sixty_thousand_files_take_little_memory(tmp_path: Path) -> None:
    """Hard links to forty pictures. The margins are wide: only an object for each file passes them."""
    base = _folder(tmp_path / "base")
    sources = sorted(base.rglob("*.png"))
    for k in range(10):
        (tmp_path / "d" / f"{k}").mkdir(parents=True)
        for i in range(6000):
            os.link(sources[4 * k + i % 4], tmp_path / "d" / f"{k}" / f"{i}.png")
    code = """
import sys
from pathlib import Path
import numpy as np
from tltrain.core.recipe import Data
from tltrain.data import open_images
from tltrain.data.scans.found import Found, Scanned
from tltrain.data.sources import scan
def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024
seen = {}
def read(path, white):
    node = path.stat().st_ino
    seen[node] = seen.get(node, 0) + 1
    return Scanned(f'{node:015x}{seen[node]:017x}', None), True  # as files of their own
scan._read = read
before = peak()
images = open_images(Data(source=sys.argv[1]))
assert len(images.train) == 43_200
print(peak() - before)
"""
    run = [sys.executable, "-c", code, f"folder:{tmp_path / 'd'}"]
    assert int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) < 120 * 2**20, "174 MB with objects"
