"""zip:FILE and tar:FILE: an archive of an image folder is the same data set as the folder, and a damaged one is refused."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from container_files import digit_rows, opened, tar_file

from tltrain.core.errors import UserError
from tltrain.data.containers import packed


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))


def _files() -> dict[str, bytes]:
    return {f"{row.split}/digit {row.label}/{i:03}.png": row.content for i, row in enumerate(digit_rows())}


def _folder(root: Path) -> Path:
    for name, content in _files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _zip(file: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file


def _tar(file: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    return tar_file(file, files.items(), mode)


def _refused(source: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        opened(source)


FORMS: dict[str, Callable[[Path, dict[str, bytes]], str]] = {
    "deflated": lambda root, files: f"zip:{_zip(root / 'a.zip', files)}",
    "stored": lambda root, files: f"zip:{_zip(root / 'a.zip', files, zipfile.ZIP_STORED)}",
    "tar": lambda root, files: f"tar:{_tar(root / 'a.tar', files)}",
    "long names": lambda root, files: f"tar:{_tar(root / 'a.tar', {'x' * 150 + '/' + name: c for name, c in files.items()})}",
}


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_the_same_data_set_as_its_folder(tmp_path: Path, form: str) -> None:
    folder, archive = opened(f"folder:{_folder(tmp_path / 'd')}"), opened(FORMS[form](tmp_path, _files()))
    assert archive.fingerprint == folder.fingerprint, "so a run goes on with either"
    assert archive.classes == folder.classes
    for a, b in ((archive.train, folder.train), (archive.val, folder.val), (archive.test, folder.test)):
        assert a is not None
        assert b is not None
        assert list(a.ids) == list(b.ids)
        assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(len(b)))


def test_one_folder_around_everything_is_entered_and_said(tmp_path: Path) -> None:
    files = {f"photos/{name}": content for name, content in _files().items()} | {"__MACOSX/photos/train/._1.png": b"", "photos/a.txt": b""}
    images = opened(f"zip:{_zip(tmp_path / 'a.zip', files)}")
    assert images.train.ids[0].startswith("train/digit 0/")
    assert "all of it lies in photos: read from there" in images.notes
    assert "passed over, hidden: __MACOSX/photos/train/._1.png" in images.notes
    assert "files that are not images by their suffix are left out: 1 .txt" in images.notes


def test_depth_counts_the_levels_of_a_folder_in_an_archive_too(tmp_path: Path) -> None:
    places = ("animals/birds/owl", "animals/birds/tit", "animals/fish/carp")
    files = {f"{place}/{i}.png": row.content for place in places for i, row in enumerate(digit_rows()[:12])}
    assert opened(f"zip:{_zip(tmp_path / 'a.zip', files)}", depth=2).classes == ("animals/birds", "animals/fish")
    within = {f"photos/train/{name}": content for name, content in files.items()}
    images = opened(f"zip:{_zip(tmp_path / 'b.zip', within)}", depth=2)
    assert images.classes == ("animals/birds", "animals/fish"), "a folder around splits is no level"
    for name in within:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(within[name])
    with pytest.raises(UserError, match=r"holds nothing but photos, which holds train; did you mean folder:.*/d/photos\?"):
        opened(f"folder:{tmp_path / 'd'}", depth=2)


def test_an_archive_is_looked_through_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FORMS["deflated"](tmp_path, _files())
    first = opened(source)

    def not_again(*_: object) -> None:
        raise AssertionError("what was kept is read")

    monkeypatch.setattr("tltrain.data.containers.archives.look_through_zip", not_again)
    monkeypatch.setattr(packed, "examined", not_again)
    assert opened(source).fingerprint == first.fingerprint


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    first = opened(FORMS["stored"](tmp_path, _files()))
    names = list(_files())
    swapped = _files() | {names[0]: _files()[names[8]], names[8]: _files()[names[0]]}  # of the same sizes in all
    file = Path(FORMS["stored"](tmp_path, swapped).removeprefix("zip:"))
    os.utime(file, ns=(1, 1))
    assert opened(f"zip:{file}").fingerprint != first.fingerprint


def test_names_that_lead_out_of_the_archive_are_passed_over_and_nothing_is_written(tmp_path: Path) -> None:
    outside = {"../../train/digit 0/evil.png": digit_rows()[0].content, "/train/digit 0/root.png": digit_rows()[1].content}
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    images = opened(f"zip:{_zip(tmp_path / 'a.zip', _files() | outside)}")
    assert "passed over, hidden: ../../train/digit 0/evil.png" in images.notes
    assert "train/digit 0/root.png" in images.train.ids, "as every program that unpacks takes it"
    after = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    assert after == [*before, tmp_path / "a.zip"]


def test_a_flipped_bit_is_found_by_the_checksum_of_the_zip(tmp_path: Path) -> None:
    from PIL import Image

    pixels = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(pixels, "BMP")  # a format that shows no damage itself
    file = _zip(tmp_path / "a.zip", _files() | {"train/digit 0/x.bmp": pixels.getvalue()}, zipfile.ZIP_STORED)
    content = bytearray(file.read_bytes())
    content[content.index(pixels.getvalue()[:60]) + 700] ^= 1
    file.write_bytes(content)
    images = opened(f"zip:{file}", max_unreadable=0.03)
    assert "train/digit 0/x.bmp" not in images.train.ids
    assert any("x.bmp (damaged in its archive (another checksum" in note for note in images.notes)


def test_hard_links_and_other_members_of_a_tar(tmp_path: Path) -> None:
    file = _tar(tmp_path / "a.tar", _files())
    with tarfile.open(file, "a") as archive:
        for name, kind in (("train/digit 0/link.png", tarfile.LNKTYPE), ("train/digit 0/soft.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "train/digit 0/000.png"
            archive.addfile(member)
    images = opened(f"tar:{file}")
    assert "train/digit 0/link.png" in images.train.ids
    assert "links and devices in the archive are passed over: train/digit 0/soft.png" in images.notes


def _cut(file: Path, keep: float) -> Path:
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    return file


def _with_bad_header(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[content.index(b"train/digit 1/") + 148] ^= 0xFF  # the checksum of that header
    file.write_bytes(content)
    return file


def test_what_is_broken_is_refused_in_one_message(tmp_path: Path) -> None:
    _refused(f"zip:{_cut(_zip(tmp_path / 'a.zip', _files()), 0.7)}", r"a.zip is not a whole zip archive: .*unzip -t")
    _refused(f"tar:{_cut(_tar(tmp_path / 'b.tar', _files()), 0.5)}", r"b.tar is not a whole tar archive")
    _refused(
        f"tar:{_with_bad_header(_tar(tmp_path / 'c.tar', _files()))}", r"c.tar is not a whole tar archive: what stands at byte [\d,]+ "
    )
    _refused(f"tar:{_zip(tmp_path / 'g.zip', _files())}", r"g.zip is a zip archive; name it zip:")
    _refused(f"zip:{_tar(tmp_path / 'g.tar', _files())}", r"g.tar is a tar archive; name it tar:")
    _refused(f"tar:{_tar(tmp_path / 'd.tar.gz', _files(), 'w:gz')}", r"compressed as a whole.*`gunzip -k d.tar.gz`")
    _refused(f"zip:{_zip(tmp_path / 'e.zip', _files(), zipfile.ZIP_LZMA)}", r"packed in a way that is not read here: .*`zip -r`")
    _refused(f"zip:{tmp_path / 'none.zip'}", r"none.zip is not there; give a zip archive")
    _refused(f"zip:{_folder(tmp_path / 'd')}", r"which is a folder; did you mean folder:")
    strange = _files() | {"test/bird/1.png": digit_rows()[0].content}
    _refused(f"zip:{_zip(tmp_path / 'f.zip', strange)}", r"test/bird has no counterpart below train; every class needs training images")


def test_a_file_that_is_replaced_while_it_is_read_is_said(tmp_path: Path) -> None:
    images = opened(FORMS["stored"](tmp_path, _files()))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.zip has changed since it was looked through"):
        images.train.read(0)


def test_a_class_without_images_is_refused_as_in_a_folder(tmp_path: Path) -> None:
    """By its folder alone, and by a file that is no image."""
    _refused(f"zip:{_zip(tmp_path / 'a.zip', _files() | {'train/digit 9/': b''})}", "class folder .*digit 9 has no image")
    _refused(f"tar:{_tar(tmp_path / 'b.tar', _files() | {'train/digit 9/x.gif2': b''})}", "class folder .*digit 9 has no image")
    with tarfile.open(tmp_path / "b.tar", "a") as archive:
        archive.addfile(member := tarfile.TarInfo("train/digit 8"))
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    _refused(f"tar:{tmp_path / 'b.tar'}", "class folder .*digit 8 has no image")


def test_files_of_a_tar_without_their_zeros_are_refused(tmp_path: Path) -> None:
    file, name = _tar(tmp_path / "a.tar", _files()), "train/digit 0/sparse.png"
    with tarfile.open(file, "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "4096", "GNU.sparse.name": name}
        member.size = 4
        archive.addfile(member, io.BytesIO(b"abcd"))
    _refused(f"tar:{file}", r"sparse ones, train/digit 0/sparse.png")


def test_a_small_file_that_unpacks_to_gigabytes_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 10_000)
    file = _zip(tmp_path / "a.zip", _files() | {"train/digit 0/bomb.png": bytes(20_000)})
    images = opened(f"zip:{file}", max_unreadable=0.03)
    assert any("bomb.png (damaged in its archive (more than 10,000 bytes))" in note for note in images.notes)


@pytest.mark.parametrize(
    ("given", "meant"), [("ZIP:a.zip", "zip:FILE"), ("webdatasets:data/x.tar", "webdataset:GLOB"), ("paquet:d/*.parquet", "parquet:GLOB")]
)
def test_a_mistyped_kind_is_suggested(given: str, meant: str) -> None:
    _refused(given, rf"data.source is '.*'; did you mean {meant}\?")
